"""Several ranks, through the real launchers: what they compute is what one process computes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbeit.train.checkpoint import load_model, load_optimizer, resolve_checkpoint
from fastbeit.train.ema import PREFIX
from helpers.ranks import deepspeed, launched, torchrun
from helpers.tiny import make_parts, write_config


def single_process() -> list[str]:
    return [sys.executable, "-m"]


def one_by_torchrun() -> list[str]:
    return torchrun(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def run(folder):
    config = write_config(folder / "tiny.yaml")
    parts = [f"{key}={value}" for key, value in make_parts(folder).items()]
    parts += [f"data.val_index={folder / 'images.idx'}", "log.val_every=5", "optim.ema_decay=0.9"]

    def run(out: str, launcher: Callable[[], list[str]], *overrides: str) -> Path:
        launched([*launcher(), "fastbeit", "pretrain", str(config), *parts, f"out={folder / out}", *overrides])
        return folder / out

    return run


def figures(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "event" not in line]


def losses(out: Path) -> list[float]:
    return figures(out, "loss")


def looks(out: Path) -> dict[int, float]:
    """Held-out losses by step, of the averaged weights."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line.get("event") == "validation"}


@pytest.fixture(scope="module")
def single(run) -> Path:
    return run("single", single_process, "optim.steps=10", "log.save_every=5")


@pytest.mark.parametrize(
    "launcher, overrides",
    [
        pytest.param(deepspeed, ["engine.name=deepspeed"], id="zero1", marks=pytest.mark.long),
        pytest.param(
            deepspeed,
            ["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload=optimizer", "optim.accumulate=2"],
            id="zero2-offload-accumulate",
            marks=pytest.mark.long,
        ),
        pytest.param(
            one_by_torchrun,
            ["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload=optimizer"],
            id="zero2-offload-alone",
            marks=pytest.mark.long,
        ),
        pytest.param(
            deepspeed,
            ["engine.name=deepspeed", "engine.zero_stage=2", "engine.compile=on"],
            id="zero2-compiled",
            marks=pytest.mark.long,
        ),
        pytest.param(deepspeed, ["engine.name=deepspeed", "engine.zero_stage=3"], id="zero3", marks=pytest.mark.long),
        pytest.param(torchrun, ["engine.name=ddp", "optim.accumulate=2"], id="ddp-accumulate"),
        pytest.param(torchrun, ["engine.name=ddp", "engine.compile=on"], id="ddp-compiled", marks=pytest.mark.long),
        pytest.param(
            deepspeed, ["engine.name=deepspeed", "engine.compile=on"], id="zero1-compiled", marks=pytest.mark.long
        ),
    ],
)
def test_ranks_train_as_one(run, single, launcher, overrides, tmp_path):
    """Loss of each of 10 steps, then a resume in the middle, then the weights and moments at the end."""
    name = "-".join([launcher.__name__, *overrides])
    out = run(name, launcher, "optim.steps=10", "log.save_every=5", *overrides)
    # fp32 sums in another order over 10 steps of AdamW at a large learning rate
    assert losses(out) == pytest.approx(losses(single), abs=1e-4)
    assert looks(out) == pytest.approx(looks(single), abs=1e-4)
    whole = resolve_checkpoint(out)
    (out / "checkpoints" / "step-000010").rename(tmp_path / "step-000010")
    # recomputed activations are the same bits
    again = [*overrides, "engine.checkpoint_blocks=true"]
    resumed = run(name, launcher, "optim.steps=10", "log.save_every=5", *again)
    assert losses(resumed) == pytest.approx(losses(single), abs=1e-4)
    for load in (load_model, load_optimizer):
        # the same ranks and the same order of sums: the same bits
        torch.testing.assert_close(load(resolve_checkpoint(out)), load(tmp_path / whole.name), rtol=0, atol=0)
        torch.testing.assert_close(load(resolve_checkpoint(out)), load(resolve_checkpoint(single)), rtol=0, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("stage, offload", [(2, "optimizer"), (3, "weights")])
def test_deepspeeds_adamw_trains_as_pytorchs_does(run, stage, offload):
    """Its operator is compiled at first, for some minutes."""
    overrides = [f"engine.zero_stage={stage}", f"engine.offload={offload}", "optim.name=ds_cpu_adam"]
    for steps in (5, 10):
        # it multiplies up the powers of its decay rates, and computes them anew after a resume: to rounding
        schedule = [f"optim.steps={steps}", "log.save_every=5"]
        out = run(f"cpu-adam-{stage}", deepspeed, "engine.name=deepspeed", *schedule, *overrides)
    whole = run(f"cpu-adam-{stage}-one", single_process, "optim.steps=5", "log.save_every=5")
    assert losses(out)[:5] == pytest.approx(losses(whole), abs=1e-4)
    run(f"cpu-adam-{stage}-one", single_process, "optim.steps=10", "log.save_every=5")
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)


