"""A run takes what was tuned for it, says so, and keeps it: here by a table for the CPU, which no command writes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.jobs.pretrain import pretrain
from fastbeit.model import kernels as module
from fastbeit.model.tuned import key_of, table_path, write_table
from helpers.tiny import SETTINGS, make_parts, write_config
from helpers.waiting import finished

CPU = torch.device("cpu")
CHOICES = dict(attention="eager", attention_mib=None, loss_rows=5)
FIRST = "kernels: attention eager, masked_embed reference, loss reference, masks reference, loss_rows 5"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}


@pytest.fixture
def run(parts, tmp_path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Runs the job with overrides; gives what it said, and the state of its last checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(out: str, steps: int = 2, **overrides: Any) -> tuple[list[str], dict]:
        settings = {**parts, "out": tmp_path / out, "optim__steps": steps, "engine__device": "cpu", **overrides}
        path = settings.pop("config")
        config = load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
        assert pretrain(config, ["fastbeit", "pretrain", "x.yaml"]) == 0
        said = [line.strip() for line in capfd.readouterr().err.splitlines()]
        return said, json.loads((last(tmp_path / out) / "state.json").read_text())

    return run


def last(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*"))


def tune(**choices: Any) -> None:
    write_table(table_path(), key_of(Config.model_validate(SETTINGS), 32, 1, CPU), CHOICES | choices, {})


def test_it_is_taken_said_and_kept(run):
    said, state = run("before")
    assert not any("tuned" in line for line in said)
    tune()
    said, state = run("tuned")
    choices = "attention eager, attention_mib as it is, loss_rows 5"
    taken = f"kernels: {choices}, where nothing is set (as tuned, '{table_path()}')"
    assert FIRST in said and taken in said
    plain = dict(masked_embed="reference", loss="reference", masks="reference")
    assert state["kernels"]["choices"] == CHOICES | plain
    assert state["kernels"]["device"] == "cpu" and taken in state["kernels"]["why"]


def test_a_resumed_run_keeps_it_to_the_bit_though_the_table_has_changed(run, tmp_path):
    tune()
    run("whole", steps=4, log__save_every=2)
    run("cut", steps=4, log__save_every=2)
    # as if it had been killed after step 2
    for path in (tmp_path / "cut/checkpoints/step-000004").iterdir():
        path.unlink()
    (tmp_path / "cut/checkpoints/step-000004").rmdir()
    tune(attention="sdpa", loss_rows=3)
    said, state = run("cut", steps=4, log__save_every=2)
    assert FIRST in said and "kernels: as step-000002 was computed" in said
    assert not any("as tuned" in line for line in said)
    one, other = (load_file(last(tmp_path / out) / "model.safetensors") for out in ("whole", "cut"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    # the names of a configuration win: over the checkpoint, and over the table
    said, state = run("cut", steps=4, kernels__attention="sdpa")
    assert "kernels: as step-000004 was computed; attention was eager, and is set to sdpa" in said
    assert FIRST.replace("eager", "sdpa") in said


def test_names_of_the_configuration_win(run):
    tune()
    said, state = run("named", kernels__attention="sdpa", kernels__loss_rows=7)
    assert FIRST.replace("eager", "sdpa").replace("loss_rows 5", "loss_rows 7") in said
    assert state["kernels"]["choices"]["loss_rows"] == 7
    tune(attention_mib=64)
    said, _ = run("plain", kernels__backend="reference")
    assert FIRST.replace("eager", "sdpa").replace("loss_rows", "attention_mib 64, loss_rows") in said


def test_what_was_tuned_and_does_not_run_is_replaced_and_said(run):
    tune(attention="xformers")
    said, _ = run("refused")
    assert FIRST.replace("eager", "sdpa") in said
    assert any(line.startswith("attention: xformers is not taken, because here it does not serve: ") for line in said)


def test_a_damaged_table_stops_nobody(run):
    tune()
    table_path().write_text("{")
    said, _ = run("damaged")
    assert FIRST.replace("eager", "sdpa").removesuffix(", loss_rows 5") in said
    # on a CPU nobody tunes, and nothing is said of it


def test_what_another_device_was_computed_with_is_not_kept(run, monkeypatch: pytest.MonkeyPatch):
    tune()
    run("moved", steps=2)
    monkeypatch.setattr(module, "device_name", lambda device: "another")
    said, state = run("moved", steps=2)
    assert "kernels: chosen anew, for step-000002 was computed on cpu, this is another" in said


def test_on_a_card_it_says_how_to_tune(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "device_name", lambda device: "H1")
    monkeypatch.setattr(module, "key_of", lambda *_: {})
    world = module.World(0, 1, torch.device("cuda", 0))
    choices, (line,) = module._told(Config(), 8192, world, None)
    hint = "`fastbeit doctor --tune`, with this configuration, finds what is fastest"
    assert not choices and line == f"kernels: nothing was tuned on this machine; {hint}"


# first rank 0 alone has the table, then rank 1 alone, as on machines without a common home
SCRIPT = """
import json, os, sys
from fastbeit.config.pretrain import Config
from fastbeit.engine.ranks import start_world
from fastbeit.model.kernels import chosen_kernels
from fastbeit.process import leave
from helpers.tiny import SETTINGS
config = Config.model_validate(SETTINGS | {"engine": {"device": "cpu"}})
world = start_world(config.engine)
said = []
for owner in range(2):
    os.environ["XDG_CACHE_HOME"] = sys.argv[1] if world.rank == owner else sys.argv[1] + " of nobody"
    found = chosen_kernels(config, 32, world)
    said.append([found.config.kernels.model_dump(), found.lines, found.kept])
print(json.dumps(said), file=open(sys.argv[1] + f"/rank{world.rank}", "w"))
world.leave()
leave(0)
"""


def test_rank_0_decides_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it alone has the table all take what is in it; where another has it, nobody does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_table(table_path(), key_of(Config.model_validate(SETTINGS), 32, 2, CPU), CHOICES, {})
    (tmp_path / "choose.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = finished([*torchrun, str(tmp_path / "choose.py"), str(tmp_path)], env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert one == other
    assert [(found["attention"], found["loss_rows"]) for found, _, _ in one] == [("eager", 5), ("sdpa", None)]
