"""`benchmarks.step` as far as it runs without a card: a toy model, alone and on two ranks, and what is counted."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.step import __main__ as step
from benchmarks.step import counts, rates, training, warm
from benchmarks.step.variants import DEFAULT, VARIANTS, Case, config_of
from fastbeit.engine import cards
from helpers.ranks import deepspeed, launched, torchrun

ROOT = Path(__file__).parents[2]
TOY = "--device", "cpu", "--size", "B", "--steps", "2", "--batch", "2"


def aot_eager(self: nn.Module, **options: Any) -> None:
    self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)


def rows_of(file: Path, *args: str, code: int = 0) -> list[dict]:
    assert step.main([*TOY, *args, "--json", str(file)]) == code
    return json.loads(file.read_text())["rows"]


# PyTorch 2.13 says so of its own tracing of an autograd.Function
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_steps_of_a_toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All variants, with the trainer's parts and the interpreter, without the code generation of `inductor`."""
    monkeypatch.setattr(nn.Module, "compile", aot_eager)
    monkeypatch.setattr(training, "WARM_UP", 0)
    rows = rows_of(tmp_path / "rows.json", "--variants", "all")
    assert [row["variant"] for row in rows] == list(VARIANTS)
    for row in rows:
        assert row["p95_ms"] >= row["step_ms"] > 0 and row["first_step_s"] > 0
        assert row["attention"] == ("triton" if row["variant"].startswith("triton") else "sdpa")
        assert row.get("sdpa", "TOLD").isupper() and ("sdpa" in row) == (row["attention"] == "sdpa")
        assert row["images_per_s"] == row["all_images_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert row["tflop_per_s"] == pytest.approx(row["images_per_s"] * row["gflop_per_image"] / 1e3)
        assert row["engine"] == "single" and row["ranks"] == 1 and row["precision"] == "float32"
        # no card, no share of its peak
        assert "mfu" not in row and "peak_mib" not in row
        # random labels: log 8192 is 9.01; the same weights, batches and masks whoever computes
        assert row["loss"] == pytest.approx(9.01, abs=0.05) and row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)


def test_the_trainers_default_comes_first():
    first, second, third = (VARIANTS[name] for name in DEFAULT)
    assert first.kernels == second.kernels == "triton" and first.compiled and second.compiled
    assert (first.attention, second.attention) == ("triton", "sdpa")
    assert third.kernels == "reference" and not third.compiled
    ops = Case("B", second, 256).config.kernels.by_op
    assert (ops.attention, ops.loss, ops.masked_embed, ops.masks) == ("sdpa", "triton", "triton", "triton")


