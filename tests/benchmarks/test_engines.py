"""`benchmarks.engines`: what is timed stands for BEiT-B, and what is said follows from the turns."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.engines import __main__ as engines
from benchmarks.engines import ranks, small
from benchmarks.engines.ranks import Facts, Ranks, Turn
from fastbeit.config.pretrain import Config
from fastbeit.engine.zero_sizes import PERSISTENT, bucket_sizes
from fastbeit.errors import RunError
from fastbeit.model.beit import make_beit


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, nn.Module]:
    """The small model, and BEiT-B."""
    with torch.device("meta"):
        return make_beit(small.config_of("single", 1), small.NUM_WORDS), make_beit(Config(), 8192)


def sizes(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_the_small_model_has_the_tensors_of_beit_b(both):
    little, base = both
    assert little.state_dict().keys() == base.state_dict().keys() and len(base.state_dict()) == 190
    assert sizes(little).keys() == sizes(base).keys() and len(sizes(base)) == 189


def test_zero3_shares_out_the_same_tensors(both):
    """Those above its threshold; and its buffers are the same share of the model."""
    little, base = map(sizes, both)
    given = json.loads(small.ZERO3.read_text())["zero_optimization"]
    threshold = given["stage3_param_persistence_threshold"]
    whole = {name for name, size in base.items() if size <= PERSISTENT}
    assert whole == {name for name, size in little.items() if size <= threshold} and whole != set(base)
    by_default = bucket_sizes(10**9, 3) | {"stage3_param_persistence_threshold": 256 * threshold}
    # in whole weights
    assert given == {key: size // 256 // 2 * 2 for key, size in by_default.items()}
    # matrices are most of the model
    assert sum(base.values()) / sum(little.values()) == pytest.approx(256, rel=0.03)


@pytest.mark.parametrize("engine", small.NUM_RANKS)
def test_each_engine_has_a_configuration(engine):
    config = small.config_of(engine, 2)
    said = config.engine.name + (str(config.engine.zero_stage) if config.engine.name == "deepspeed" else "")
    assert said == engine.replace("zero", "deepspeed")
    assert config.optim.batch_size == small.NUM_IMAGES * small.NUM_RANKS[engine] and config.optim.accumulate == 2


def made_up(engine: str, factor: float) -> list[Turn]:
    """Three rounds, on a machine that becomes ever slower."""
    return [Turn(10 * slow * factor, 6 * slow * factor, 4 * slow, 100 + slow * factor) for slow in (1, 2, 4)]


def test_ratios_are_those_of_a_round():
    facts = {engine: Facts(189, 1000, 90.0) for engine in small.NUM_RANKS}
    turns = {engine: made_up(engine, 1 + place) for place, engine in enumerate(small.NUM_RANKS)}
    turns["zero3"][2] = Turn(80, 6 * 4 * 7, 16, 500)
    rows = {row["engine"]: row for row in engines.summarise(facts, turns)}
    assert [*rows] == [*small.NUM_RANKS]
    # medians of rounds; ddp's is twice that of single
    assert (rows["single"]["step_ms"], rows["ddp"]["step_ms"], rows["ddp"]["cpu_ms"]) == (20, 40, 24)
    # however slow the machine was in a round
    for name, times in {"single": 0.5, "ddp": 1.0, "zero2": 2.5}.items():
        row = rows[name]
        assert row["low"] == row["times"] == row["high"] == row["cpu_times"] == times
    # in the third round it took as long as ddp: 3, 3, 1
    assert (rows["zero3"]["low"], rows["zero3"]["times"], rows["zero3"]["high"]) == (2, 3, 3)
    # 6, 12, 24 less 4, 8, 16 of single's gradients
    assert rows["single"]["own_cpu_ms"] == 4 and rows["ddp"]["own_cpu_ms"] == 16
    assert rows["zero3"]["peak_mib"] == 500 and rows["zero3"]["imports_mib"] == 90
    assert "| zero3  | 80.0      | 3.00 (2.00 to 3.00) |" in engines.table([*rows.values()])


@pytest.mark.parametrize("words", [("--rounds", "1"), ("--steps", "0"), ("--steps", "many"), ("more",)])
def test_arguments_that_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        engines.main([*words])
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_rank_that_fails_ends_the_wait(monkeypatch, capfd):
    """The process knows no such engine, though this one has been told of it."""
    monkeypatch.setitem(ranks.NUM_RANKS, "unknown", 1)
    failing = Ranks("unknown", 1)
    with pytest.raises(RunError, match="a rank of unknown has failed"):
        failing.facts()
    failing.close()
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.long
def test_all_engines_take_turns(tmp_path: Path):
    file = tmp_path / "engines.json"
    assert engines.main(["--rounds", "2", "--steps", "1", "-o", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["tensors"] == 189 and found["versions"]["deepspeed"]
    assert [(row["micro_batches"], row["engine"]) for row in found["rows"]] == [
        (parts, engine) for parts in engines.MICRO_BATCHES for engine in small.NUM_RANKS
    ]
    for row in found["rows"]:
        assert row["step_ms"] > 0 and row["cpu_ms"] > 0 and row["low"] <= row["times"] <= row["high"]
        assert row["peak_mib"] > row["imports_mib"] > 0
