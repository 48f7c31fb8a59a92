"""The loop as its user runs it, on real photos: what it learns, what it survives, and that a stop changes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbeit.jobs.pretrain
from fastbeit.config.read import load_config
from fastbeit.config.running import Kernels, KernelsConfig
from fastbeit.data.index.scan import build_index
from fastbeit.data.plans import Plans
from fastbeit.engine import loss_scale
from fastbeit.errors import ConfigError, DataError, RunError
from fastbeit.evaluate.finished_run import open_run
from fastbeit.jobs.pretrain import pretrain
from fastbeit.train.checkpoint import load_model, load_optimizer, resolve_checkpoint
from fastbeit.weights.models import read_model
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import make_parts, make_photos, make_tokenizer, run, write_config
from helpers.waiting import PATIENCE_S, started, wait_until


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}


@pytest.fixture
def train(parts, tmp_path, capfd):
    """Runs the job with overrides; gives its exit code, and what a log line says by step."""

    def train(out: str = "run", **overrides):
        settings = {**parts, "out": tmp_path / out, **overrides}
        path = settings.pop("config")
        config = load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
        code = pretrain(config, ["fastbeit", "pretrain", "x.yaml"])
        return code, read_log(tmp_path / out)

    return train


def read_log(out: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "event" not in line}


def losses(log: dict[int, dict]) -> list[float]:
    return [log[step]["loss"] for step in sorted(log)]


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = resolve_checkpoint(a), resolve_checkpoint(b)
    torch.testing.assert_close(load_model(a), load_model(b), rtol=0, atol=0)
    torch.testing.assert_close(load_optimizer(a), load_optimizer(b), rtol=0, atol=0)


def test_it_learns_and_leaves_a_run_directory(train, tmp_path, capfd):
    code, log = train(optim__steps=30, data__val_index="", log__save_every=20)
    assert code == 0
    # random tokens of 32 words; a model that learns their frequencies alone gets below the start by more than this
    assert losses(log)[-1] < losses(log)[0] - 0.3
    assert {"loss", "masked_accuracy", "lr", "grad_norm", "images_per_s", "data_wait_share"} <= set(log[30])
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "log.jsonl", "checkpoints", "tensorboard"} <= found
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-000020", "step-000030"}
    assert "step-000030" in capfd.readouterr().out


def test_masks_that_hide_nothing_are_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ConfigError, match="100% of the first 256 masks hide no patch: blocks have 13 patches or more"):
        train(masking__num_masked=13, masking__min_block=13)
    assert not (tmp_path / "run").exists()


def test_few_hidden_patches_are_said(train, capfd):
    train(optim__steps=1, masking__num_masked=2, masking__min_block=1)
    assert "WARNING: only 12% of the patches are hidden, " in capfd.readouterr().err


def test_steps_without_a_label_are_said_and_stop_a_run(train, monkeypatch, capfd):
    monkeypatch.setattr("fastbeit.masking.try_rule", lambda rule: [])
    with pytest.raises(RunError, match="nothing to predict in the last 5 steps up to step 5: no label") as caught:
        train(optim__steps=9, masking__num_masked=13, masking__min_block=13)
    assert caught.value.exit_code == 1
    assert "WARNING: 1 step since the last line had nothing to predict" in capfd.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [{}, {"optim__name": "muon"}, {"engine__precision": "fp16"}, {"optim__ema_decay": 0.5}],
    ids=["adamw", "muon", "fp16", "average"],
)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(train, tmp_path, monkeypatch, overrides):
    """Step, samples, crops, masks, drop path, moments and learning rate all resume: bit by bit the same weights."""
    # in float16 so large that it is halved before the checkpoint, where a training usually has it after hours
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    _, whole = train("whole", optim__steps=6, log__save_every=4, **overrides)
    train("parts", optim__steps=6, log__save_every=4, **overrides)
    # what a kill after step 5 leaves: the checkpoint of step 4, and a line too many in the log
    checkpoints = tmp_path / "parts/checkpoints"
    (checkpoints / "step-000006").rename(tmp_path / "gone")
    _, resumed = train("parts", optim__steps=6, log__save_every=4, **overrides)
    assert losses(resumed) == losses(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    state = load_optimizer(resolve_checkpoint(tmp_path / "parts"))
    momentum = {name.removeprefix("momentum_buffer.") for name in state if name.startswith("momentum_buffer.")}
    assert ("blocks.0.attn.qkv.weight" in momentum) == ("optim__name" in overrides)
    assert ("loss_scale" in state and state["loss_scale"].item() <= 2**20) == ("engine__precision" in overrides)


def test_a_truncated_checkpoint_costs_the_steps_since_the_one_before(train, tmp_path, capfd):
    _, whole = train("whole", log__save_every=4)
    newest = tmp_path / "whole/checkpoints/step-000006/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    code, resumed = train("whole", log__save_every=4)
    assert code == 0 and losses(resumed) == losses(whole)
    assert "step-000006: model.safetensors has 1000 bytes" in capfd.readouterr().err


def test_micro_batches_change_nothing_but_rounding(train):
    _, whole = train("whole")
    for accumulate in (2, 4, 8):
        _, parts = train(f"parts-{accumulate}", optim__accumulate=accumulate)
        # fp32 sums in another order, over 6 steps of AdamW
        assert losses(parts) == pytest.approx(losses(whole), abs=1e-4) and losses(parts) != losses(whole)
    _, one = train("one", optim__accumulate=1)
    assert losses(one) == losses(whole)  # auto on a CPU


@pytest.mark.parametrize(
    "overrides",
    [
        {"objective": "pixels"},
        {"mask": "random"},
        {"mask": "none", "predict": "all"},
        {"predict": "all"},
        {"model__relative_position": "per_block"},
        {"model__relative_position": "none", "model__absolute_position": "true", "model__layer_scale": 0},
        {"data__image_size": "[32, 48]"},
        {"data__pipeline": "pillow"},
        {"data__pipeline": "dali"},
        {"optim__weight_decay": 0, "optim__clip_grad": 0},
        {"engine__precision": "bf16"},
        {"engine__precision": "fp16"},
        {"optim__name": "muon"},
        {"data__num_crops": 2},
    ],
    ids=str,
)
def test_every_choice_trains(train, overrides):
    code, log = train(**overrides, optim__steps=3)
    assert code == 0 and len(log) == 3
    assert all(line["loss"] > 0 and line["skipped_steps"] == 0 for line in log.values())


def test_a_loss_that_is_not_finite_stops_the_run_with_its_weights_whole(train, tmp_path):
    with pytest.raises(RunError, match="not finite in the last 5 steps"):
        train(optim__lr="1e30", optim__warmup_steps=0, optim__clip_grad=0, optim__steps=50, log__save_every=1)
    weights = load_model(resolve_checkpoint(tmp_path / "run"))
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_a_loss_scale_that_is_still_too_large_stops_no_run(train, monkeypatch):
    """It is halved in each step; once there is nothing left to halve, a gradient that is not finite does."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    code, log = train(engine__precision="fp16", optim__steps=7)
    assert code == 0 and (log[7]["skipped_steps"], log[7]["skipped_in_a_row"]) == (7, 0)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0)
    with pytest.raises(RunError, match="not finite in the last 5 steps up to step 8"):
        train("lost", engine__precision="fp16", optim__lr="1e30", optim__warmup_steps=0, optim__steps=50)


