"""What a run leaves on disk and goes on from: nothing is lost to a full disk, another run, damage or pruning."""

import errno
import fcntl
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import fastbeit.jobs.pretrain
from fastbeit.config.read import load_config
from fastbeit.errors import RunError
from fastbeit.files import sha256
from fastbeit.jobs.pretrain import pretrain
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.checkpoint import find_checkpoint, load_model, resolve_checkpoint
from fastbeit.train.log import RunLog
from fastbeit.train.loop import _keep_trace
from fastbeit.train.stop import Stop
from helpers.faults import odd_file_system, refuse
from helpers.tiny import make_parts, rewrite_state, write_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}


@pytest.fixture
def train(parts, tmp_path):
    """Runs the job with overrides in `tmp_path/run`; gives its exit code."""

    def train(out: str = "run", **overrides):
        settings = {**parts, "out": tmp_path / out, **overrides}
        path = settings.pop("config")
        config = load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
        return pretrain(config, ["fastbeit", "pretrain", "x.yaml"])

    return train


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory) -> Path:
    """A run of 6 steps with checkpoints of 2, 4 and 6; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    settings = {key: value for key, value in parts.items() if key != "config"}
    overrides = [f"{key}={value}" for key, value in {**settings, "out": out, "log.save_every": 2}.items()]
    pretrain(load_config(parts["config"], overrides), ["fastbeit"])
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def stop_after(monkeypatch, num_steps: int, act=lambda: None) -> None:
    """The stop of a scheduler comes in this step, and something is done."""
    keep, stops = fastbeit.jobs.pretrain.drop_path_keep, []
    enter = Stop.__enter__
    monkeypatch.setattr(Stop, "__enter__", lambda self: stops.append(self) or enter(self))

    def noted(seed, step, *rest):
        if step == num_steps - 1:
            stops[-1].wanted = True
            act()
        return keep(seed, step, *rest)

    monkeypatch.setattr("fastbeit.jobs.pretrain.drop_path_keep", noted)


def damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


def steps(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def test_pruning_spares_what_was_resumed_from_and_what_was_written(train, copied, monkeypatch, capfd):
    """The newest checkpoint is damaged; the run goes on from the one before, and is stopped before it gets there."""
    damage(copied / "checkpoints/step-000006")
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert train(log__keep=1, log__save_every=2) == 75
    assert steps(copied) == [4, 5, 6]
    assert find_checkpoint(copied / "checkpoints")[0] == copied / "checkpoints/step-000005"
    assert train(log__keep=1, log__save_every=2) == 0
    assert steps(copied) == [5, 6]
    assert find_checkpoint(copied / "checkpoints") == (copied / "checkpoints/step-000006", [])


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"\xff\xfe", b"- 1\n", None], ids=ascii)
def test_a_run_goes_on_without_its_config_and_with_torn_lists(train, finished, copied, capfd, content):
    shutil.rmtree(copied / "checkpoints/step-000006")
    if content is None:
        (copied / "config.yaml").unlink()
    else:
        (copied / "config.yaml").write_bytes(content)
        (copied / "log.jsonl").write_bytes((copied / "log.jsonl").read_bytes() + content)
        (copied / "bad_samples.jsonl").write_bytes(content)
    assert train(log__save_every=2) == 0
    said = capfd.readouterr().err
    assert "config.yaml' cannot be read (" in said and "Traceback" not in said
    before, after = (load_model(resolve_checkpoint(run)) for run in (finished, copied))
    assert all((before[name] == after[name]).all() for name in before)
    assert yaml.safe_load((copied / "config.yaml").read_text())["optim"]["steps"] == 6
    shutil.rmtree(copied / "checkpoints/step-000006")
    (copied / "config.yaml").write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000004' was made with other settings: seed was 0, now 1") as caught:
        train(seed=1)
    assert caught.value.exit_code == 78


def test_a_checkpoint_of_another_run_is_not_gone_on_from(train, copied, tmp_path):
    train("other", seed=3, optim__steps=9, log__save_every=9)
    shutil.copytree(tmp_path / "other/checkpoints/step-000009", copied / "checkpoints/step-000009")
    before = sorted(copied.rglob("*"))
    with pytest.raises(
        RunError, match=r"step-000009' was made with other settings: .*seed was 3, now 0.*remove"
    ) as caught:
        train(log__save_every=2)
    assert caught.value.exit_code == 78 and sorted(copied.rglob("*")) == before
    shutil.rmtree(copied / "checkpoints/step-000009")
    assert train(log__save_every=2) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": None}, "was made with other settings"),
        ({"config": {"nonsense": 1}}, "other settings: unknown key 'nonsense'"),
        ({"index": "0"}, "another index"),
    ],
    ids=str,
)
def test_what_a_checkpoint_must_agree_with_is_compared(train, copied, changes, message):
    rewrite_state(copied / "checkpoints/step-000006", **changes)
    with pytest.raises(RunError, match=message) as caught:
        train(log__save_every=2)
    assert caught.value.exit_code == 78


def test_weights_of_another_version_are_said(train, copied):
    checkpoint = copied / "checkpoints/step-000006"
    for name, other in ("model.safetensors", "optimizer.safetensors"), ("optimizer.safetensors", "model.safetensors"):
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        keep = (checkpoint / name).read_bytes(), dict(manifest["files"][name])
        shutil.copy(checkpoint / other, checkpoint / name)
        manifest["files"][name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(RunError, match="do not fit this model") as caught:
            train(log__save_every=2)
        assert caught.value.exit_code == 78
        (checkpoint / name).write_bytes(keep[0])
        manifest["files"][name] = keep[1]
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_resume_says_what_changed(train, parts, copied, capfd):
    shutil.rmtree(copied / "checkpoints/step-000006")
    rewrite_state(copied / "checkpoints/step-000004", ran={"ranks": 2, "device": "cpu", "activations": "float32"})
    other = {"optim__accumulate": 2, "engine__precision": "bf16", "data__val_index": parts["data.index"]}
    assert train(log__save_every=2, **other) == 0
    wanted = {
        "optim.accumulate": ["auto", 2],
        "engine.precision": ["auto", "bf16"],
        "data.val_index": ["", parts["data.index"]],
        "ranks": [2, 1],
        "activations": ["float32", "bfloat16"],
    }
    (line,) = (line for line in read_log(copied) if line.get("event") == "resume")
    assert line["step"] == 4 and {key: line["changes"].get(key) for key in wanted} == wanted
    said = capfd.readouterr().err
    assert "other than in the part up to step 4: " in said
    for key, (was, now) in wanted.items():
        assert f"{key} was {was}, now {now}" in said
    config = yaml.safe_load((copied / "config.yaml").read_text())
    assert (config["optim"]["accumulate"], config["engine"]["precision"]) == (2, "bf16")
    states = [json.loads((copied / f"checkpoints/step-00000{step}/state.json").read_text()) for step in (4, 6)]
    assert [state["config"]["optim"]["accumulate"] for state in states] == ["auto", 2]
    # the same again: nothing changed, and the line stays
    shutil.rmtree(copied / "checkpoints/step-000006")
    rewrite_state(copied / "checkpoints/step-000004", config=states[1]["config"], ran=states[1]["ran"])
    assert train(log__save_every=2, **other) == 0
    assert "other than in" not in capfd.readouterr().err
    assert [one for one in read_log(copied) if one.get("event") == "resume"] == [line]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["log.jsonl", "bad_samples.jsonl"])
@pytest.mark.parametrize("num_steps", [3, 6])
def test_a_full_disk_while_something_is_said_costs_no_step(train, tmp_path, monkeypatch, name, num_steps):
    """Also in the last step."""
    act: Any = RunLog.write if name == "log.jsonl" else BadSamples.add

    def fills(self, *args):
        path = tmp_path / "run" / name
        if name != "log.jsonl":
            args = ([(step[0], "empty")],)
        # images are found bad before the step that they are of
        if step[0] == num_steps - (name != "log.jsonl"):
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")
        act(self, *args)

    step, keep = [0], fastbeit.jobs.pretrain.drop_path_keep

    def noted(seed, number, *rest):
        step[0] = number + 1
        return keep(seed, number, *rest)

    monkeypatch.setattr("fastbeit.jobs.pretrain.drop_path_keep", noted)
    monkeypatch.setattr(RunLog if name == "log.jsonl" else BadSamples, act.__name__, fills)
    with pytest.raises(RunError, match=f"{name}' cannot be written: No space left") as caught:
        train()
    assert caught.value.exit_code == 74
    assert steps(tmp_path / "run") == [num_steps]
    monkeypatch.undo()
    (tmp_path / "run" / name).unlink()
    assert train() == 0


def test_a_full_disk_at_the_start_leaves_nothing_and_ends_with_74(train, tmp_path, monkeypatch):
    refuse(monkeypatch, os.fsync, errno.ENOSPC)
    with pytest.raises(RunError, match="out '.*run' cannot be written: No space left") as caught:
        train()
    assert caught.value.exit_code == 74 and not list(tmp_path.iterdir())


def test_a_run_on_an_odd_file_system_goes_on_as_on_any(train, finished, tmp_path, monkeypatch, capfd):
    odd_file_system(monkeypatch)
    stop_after(monkeypatch, 3)
    assert train(log__save_every=2) == 75
    assert steps(tmp_path / "run") == [2, 3]
    assert train(log__save_every=2) == 0
    said = capfd.readouterr().err
    for what in "locks", "chmod", "fsync of folders", "renaming over a file", "renaming a folder":
        assert said.count(f"has no {what} (") == 1
    assert "in use" not in said
    before, after = (load_model(resolve_checkpoint(run)) for run in (finished, tmp_path / "run"))
    assert all((before[name] == after[name]).all() for name in before)


def test_a_lock_that_cannot_be_had_is_none_that_another_has(train, tmp_path, monkeypatch):
    refuse(monkeypatch, fcntl.flock, errno.EIO)
    with pytest.raises(RunError, match="cannot be written: Input/output error") as caught:
        train()
    assert caught.value.exit_code == 73 and not list(tmp_path.iterdir())
    refuse(monkeypatch, fcntl.flock, errno.EWOULDBLOCK)
    with pytest.raises(RunError, match="in use by another run") as caught:
        train()
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_where_files_cannot_be_mapped_checkpoints_are_read(train, copied, monkeypatch):
    # which cannot be mapped
    load = partial(safe_open, "/dev/full", "pt")
    with pytest.raises(OSError, match="No such device"):
        load()
    shutil.rmtree(copied / "checkpoints/step-000006")
    monkeypatch.setattr("fastbeit.train.tensor_file.safe_open", lambda path, framework: load())
    assert train(log__save_every=2) == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optim__batch_size": 13, "data__tail": "drop"}, "batch_size 13 is more than the 12 images"),
        ({"kernels__loss": "triton"}, "kernels.loss=triton"),
        ({"optim__batch_size": 9, "optim__accumulate": 2}, "not a multiple of accumulate 2"),
    ],
    ids=str,
)
def test_a_refused_start_leaves_no_trace_and_can_be_corrected(train, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("fastbeit_kernels.backend.INTERPRETED", False)
    with pytest.raises(RunError, match=message):
        train(**overrides)
    assert not list(tmp_path.iterdir())


def test_a_start_whose_first_step_fails_can_be_corrected(train, tmp_path, monkeypatch):
    """As where a batch is too large for the card."""
    with monkeypatch.context() as patched:
        patched.setattr("fastbeit.jobs.pretrain.drop_path_keep", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            train(optim__batch_size=12)
    assert train() == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["batch_size"] == 8


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path, capfd):
    (tmp_path / "profile.json").mkdir()
    with torch.profiler.profile(acc_events=True) as profiler:
        torch.ones(1)
    _keep_trace(profiler, tmp_path / "profile.json")
    assert "no profile: " in capfd.readouterr().err
