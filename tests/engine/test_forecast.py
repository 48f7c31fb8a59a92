"""What a plan is made of: the table of GPUs, the measured rates, and the time that cards spend on one another."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastbeit.config.pretrain import Config
from fastbeit.config.running import EngineConfig
from fastbeit.engine import measured
from fastbeit.engine.cards import CARDS, card_of
from fastbeit.engine.forecast import ADAMW_BYTES, HOST_MEMORY, LINK_SHARE, StepTime, exchange_ms, offload_ms
from fastbeit.engine.measured import measured_step
from fastbeit.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def rows(file: str, part: str, **wanted: Any) -> list[dict[str, Any]]:
    found = json.loads((RESULTS / file).read_text())[part]
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def test_steps_are_those_of_the_results():
    (base,) = rows("h100/step.json", "rows", variant="triton-compiled")
    case = "BEiT-L, 128 images, blocks compiled, attention by relative_attention, loss by 9600 rows"
    *_, large = rows("h100/step_modes.json", "rows", case=case)  # the newest
    for step, row, images in zip(measured.STEPS, (base, large), (256, 128), strict=True):
        assert (step.images, step.step_ms, step.host_ms) == (images, round(row["step_ms"], 1), round(row["host_ms"], 1))
        assert measured.HOST_MS >= round(step.host_ms / step.model.depth, 1)


def test_tokens_are_those_of_the_results():
    (row,) = rows("h100/tokenizer.json", "encode", who="ours, fp16, masked slots")
    assert measured.TOKENIZED == round(row["img_per_s"])


@pytest.mark.parametrize("jitter", ["off", "full_image", "crop"])
def test_decoding_is_that_of_the_results(jitter: str):
    def rate(file: str, part: str, who: str, work: str) -> float:
        (row,) = rows(f"cpu/{file}.json", part, who=who, work=work, jitter=jitter)
        return round(row["img_per_s_core"], 1)

    for work in ("one view", "two views"):
        assert measured.PHOTOS[work][jitter] == rate("data", "photos", "ours, torch, 2 workers", work)
    assert measured.LARGE_PHOTOS[jitter] == rate("shards", "large", "ours, torch", "two views")
    assert measured.SHARDED_PHOTOS[jitter] == rate("shards", "shards", "ours, torch", "two views")


@pytest.mark.parametrize(
    "settings, images",
    [
        ({}, 256),
        ({"model": {"layer_scale": 1e-5, "drop_path": 0}}, 256),
        ({"model": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096}}, 128),
        ({"model": {"depth": 11}}, None),
        ({"model": {"layer_scale": 0}}, None),
        ({"data": {"image_size": 384}}, None),
        ({"predict": "all"}, None),
        ({"objective": "pixels"}, None),
        ({"engine": {"checkpoint_blocks": True}}, None),
        ({"engine": {"compile": "off"}}, None),
        ({"kernels": {"attention": "sdpa"}}, None),
    ],
    ids=str,
)
def test_only_what_was_measured_counts_as_measured(settings: dict[str, Any], images: int | None):
    step = measured_step(Config.model_validate(settings), CARDS["h100"])
    assert (step and step.images) == images
    assert measured_step(Config.model_validate(settings), CARDS["h200"]) is None


def test_a_card_by_its_name():
    for spelt in ("a100-80gb", "A100 80GB", "A100_80gb"):
        assert card_of(spelt) is CARDS["a100-80gb"]
    with pytest.raises(ConfigError) as caught:
        card_of("a100")
    assert all(name in str(caught.value) for name in CARDS) and caught.value.exit_code == 2


def test_an_exchange_waits_for_the_slowest_link():
    card, num_bytes = CARDS["h100"], 10**9

    def rate(num_ranks: int, ranks_per_node: int) -> float:
        sent = 2 * (num_ranks - 1) / num_ranks * num_bytes
        return sent / (exchange_ms(card, num_ranks, ranks_per_node, num_bytes) / 1e3) / LINK_SHARE

    assert exchange_ms(card, 1, 8, num_bytes) == 0
    assert rate(2, 8) == pytest.approx(rate(8, 8)) == pytest.approx(450e9)
    # eight adapters of 400 Gb/s, then two, which NVLink does not help
    assert rate(16, 8) == pytest.approx(8 * 50e9) and rate(16, 2) == pytest.approx(2 * 50e9)


def test_offload_takes_the_hosts_link_and_its_adamw():
    card, num_weights = CARDS["h100"], 10**9

    def sent(offload: str, accumulate: int, num_ranks: int = 8) -> float:
        """Bytes over a rank's link, per weight of its share."""
        engine = EngineConfig.model_validate({"name": "deepspeed", "zero_stage": 3, "offload": offload})
        adamw_s = ADAMW_BYTES * num_weights * min(num_ranks, 8) / num_ranks / HOST_MEMORY
        link_s = offload_ms(card, engine, num_ranks, 8, num_weights, accumulate) / 1e3 - adamw_s
        return link_s * LINK_SHARE * 64e9 / (num_weights / num_ranks)

    assert offload_ms(card, EngineConfig(), 8, 8, num_weights, 1) == 0
    # gradients down, weights up; more micro-batches add to gradients, which come up for that and go down again
    assert sent("optimizer", 1) == sent("optimizer", 1, 16) == pytest.approx(4 * 2)
    assert sent("optimizer", 3) == pytest.approx(4 * (3 + 2 + 1))
    # weights come up for forward and backward of each, not after the update
    assert sent("weights", 3) == pytest.approx(4 * (3 + 2 + 2 * 3))


# the exchange within its window, beyond it; a card that waits for the host
@pytest.mark.parametrize(
    "exchange, host, overlapped, apart", [(20, 30, 100, 120), (70, 30, 110, 170), (0, 150, 150, 150)]
)
def test_a_step(exchange: float, host: float, overlapped: float, apart: float):
    time = StepTime(compute_ms=90, tokenizer_ms=10, host_ms=host, exchange_ms=exchange, window_ms=60)
    assert (time.total_ms, time.without_overlap_ms) == (overlapped, apart)
