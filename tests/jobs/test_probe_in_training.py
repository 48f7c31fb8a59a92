"""Probes during pre-training: k-NN every so many epochs, in a time of its own."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, load_config
from fastbeit.data.index.scan import build_index
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, PREEMPTED, ConfigError, RunError
from fastbeit.evaluate import probe
from fastbeit.evaluate.frozen import ModelSource, open_frozen
from fastbeit.jobs.pretrain import pretrain
from fastbeit.train.settings import changes, fixed
from fastbeit.train.stop import Stop
from helpers.labelled import write_classes
from helpers.tiny import make_parts, write_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    keys = {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}
    for name, images in (("index", range(6)), ("val_index", range(20, 23))):
        build_index(write_classes(folder / name, images), folder / f"{name}.idx", progress=False)
        keys[f"probe.{name}"] = str(folder / f"{name}.idx")
    return keys


def run(parts, out: Path, **overrides) -> int:
    """12 images in batches of 8: two steps an epoch."""
    settings = {**parts, "out": out, "optim.steps": 8, "probe.every_epochs": 2}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_config(settings.pop("config"), [f"{key}={value}" for key, value in settings.items()])
    return pretrain(config, ["fastbeit", "pretrain", "x.yaml"])


@pytest.fixture
def train(parts, tmp_path):
    return lambda **overrides: run(parts, tmp_path / "run", **overrides)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(parts, out) == 0
    return out


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def probes(run: Path) -> dict[int, dict]:
    return {line["step"]: line for line in lines(run) if line.get("event") == "probe"}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "event" not in line]


def test_figures_are_those_of_the_checkpoint(whole, parts):
    found = probes(whole)
    assert [*found] == [4, 8] and found[8]["seconds"] > 0
    frozen = open_frozen(ModelSource(whole), torch.device("cpu"))
    again = probe.open_probe(frozen.data, Path(parts["probe.index"]), Path(parts["probe.val_index"]), 0)
    wanted = again.see(frozen.model, torch.float32, World(0, 1, torch.device("cpu")), Stop())
    assert (found[8]["knn_top1"], found[8]["knn_top5"]) == (wanted.top1, wanted.top5) and 0.25 < wanted.top1


def test_a_run_with_probes_learns_what_one_without_learns(train, tmp_path, whole):
    train(probe__index="", probe__val_index="")
    assert losses(tmp_path / "run") == losses(whole) and not probes(tmp_path / "run")


def test_its_time_is_none_of_the_steps(train, tmp_path, monkeypatch, capfd):
    """Each probe takes a day by a clock that it turns on; steps of hours would be seen."""
    day, clock, see, late = 86400.0, time.perf_counter, probe.KnnProbe.see, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def long(*given):
        late[0] += day
        return see(*given)

    monkeypatch.setattr(probe.KnnProbe, "see", long)
    train(optim__steps=3, probe__every_epochs=1)
    assert "step 2  probe of block 0: k-NN top-1 " in capfd.readouterr().err
    assert [line["seconds"] > day for line in probes(tmp_path / "run").values()] == [True] * 2
    steps = [line["step_ms"] for line in lines(tmp_path / "run") if "event" not in line]
    assert len(steps) == 3 and max(steps) < 1000 * day / 10


def test_a_stop_ends_a_probe_which_is_made_up_for(train, tmp_path, monkeypatch, whole):
    features_of = probe.features_of

    def stopped(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return features_of(*given)

    monkeypatch.setattr(probe, "features_of", stopped)
    assert train() == PREEMPTED
    assert (tmp_path / "run/checkpoints/step-000004").is_dir() and not probes(tmp_path / "run")
    monkeypatch.setattr(probe, "features_of", features_of)
    assert train() == 0
    assert probes(tmp_path / "run").keys() == {4, 8} and losses(tmp_path / "run") == losses(whole)


def test_images_that_are_gone_end_the_run_after_a_checkpoint(train, tmp_path, parts):
    folder = Path(parts["probe.index"]).with_suffix("")
    folder.rename(tmp_path / "gone")
    try:
        with pytest.raises(RunError, match="is gone, or not mounted; last checkpoint: .*step-000004") as caught:
            train()
    finally:
        (tmp_path / "gone").rename(folder)
    assert caught.value.exit_code == DATA_MISSING


def test_probes_may_change_between_the_parts_of_a_run():
    found = changes(configure(Config, []), configure(Config, ["probe.every_epochs=1", "probe.block=1"]))
    assert len(found) == 2 and not fixed(found)


@pytest.mark.parametrize(
    "keys, message",
    [
        (["probe.index=x.idx"], "probe: a probe wants index and val_index, and val_index is empty"),
        (["probe.block=12"], "probe.block 12 of 12 blocks, which are 0 to 11"),
    ],
)
def test_settings_that_do_not_fit(keys, message):
    with pytest.raises(ConfigError, match=message):
        configure(Config, keys)


def test_an_index_without_labels_is_refused_before_the_first_step(train, tmp_path, parts):
    with pytest.raises(RunError, match="12 of 12 images have no label") as caught:
        train(probe__index=parts["data.index"])
    assert caught.value.exit_code == DATA_MISSING and not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="probe.val_index: 'nope.idx' does not exist; make one with `fastbeit index"):
        train(probe__val_index="nope.idx")


def test_the_block_that_is_looked_at():
    """The ninth of twelve, where the paper's linear probe is best; of a shallow model the first."""
    blocks = {depth: configure(Config, [f"model.depth={depth}"]).probe_block for depth in (1, 2, 4, 12, 24)}
    assert blocks == {1: 0, 2: 0, 4: 2, 12: 8, 24: 17}
    assert configure(Config, ["probe.block=11"]).probe_block == 11