@pytest.mark.parametrize("source", ["tokens", "jpeg", "jpeg-tokens"])
def test_sources(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The toy's images of 32 pixels out of JPEG files of 500 x 375, and views for a narrow dVAE."""
    monkeypatch.setattr(training, "WARM_UP", 0)
    settings = ("--set", "data.num_workers=0") if source.startswith("jpeg") else ()
    (row,) = rows_of(tmp_path / "rows.json", "--variants", "reference", "--source", source, *settings)
    assert row["source"] == source and 0 <= row["data_wait_share"] < 1 and row["images_per_s"] > 0
    # in this process every image is decoded while the step waits
    assert (row["data_wait_share"] > 0.05) == source.startswith("jpeg")
    # words of random weights are no more even than they are, so that the loss is only near log V
    assert row["loss"] == pytest.approx(9.01, abs=0.3)


def test_the_first_step_alone(tmp_path: Path):
    """What a second process does to see how a warm start goes."""
    (row,) = rows_of(tmp_path / "rows.json", "--variants", "reference", "--steps", "1")
    assert row["first_step_s"] > 0 and "step_ms" not in row


def test_a_warm_start_is_that_of_another_process():
    case = Case("B", VARIANTS["reference"], 2, device="cpu")
    assert warm.warm_start(case)["warm_start_s"] > 0
    wrong = replace(case, settings=("model.depht=3",))
    assert "depth" in warm.warm_start(wrong)["no_warm_start"]


def test_caches_are_empty_and_go(monkeypatch: pytest.MonkeyPatch):
    """A folder that somebody has set is theirs, and so is what it holds."""
    inductor, triton = warm.CACHES
    monkeypatch.setenv(inductor, "theirs")
    monkeypatch.delenv(triton, raising=False)
    with warm.empty_caches():
        assert os.environ[inductor] == "theirs" and not Path(os.environ[triton]).exists()
    assert os.environ[inductor] == "theirs" and triton not in os.environ


def test_settings_are_the_trainers(tmp_path: Path):
    (row,) = rows_of(tmp_path / "rows.json", "--variants", "reference", "--set", "model.depht=3", code=1)
    assert "depth" in row["error"]
    with pytest.raises(SystemExit):
        step.main(["--sise", "B"])


def test_a_batch_that_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_room(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "measure", no_room)
    rows = rows_of(tmp_path / "rows.json", "--batch", "64", code=1)
    assert len(rows) == len(DEFAULT) and all("a batch of 64 does not fit" in row["error"] for row in rows)
    assert all("try --batch 32" in row["error"] for row in rows)


# 80 GB: BEiT's own batch; 24 GB: what fits, in eights; next to nothing: one image
@pytest.mark.parametrize(
    "size, free, batch",
    [("B", 79 * 2**30, 256), ("B", 23 * 2**30, 184), ("B", 2**20, 1), ("L", 79 * 2**30, 128), ("L", 23 * 2**30, 64)],
)
def test_the_batch_fits_the_free_memory(size: str, free: int, batch: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
    assert step.fitting_batch(size) == batch


# ---- work


# the last block's projection and MLP, 9 D^2 products of a token, for 122 tokens of 197 make the difference
@pytest.mark.parametrize("size, ours, authors", [("B", 104.1, 108.0), ("L", 365.9, 372.8)])
def test_flops_are_those_that_are_stated(size: str, ours: float, authors: float):
    config = config_of(size, [])
    found = rates.model_flops(config) / 1e9, rates.model_flops(config, authors=True) / 1e9
    assert found == (pytest.approx(ours, abs=0.05), pytest.approx(authors, abs=0.05))


@pytest.mark.parametrize(
    "gpu, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_an_unknown_card_has_no_mfu(gpu: str, peak: float | None):
    assert cards.peak_of(gpu) == peak


# what PyTorch's own code dispatches for an op may change by a few with its version; bytes that are kept do not
@pytest.mark.skipif(torch.cuda.is_available(), reason="would take steps")
def test_without_a_card_it_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "rows.json"
    assert step.main(["--size", "B", "--json", str(file)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    work, triton, plain, host = json.loads(file.read_text())["rows"]
    assert (work["gflop_per_image"], work["gflop_per_image_authors"]) == pytest.approx((104.09, 107.98), abs=0.01)
    assert work["mfu_uses"] == "gflop_per_image" and work["batch"] == 128
    assert (work["predicted_ms_H100"], work["predicted_ms_A100"]) == pytest.approx((33.4, 78.9), abs=0.1)
    for row, operations, saved, read, written in ((triton, 1025, 8830.3, 434, 255), (plain, 1153, 8876.4, 467, 294)):
        assert row["operations"] == pytest.approx(operations, rel=0.03)
        assert row["saved_mib"] == pytest.approx(saved, abs=0.1)
        assert row["read_mb_per_image"] == pytest.approx(read, rel=0.02)
        assert row["written_mb_per_image"] == pytest.approx(written, rel=0.02)
    assert host["cpu_ms"] > 1


def test_operations_and_their_bytes():
    """By hand: a product, a sum in place, a view; what is expanded is read once."""
    a, b, row = torch.ones(4, 8), torch.ones(8, 2), torch.ones(1, 2)
    with counts.Operations() as found:
        c = a @ b
        c.add_(row.expand(4, 2))
        c.view(8)
    assert (found.number, found.read, found.written) == (2, 4 * (32 + 16 + 8 + 2), 4 * (8 + 8))


# ---- several ranks


@pytest.mark.parametrize("engine, launcher", [("ddp", torchrun), ("deepspeed", deepspeed)])
def test_two_ranks(engine: str, launcher: Callable[[], list[str]], tmp_path: Path):
    """Both take their steps, on halves of a batch; one prints and writes."""
    file = tmp_path / "rows.json"
    command = [*launcher(), "benchmarks.step", *TOY, "--variants", "reference", "--json", str(file)]
    done = launched(command, cwd=ROOT)
    assert done.stdout.count("B, reference kernels, eager, batch of 2, 2 ranks") == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["engine"], row["ranks"], row["batch"]) == (engine, 2, 2)
    assert row["all_images_per_s"] == pytest.approx(2 * row["images_per_s"]) == pytest.approx(4e3 / row["step_ms"])
    assert row["loss"] == pytest.approx(9.01, abs=0.05)
