"""Plans of the paper's runs: complete, monotone, and made of what is counted elsewhere."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import main as memory_main
from fastbeit.cli import main
from fastbeit.config.read import load_config
from fastbeit.engine.cards import CARDS
from fastbeit.engine.forecast import StepTime
from fastbeit.engine.measured import STEPS, TOKENIZED
from fastbeit.jobs.plan import Machine, Plan, make_plan
from fastbeit.model.beit import make_beit
from helpers.caches import NUM_IMAGES, VIEWS, make
from helpers.tiny import make_parts, write_config

CONFIGS = Path(__file__).parents[2] / "configs"
BASE, LARGE = (str(CONFIGS / f"beit_{size}_in1k.yaml") for size in ("base", "large"))
IMAGES = 1_281_167


def planned(config: str, gpus: int, gpu: str = "h100", *settings: str, gpus_per_node: int = 8) -> Plan:
    return make_plan(load_config(config, list(settings)), Machine(gpus, gpu, gpus_per_node, IMAGES, 110))


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


@pytest.mark.parametrize("gpu", CARDS)
def test_more_gpus_take_fewer_hours_and_larger_models_more(gpu: str):
    base, large = ([planned(config, gpus, gpu) for gpus in (1, 8, 64)] for config in (BASE, LARGE))
    for plan in (*base, *large):
        found = numbers(asdict(plan))
        assert len(found) > 100 and all(math.isfinite(number) and number >= 0 for number in found)
        fly, stored = plan.runs["tokens on the fly"], plan.runs["stored tokens"]
        assert fly.hours >= stored.hours > 0
        assert stored.images_per_s == pytest.approx(stored.gpu_images_per_s * plan.machine.gpus)
    for source in ("tokens on the fly", "stored tokens"):
        for plans in (base, large):
            assert sorted((plan.runs[source].hours for plan in plans), reverse=True) == [
                plan.runs[source].hours for plan in plans
            ]
        for small, big in zip(base, large, strict=True):
            assert small.runs[source].hours < big.runs[source].hours
            for one, other in zip(small.engines, big.engines, strict=True):
                assert one.footprint.static < other.footprint.static


def test_what_was_measured_is_said_to_be():
    for config, step in ((BASE, STEPS[0]), (LARGE, STEPS[1])):
        plan = planned(config, 8)
        assert plan.compute == f"measured on an H100 with {step.images} images, taken per image"
        assert plan.runs["stored tokens"].time.compute_ms == pytest.approx(step.step_ms * 256 / step.images)
        assert plan.runs["tokens on the fly"].time.tokenizer_ms == pytest.approx(1e3 * 256 / TOKENIZED)
        # the formula that other cards are predicted by, on the same card and size
        wider = planned(config, 8, "h100", "engine.compile=off")
        assert wider.compute == "predicted, a lower bound"
        times = [one.runs["stored tokens"].time.compute_ms for one in (plan, wider)]
        assert 1 < times[0] / times[1] < 1.3
    assert "predicted" in planned(BASE, 8, "h200").compute and "predicted" in planned(BASE, 8, "h200").tokenizer


def test_recomputed_blocks_take_longer_and_less_memory():
    kept, again = (planned(BASE, 8, "rtx3090", f"engine.checkpoint_blocks={flag}") for flag in ("false", "true"))
    before, after = (plan.runs["stored tokens"].time.compute_ms for plan in (kept, again))
    assert after == pytest.approx(1.25 * before) and again.engines[0].peak_bytes < kept.engines[0].peak_bytes
    assert again.checkpoint_blocks == "is set" and kept.checkpoint_blocks == "not needed"


def test_whether_recomputation_is_needed():
    tight = planned(LARGE, 8, "rtx4090", "optim.accumulate=2")
    assert not tight.engines[0].fits and tight.checkpoint_blocks == "needed: micro-batches of 128 fit with it"
    # 16 images a micro-batch, and with recomputation more
    slow = planned(LARGE, 8, "rtx4090", "model.depth=72")
    fitted = slow.engines[0].micro_batch
    assert slow.engines[0].fits and fitted < 32 and slow.checkpoint_blocks.endswith(f", not {fitted}")
    hopeless = planned(LARGE, 8, "rtx4090", "model.width=4096")
    assert not hopeless.engines[0].fits and hopeless.checkpoint_blocks == "does not help: nothing fits"


def test_memory_is_that_of_the_memory_command(capsys):
    """For 24, 40 and 80 GB."""
    for config in (BASE, LARGE):
        assert memory_main(["--plan", config, "--ranks", "8"]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        for gpu, line in zip(("rtx4090", "a100-40gb", "a100-80gb"), lines, strict=True):
            ddp = planned(config, 8, gpu).engines[0]
            wanted = f"{ddp.accumulate} micro-batch(es) of {ddp.micro_batch}, peak {ddp.peak_bytes / 2**30:.1f} GiB"
            assert line.endswith(wanted)


def zero(stage: int, *settings: str) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *settings]


def test_ddp_and_zeros_stages_are_choices_and_what_is_set_is_one_of_them():
    names = ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    plans = [planned(LARGE, 16, "h100"), *(planned(LARGE, 16, "h100", *zero(stage)) for stage in (1, 2, 3))]
    for plan in plans:
        assert plan.engines == plans[0].engines and [one.engine for one in plan.engines] == names
    statics = [one.footprint.static for one in plans[0].engines[1:]]
    assert statics == sorted(statics, reverse=True)
    # as docs/planning.md says of the buckets
    for config in (BASE, LARGE):
        ddp, one, two, three = (choice.peak_bytes for choice in planned(config, 8).engines)
        assert one > two > ddp > three
    offload = zero(2, "engine.offload=optimizer")
    for settings, name in (zero(0), "ZeRO-0"), (offload, "ZeRO-2, offload"):
        plan = planned(LARGE, 16, "h100", *settings)
        assert plan.engines[:-1] == plans[0].engines and plan.engines[-1].engine == name
    assert plan.engines[-1].footprint.host > 0 == plan.engines[-1].footprint.gradients


def test_time_is_that_of_the_engine_that_is_set():
    def time(*settings: str) -> StepTime:
        return planned(LARGE, 16, "h100", *settings).runs["stored tokens"].time

    ddp, zeros = time(), [time(*zero(stage)) for stage in (0, 1, 2, 3)]
    assert ddp.exposed_ms == 0
    # one micro-batch: gradients, and from stage 1 on weights as well
    assert [one.exchange_ms / ddp.exchange_ms for one in zeros] == pytest.approx([1, 1.5, 1.5, 1.5])
    # the first stages exchange after the backward; the third gathers ahead
    assert [one.exposed_ms / one.exchange_ms for one in zeros] == [1, 1, 1, 0]
    # in more micro-batches stage 2 reduces, and stage 3 gathers too, in each
    more = [time(*zero(stage, "optim.accumulate=4")) for stage in (1, 2, 3)]
    assert [one.exchange_ms / ddp.exchange_ms for one in more] == pytest.approx([1.5, 4.5, 6])
    offloaded = time(*zero(2, "engine.offload=optimizer"))
    assert ddp.offload_ms == zeros[2].offload_ms == 0
    assert offloaded.total_ms == pytest.approx(zeros[2].total_ms + offloaded.offload_ms)


def test_a_plan_with_offload_says_what_it_costs(capsys):
    assert main(["plan", LARGE, "--gpus", "8", "--gpu", "h100", *zero(3, "engine.offload=weights")]) == 0
    said = capsys.readouterr().out
    assert "ZeRO-3, offload" in said and "GiB a GPU in the host's memory" in said
    assert "offload: predicted, at 80% of 64 GB/s to the host" in said and max(map(len, said.splitlines())) <= 120


def test_parameters_are_those_of_the_model(tmp_path):
    path = str(write_config(tmp_path / "tiny.yaml"))
    model = make_beit(load_config(path, []), 8192)
    plan = make_plan(load_config(path, []), Machine(2, "h100", 8, 100, 110))
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.num_steps == 6
    assert planned(BASE, 8).num_steps == 800 * (IMAGES // 2048)


def test_a_cache_is_as_large_as_its_files(tmp_path):
    parts = {**make_parts(tmp_path), "config": str(write_config(tmp_path / "tiny.yaml"))}
    assert make(parts, tmp_path / "tokens") == 0
    views = list((tmp_path / "tokens").glob("*.npy"))
    config = load_config(parts["config"], [f"data.num_crops={VIEWS}"])
    cache = make_plan(config, Machine(1, "h100", 8, NUM_IMAGES, 110)).cache
    assert cache and len(views) == VIEWS
    # the header of a file is 128 bytes
    assert cache.num_bytes == sum(path.stat().st_size - 128 for path in views)
    assert (cache := planned(BASE, 8).cache) and cache.crop_bytes == 392


def test_what_a_node_has_to_feed():
    plan = planned(BASE, 16)
    for run in plan.runs.values():
        node = run.images_per_s / 2
        assert run.node_read_mb_per_s == pytest.approx(node * 110 * 1024 / 1e6)

    def rate(source: str, *settings: str) -> tuple[int, int]:
        """Cores, and those of the same with the rate of docs/speed.md."""
        run = planned(BASE, 16, "h100", *settings).runs[source]
        per_core = {"tokens on the fly": 280.4, "stored tokens": 350.6}[source]
        return run.node_cores["500 x 375"], math.ceil(run.images_per_s / 2 / per_core)

    # both views, and the patch view alone; another jitter is cheaper
    for source in ("tokens on the fly", "stored tokens"):
        cores, expected = rate(source)
        assert cores == expected
        assert rate(source, "data.jitter=0")[0] < expected
    assert rate("tokens on the fly", "data.jitter_on=crop")[0] <= rate("tokens on the fly")[0]
    assert list(planned(BASE, 8, "h100", "objective=pixels").runs) == ["pixels"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--gpus", "0"], "want at least 1"),
        (["--gpus", "-8"], "want at least 1"),
        (["--gpus", "12"], "--gpus 12 does not fill nodes of 8; try 16"),
        (
            ["--gpus", "6"],
            "optim.batch_size 2048 is not a multiple of 6, GPUs times micro-batches; try optim.batch_size=2046",
        ),
        (["--gpus", "8", "--gpu", "a100"], f"no GPU 'a100' is known; there are {', '.join(CARDS)}"),
        (["--gpus", "8", "optim.accumulate=3"], "is not a multiple of accumulate 3"),
        (["--gpus", "8", "engine.precision=fp32"], "got engine.precision=fp32"),
        (["--gpus", "8", "--images", "9"], "optim.batch_size 2048 is more than the 9 images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line(args: list[str], message: str, capsys):
    assert main(["plan", BASE, "--gpu", "h100", *args]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plan", BASE, "--gpus", "8", "--gpu", "h100", "--json", str(tmp_path / "file" / "plan.json")]) == 74
    assert "cannot be written" in capsys.readouterr().err


def test_text_and_json_say_the_same_and_the_document_too(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", BASE, "--gpus", "8", "--gpu", "h100", "--json", str(file)]) == 0
    text, found = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{found['parameters']:,}" in text and f"{found['runs']['stored tokens']['hours']:,.1f}" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    shown = (CONFIGS.parent / "docs" / "planning.md").read_text()
    assert all(f"    {line}".rstrip() in shown.splitlines() for line in text.splitlines())


def test_a_host_that_is_slower_than_the_card_is_named(capsys):
    for gpus, said in ((8, 0), (64, 1)):
        assert main(["plan", BASE, "--gpus", str(gpus), "--gpu", "h100"]) == 0
        assert capsys.readouterr().out.count("the host is slower than the card") == said


def test_it_comes_without_torch():
    code = (
        "import sys; from fastbeit.cli import main; "
        f"assert main(['plan', {BASE!r}, '--gpus', '8', '--gpu', 'h100']) == 0; "
        "assert not {'torch', 'triton', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