def test_a_run_with_averaged_weights_is_asked_for_them(train, tmp_path):
    """By what opens a finished run, and by whatever reads the weights of a model."""
    train(optim__ema_decay=0.5, optim__steps=3)
    weights = load_model(resolve_checkpoint(tmp_path / "run"))
    average = {name.removeprefix("average."): one for name, one in weights.items() if name.startswith("average.")}
    opened, read = open_run(tmp_path / "run").model.state_dict(), read_model(tmp_path / "run").tensors
    assert set(average) == set(opened) and "blocks.0.mlp.fc1.weight" in read
    for name in ("blocks.0.mlp.fc1.weight", "norm.weight"):
        assert torch.equal(opened[name], average[name]) and torch.equal(read[name], average[name])
        assert not torch.equal(weights[name], average[name])


def test_a_run_that_fails_ends_with_its_workers(parts, tmp_path):
    """A decoding process that outlived the loop would keep the command from ending."""
    settings = [f"{key}={value}" for key, value in parts.items() if key != "config"]
    settings += [f"out={tmp_path / 'run'}", "data.num_workers=1", "optim.steps=500", "optim.warmup_steps=0"]
    done = run("pretrain", parts["config"], *settings, "optim.lr=1e30", "optim.clip_grad=0")
    assert done.returncode == 1 and "not finite in the last 5 steps" in done.stderr and "Traceback" not in done.stderr


