"""Weights & Biases gets what it is asked for, once, from rank 0, and ends no training: against a stand-in for wandb."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.config.running import LogConfig
from fastbeit.errors import ConfigError
from fastbeit.jobs.pretrain import pretrain
from fastbeit.train.log import RunLog
from fastbeit.train.wandb_board import check_wandb
from helpers.tiny import make_parts, write_config

# what fastbeit calls, and what fails when it is told to; calls and their keywords go into a file, a line each
STAND_IN = """
import json, os
from pathlib import Path

def call(name, **told):
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps({"call": name, **told}) + "\\n")
    if name in os.environ.get("BROKEN", "").split():
        raise RuntimeError(f"{name} failed\\nin two lines")

class Image:
    def __init__(self, pixels):
        self.shape = list(pixels.shape)

class Run:
    def define_metric(self, name, **told):
        call("define_metric", of=name, **told)
    def log(self, values):
        call("log", values={key: getattr(value, "shape", value) for key, value in values.items()})
    def finish(self, **told):
        call("finish", **told)

def init(**told):
    call("init", **told)
    return Run()
"""
ASKED = Config(log={"wandb": "beit"})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts the stand-in where wandb is imported from; gives the calls that were made, by name where one is given."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in "WANDB_CONSOLE", "WANDB_FINISH_TIMEOUT":
        monkeypatch.setenv(name, "")  # so that what is set goes again
        monkeypatch.delenv(name)

    def calls(name: str = "") -> list[dict[str, Any]]:
        path = folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if name in ("", line["call"])]

    yield calls
    sys.modules.pop("wandb", None)


def test_figures_pictures_and_settings(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    (tmp_path / "run").mkdir()
    with RunLog(tmp_path / "run", 0, 9, ASKED) as log:
        log.write({"step": 1, "loss": 2.0, "note": "a text"})
        log.write({"step": 2, "event": "held_out", "loss": 3.0})
        log.picture("a picture", torch.zeros(4, 6, 3, dtype=torch.uint8), 2)
    (init,) = calls("init")
    assert (init["project"], init["dir"], init["resume"]) == ("beit", str(tmp_path / "run"), "allow")
    assert init["config"] == ASKED.model_dump(mode="json")
    assert calls("define_metric") == [{"call": "define_metric", "of": "*", "step_metric": "step"}]
    assert [line["values"] for line in calls("log")] == [
        {"step": 1, "loss": 2.0},
        {"held_out/step": 2, "held_out/loss": 3.0, "step": 2},
        {"a picture": [4, 6, 3], "step": 2},
    ]
    assert calls("finish") == [{"call": "finish", "exit_code": 0}]
    # what the user set stays
    assert (os.environ["WANDB_CONSOLE"], os.environ["WANDB_FINISH_TIMEOUT"]) == ("wrap", "60")


def test_a_training_that_fails_is_one_that_failed(tmp_path, calls):
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, 0, 9, ASKED):
        raise ZeroDivisionError
    assert calls("finish") == [{"call": "finish", "exit_code": 1}]


@pytest.mark.parametrize(
    "out, config", [("run", Config()), ("run", None), (None, ASKED)], ids=["off", "none", "rank 1"]
)
def test_nothing_is_sent_unless_asked_and_from_rank_0(tmp_path, calls, out, config):
    (tmp_path / "run").mkdir()
    with RunLog(out and tmp_path / out, 0, 9, config) as log:
        log.write({"step": 1, "loss": 2.0})
    assert calls() == [] and "wandb" not in sys.modules and not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish", "init log finish"])
def test_a_failure_ends_nothing_and_is_said_once(tmp_path, calls, monkeypatch, capsys, broken):
    monkeypatch.setenv("BROKEN", broken)
    with RunLog(tmp_path, 0, 9, ASKED) as log:
        for step in 1, 2, 3:
            log.write({"step": step, "loss": 1.0})
            log.picture("a picture", torch.zeros(4, 4, 3, dtype=torch.uint8), step)
    said = [line for line in capsys.readouterr().err.splitlines() if "Weights & Biases" in line]
    assert said == [
        f"no Weights & Biases from here on: {broken.split()[0]} failed; "
        f"wandb sync sends what is left in '{tmp_path / 'wandb'}'"
    ]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 and log.error is None
    assert len(calls("log")) == {"init": 0, "define_metric": 0, "log": 1}.get(broken.split()[0], 6)


def test_it_is_asked_for_and_not_installed(tmp_path, monkeypatch):
    check_wandb(LogConfig())
    # a folder of this name beside the command, as wandb leaves one, is no package
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="log.wandb=beit wants the wandb package.*pip install wandb"):
        check_wandb(LogConfig(wandb="beit"))
    settings = ["log.wandb=beit", f"out={tmp_path / 'run'}", f"data.index={tmp_path}"]
    with pytest.raises(ConfigError, match="pip install wandb"):
        pretrain(load_config(write_config(tmp_path / "tiny.yaml"), settings), [])
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_goes_on_there(tmp_path: Path, calls):
    parts = make_parts(tmp_path)
    path = write_config(tmp_path / "tiny.yaml")

    def train(steps: int, out: str = "run") -> None:
        settings = [f"{key}={value}" for key, value in parts.items()]
        settings += ["log.wandb=beit", f"optim.steps={steps}", f"out={tmp_path / out}"]
        assert pretrain(load_config(path, settings), ["fastbeit"]) == 0

    train(2)
    train(4)
    train(2, "another")
    first, second, other = (line["id"] for line in calls("init"))
    assert first == second != other and (tmp_path / "run/wandb/id").read_text() == first
    steps = [line["values"]["step"] for line in calls("log") if "loss" in line["values"]]
    assert steps == [1, 2, 3, 4, 1, 2]
    # a run that has no checkpoint begins anew, and there too
    for checkpoint in (tmp_path / "another/checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    train(2, "another")
    assert calls("init")[-1]["id"] not in (first, other)