def test_deepspeed_runs_without_a_launcher(run, single):
    """As on one GPU that has too little memory for a model."""
    overrides = ["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload=optimizer", "optim.steps=10"]
    out = run("alone", single_process, *overrides, "log.save_every=5")
    assert losses(out) == pytest.approx(losses(single), abs=1e-4)
    # of a run that goes on without DeepSpeed nothing says otherwise
    assert (out / "deepspeed.json").is_file()
    run("alone", single_process, "optim.steps=11", "log.save_every=5")
    assert not (out / "deepspeed.json").exists()


def test_a_checkpoint_goes_on_under_any_engine(run, single):
    """Whole tensors by name, whatever the engine: DDP's goes on under ZeRO-3, then ZeRO-1, then in one process."""

    def part(launcher: Callable[[], list[str]], *overrides: str) -> Path:
        return run("handover", launcher, "optim.steps=10", "log.save_every=3", "log.keep=9", *overrides)

    def back_to(out: Path, step: int) -> None:
        for path in (out / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)

    out = part(torchrun, "engine.name=ddp")
    back_to(out, 3)
    part(deepspeed, "engine.name=deepspeed", "engine.zero_stage=3", "engine.offload=weights")
    back_to(out, 6)
    part(deepspeed, "engine.name=deepspeed", "engine.zero_stage=1")
    configuration = json.loads((out / "deepspeed.json").read_text())
    assert configuration["zero_optimization"]["stage"] == 1 and configuration["gradient_clipping"] == 3.0
    back_to(out, 9)
    part(single_process)
    # what a part did again is logged once: steps 1 to 3 are DDP's, 4 to 6 ZeRO-3's, 7 to 9 ZeRO-1's
    assert losses(out) == pytest.approx(losses(single), abs=1e-4)
    assert looks(out) == pytest.approx(looks(single), abs=1e-4)
    found, wanted = (load_model(resolve_checkpoint(one)) for one in (out, single))
    assert any(name.startswith(PREFIX) for name in wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "launcher, overrides",
    [
        pytest.param(torchrun, [], id="ddp"),
        pytest.param(deepspeed, ["engine.name=deepspeed", "engine.zero_stage=1"], id="zero1", marks=pytest.mark.long),
        pytest.param(deepspeed, ["engine.name=deepspeed", "engine.zero_stage=3"], id="zero3", marks=pytest.mark.long),
    ],
)
def test_two_ranks_train_a_tokenizer_as_one(run, single, folder, tmp_path, launcher, overrides):
    """Noise is drawn for the global batch, the entropy of the words is that of all ranks, the start is rank 0's."""
    settings = ["data.image_size=32", "data.num_workers=0", "model.n_hid=8", "model.n_init=16", "model.vocab_size=24"]
    # slowly: at a usual rate rounding soon turns a word that was drawn, and with it the loss
    settings += ["optim.batch_size=8", "optim.steps=10", "optim.lr=1e-5", "log.every=1", "engine.device=cpu"]
    command = ["tokenizer", "train", "--data", str(folder / "images.idx"), *settings]
    launched([*single_process(), "fastbeit", *command, "-o", str(tmp_path / "dvae-one")])
    launched([*launcher(), "fastbeit", *command, *overrides, "-o", str(tmp_path / "dvae-two")])
    (one, one_norms), (two, two_norms) = (
        [figures(tmp_path / name, key) for key in ("loss", "grad_norm")] for name in ("dvae-one", "dvae-two")
    )
    # three seeds differed by at most 4e-7; the entropy of one rank's words alone would be off by 1e-2
    assert len(one) == 10 and two == pytest.approx(one, abs=1e-5)
    # these by 3e-4, where the gradient is large; without the entropy's gradient they are off by more than half
    assert two_norms == pytest.approx(one_norms, rel=1e-2)
    # the averaged weights, which are kept
    kept = [load_file(tmp_path / name / "dvae.safetensors") for name in ("dvae-one", "dvae-two")]
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=1e-4)