def test_an_out_of_another_run_is_refused(train, tmp_path):
    train()
    with pytest.raises(RunError, match="optim.lr was 0.01, now 0.02") as caught:
        train(optim__lr=0.02)
    assert caught.value.exit_code == 2
    with pytest.raises(RunError, match="optim.name was adamw, now muon"):
        train(optim__name="muon")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    with pytest.raises(RunError, match="not empty and holds no fastbeit run"):
        train("letters")


def test_another_tokenizer_is_refused(train, parts, tmp_path):
    train()
    with pytest.raises(RunError, match="another tokenizer") as caught:
        train(**{"tokenizer.path": make_tokenizer(tmp_path / "other", seed=1)})
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    "overrides, message, code",
    [
        ({"data.index": "nowhere.idx"}, "'nowhere.idx' does not exist; make it with `fastbeit index", 66),
        ({"data.val_index": "nowhere.idx"}, "'nowhere.idx' does not exist", 66),
        (
            {"tokenizer.path": "nowhere"},
            "'nowhere' does not exist; get OpenAI's with `fastbeit tokenizer fetch -o nowhere`, or",
            66,
        ),
        ({"data.index": ""}, "data.index is not set", 2),
        ({"data.tail": "drop", "optim.batch_size": 13}, "12", None),
        ({"engine.device": "cuda"}, "no CUDA device", 2),
    ],
    ids=str,
)
def test_what_cannot_run_says_so_first(train, overrides, message, code):
    if "engine.device" in overrides and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RunError, match=message) as caught:
        train(**overrides)
    assert code is None or caught.value.exit_code == code


def test_an_out_that_cannot_be_made_is_said(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written") as caught:
        train("file/run")
    assert caught.value.exit_code == 73


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves(parts, tmp_path, number):
    out = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in parts.items() if key != "config"]
    # so many steps that the signal comes in the middle on any machine
    settings += [f"out={out}", "optim.steps=1000000", "data.num_workers=1", "log.keep=9"]
    command = [sys.executable, "-m", "fastbeit", "pretrain", parts["config"], *settings]
    log, pipe = out / "log.jsonl", subprocess.PIPE
    with started(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        wait_until(process, lambda: log.exists() and '"loss"' in log.read_text())
        # to the whole group, decoding process and all, as a terminal and a scheduler do
        os.killpg(process.pid, number)
        if number == signal.SIGUSR1:
            # saves, and goes on
            wait_until(process, lambda: list((out / "checkpoints").glob("step-*")))
            size = log.stat().st_size
            wait_until(process, lambda: log.stat().st_size > size)
            os.killpg(process.pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, stderr
    assert resolve_checkpoint(out).name in stdout and "to go on: fastbeit pretrain" in stderr
    assert len(list((out / "checkpoints").iterdir())) == (2 if number == signal.SIGUSR1 else 1)


def test_a_worker_that_is_killed_costs_no_step(train, tmp_path, monkeypatch):
    """As one is where memory runs out."""
    draw = Plans.draw

    def draw_and_fall(plans, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(plans, step)

    monkeypatch.setattr(Plans, "draw", draw_and_fall)
    with pytest.raises(RunError, match="killed by signal 9.*last checkpoint: .*step-") as caught:
        train(data__num_workers=1, optim__steps=9)
    assert caught.value.exit_code == 1
    # two batches were made ahead of it
    assert sorted(read_log(tmp_path / "run"))[-1] >= 3


def test_a_stop_ends_a_look_after_the_checkpoint_and_it_is_made_up_for(train, parts, tmp_path, monkeypatch):
    def stopped(*args):
        signal.raise_signal(signal.SIGTERM)

    settings = {"optim__steps": 4, "data__val_index": parts["data.index"]}
    with monkeypatch.context() as patch:
        patch.setattr("fastbeit.evaluate.masked.visual_tokens", stopped)
        assert train(**settings)[0] == 75
    assert resolve_checkpoint(tmp_path / "run").name.endswith("4")
    log = tmp_path / "run/log.jsonl"
    assert "validation" not in log.read_text()
    assert train(**settings)[0] == 0
    assert "validation" in log.read_text()


@pytest.mark.parametrize("at", [2, 4])
def test_held_out_images_that_are_gone_cost_no_step(train, parts, tmp_path, monkeypatch, at):
    """Also where no checkpoint is due before they are looked at."""

    def gone(*args):
        raise DataError("the disk is gone")

    monkeypatch.setattr("fastbeit.evaluate.masked.visual_tokens", gone)
    settings = {"optim__steps": 4, "log__val_every": at, "data__val_index": parts["data.index"]}
    with pytest.raises(RunError, match="the disk is gone") as caught:
        train(**settings)
    assert caught.value.exit_code == 66
    assert resolve_checkpoint(tmp_path / "run").name == f"step-{at:06d}"


def test_a_dead_reader_costs_no_step(parts, tmp_path):
    """`fastbeit pretrain ... 2>&1 | head -1`"""
    settings = [f"{key}={value}" for key, value in parts.items() if key != "config"]
    command = [sys.executable, "-m", "fastbeit", "pretrain", parts["config"], *settings, f"out={tmp_path / 'run'}"]
    read, write = os.pipe()
    os.close(read)
    with started([*command, "optim.steps=4"], stdout=write, stderr=write) as process:
        assert process.wait(PATIENCE_S) == 0
    os.close(write)
    assert resolve_checkpoint(tmp_path / "run").name.endswith("4")


def test_a_profile_is_written_when_asked_for(train, tmp_path):
    """Also by a CUDA build of PyTorch that finds no driver, which crashes where it is asked for what there is."""
    train(profile="true", optim__steps=6)
    trace = json.loads((tmp_path / "run/profile.json").read_text())
    assert len(trace["traceEvents"]) > 100


def test_a_file_gone_bad_is_replaced_counted_and_named(train, parts, tmp_path):
    photos = make_photos(tmp_path / "photos")
    build_index(photos, tmp_path / "images.idx", progress=False)
    (photos / "03.jpg").write_bytes(b"")
    _, log = train(**{"data.index": tmp_path / "images.idx"}, optim__steps=6)
    assert log[6]["bad_samples"] == 1
    (line,) = (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    assert "03.jpg" in line


def test_a_disk_that_vanishes_stops_the_run_with_a_checkpoint(train, tmp_path, monkeypatch):
    photos, keep = make_photos(tmp_path / "photos"), fastbeit.jobs.pretrain.drop_path_keep
    build_index(photos, tmp_path / "images.idx", progress=False)
    options = {"data.index": tmp_path / "images.idx", "optim__steps": 8}
    _, whole = train("whole", **options)

    def vanish(seed, step, *rest):
        if step == 4:
            photos.rename(tmp_path / "unmounted")
        return keep(seed, step, *rest)

    monkeypatch.setattr("fastbeit.jobs.pretrain.drop_path_keep", vanish)
    with pytest.raises(RunError, match=r"photos' is gone, or not mounted; last checkpoint: .*step-000005$") as caught:
        train(**options)
    assert caught.value.exit_code == 66
    (tmp_path / "unmounted").rename(photos)
    monkeypatch.undo()
    _, resumed = train(**options)
    assert losses(resumed) == losses(whole)


def test_too_many_bad_files_stop_the_run_with_a_checkpoint(train, tmp_path, monkeypatch):
    photos, keep = make_photos(tmp_path / "photos"), fastbeit.jobs.pretrain.drop_path_keep
    build_index(photos, tmp_path / "images.idx", progress=False)
    monkeypatch.setattr("fastbeit.train.bad_samples.bad_limit", lambda num_images: 0)

    def damage(seed, step, *rest):
        if step == 3:
            (photos / "03.jpg").write_bytes(b"")
        return keep(seed, step, *rest)

    monkeypatch.setattr("fastbeit.jobs.pretrain.drop_path_keep", damage)
    with pytest.raises(RunError, match=r"1 bad images, more than .*bad_samples.jsonl.*checkpoint: .*step") as caught:
        train(**{"data.index": tmp_path / "images.idx"}, optim__steps=50)
    assert caught.value.exit_code == 65
    assert resolve_checkpoint(tmp_path / "run").name in str(caught.value)


@pytest.mark.skipif(not INTERPRETED, reason="sees the launches of interpreted kernels")
def test_triton_and_reference_train_alike(train, monkeypatch):
    """Embedding, masks and loss by the interpreted kernels."""
    from triton.runtime.interpreter import GridExecutor

    launched, launch = set(), GridExecutor.__call__

    def noted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    options = {"optim__steps": 20, "optim__batch_size": 2, "optim__lr": 1e-3}
    _, reference = train("reference", kernels__backend="reference", **options)
    assert not launched
    _, triton = train("triton", kernels__backend="triton", kernels__attention="triton", **options)
    assert {"_masked_embed_fwd_kernel", "_block_masks_kernel", "_cross_entropy_fwd_kernel"} <= launched
    assert {"_relative_attention_fwd_kernel", "_relative_attention_bwd_queries_kernel"} <= launched
    # sums in another order: 1e-7 of a loss near 4 at first, and 20 updates that follow from it
    assert len(triton) == 20 and losses(triton) == pytest.approx(losses(reference), abs=1e-5, rel=0)


def test_a_backend_that_cannot_run_is_said_before_anything_starts(train, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbeit_kernels.backend.INTERPRETED", False)
    for key in "backend", "loss", "attention":
        with pytest.raises(RunError, match=f"kernels.{key}=triton: .* wants tensors on cuda; got cpu") as err:
            train(**{f"kernels__{key}": "triton"}, engine__device="cpu")
        assert err.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_a_look_that_a_kill_took_is_made_up_for(train, parts, tmp_path):
    """A checkpoint is saved before it is looked at; what was not looked at then is, when the run goes on."""
    settings = {"optim__steps": 4, "log__save_every": 2, "log__val_every": 2, "data__val_index": parts["data.index"]}
    train(**settings)
    log = tmp_path / "run/log.jsonl"

    def looks() -> list[dict]:
        events = [json.loads(line) for line in log.read_text().splitlines() if "validation" in line]
        return [{name: value for name, value in event.items() if name != "seconds"} for event in events]

    whole = looks()
    assert [look["step"] for look in whole] == [2, 4]
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if not ("validation" in line and '"step": 4' in line)))
    assert looks() == whole[:1]
    for _ in range(2):
        train(**settings)
        assert looks() == whole


@pytest.mark.skipif(not INTERPRETED, reason="interprets a kernel")
def test_each_op_has_its_own_kernel_or_the_one_of_all(train, capfd):
    train(kernels__masks="triton", optim__steps=1, optim__batch_size=2)
    said = capfd.readouterr().err
    assert "kernels: attention sdpa, masked_embed reference, loss reference, masks triton" in said
    assert "attention: sdpa (on cpu)" in said
    config = KernelsConfig(backend="triton", loss="reference")
    assert config.by_op == Kernels(attention="auto", masked_embed="triton", loss="reference", masks="triton")
