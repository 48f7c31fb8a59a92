"""The questions of `benchmarks.first_hour`, asked of the interpreter at small shapes: they are fit for a card."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.first_hour import __main__ as first_hour
from benchmarks.first_hour import attention
from benchmarks.first_hour.bench import Bench, case
from benchmarks.kernels.ops import Shapes
from benchmarks.results import Row
from fastbeit_kernels.backend import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is asked by the command itself")

# cases that PyTorch has no CPU implementation of
NOT_ON_A_CPU = (
    "EFFICIENT_ATTENTION",
    "CUDNN_ATTENTION",
    "FLASH_ATTENTION, bias with gradient",
    "grad_weight, added in float32",
    "grad_weight, float32",
    "ones @ logits",
)
# the cases that a question has at these shapes: one number of rows a chunk, one of images in the workspace
NUM_CASES = dict(sdpa=36, attention=12, linear_cross_entropy=11, cross_entropy=22, masked_embed=10, host=2)


def once(work: Callable[[], object]) -> float:
    work()
    return 50.0


@pytest.fixture
def bench() -> Bench:
    # 4 images, so that a workspace of 3 is ragged; 8 rows of 100 words; heads of 64
    shapes = Shapes(B=4, grid=4, M=2, D=128, V=100, P=8)
    compiler = partial(torch.compile, fullgraph=True, backend="aot_eager")
    return Bench("cpu", shapes, once, lambda work: 7.0, compiler, warm_up=0, rounds=1)


@pytest.mark.parametrize("name", first_hour.QUESTIONS)
def test_every_question_has_answers(name: str, bench: Bench, tmp_path: Path):
    rows = first_hour.ask([name], bench, dict(gpu="none"), tmp_path / "rows.json")
    assert len(rows) == NUM_CASES[name]
    for row in rows:
        assert row["question"] == name and "wrong" not in row, row
        if any(word in row["case"] for word in NOT_ON_A_CPU) and "chosen" not in row["case"]:
            assert "us" not in row and row["error"], row
        elif "chosen" in row["case"]:
            assert row["sdpa"].isupper(), row
        else:
            assert row["us"] == 50 and row["peak_mib"] == 7 and row["host_us"] > 0, row
    assert not first_hour.failed(rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == dict(gpu="none", rows=rows)


def test_rates_are_the_least_work_over_the_time(bench: Bench):
    rows = {row["case"]: row for row in attention.sdpa(bench)}
    B, H, S, K = 4, 2, 17, 64
    flops = B * H * S**2 * K
    assert rows["MATH, no bias, forward"]["tflop_per_s"] == pytest.approx(4 * flops / 50e-6 / 1e12)
    assert rows["MATH, no bias, both"]["tflop_per_s"] == pytest.approx(14 * flops / 50e-6 / 1e12)


@pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "cross_entropy", "masked_embed"])
def test_what_is_wrong_is_not_timed(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Every kernel of ours that is timed has a gate before it: here all kernels write nothing."""
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *args, **kwargs: None)
    rows = first_hour.ask([name], bench, {}, None)
    assert first_hour.failed(rows)
    ours = ("forward", "backward", "rows a chunk, bias", "warps", "tiles")
    found = [row for row in rows if any(word in row["case"] for word in ours)]
    assert found and all("wrong" in row and "us" not in row for row in found)


@pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "cross_entropy", "masked_embed"])
def test_launches_name_arguments_and_options_that_exist(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The interpreter passes over a name that it does not know; a card refuses it."""
    from triton.backends.nvidia.compiler import CUDAOptions

    launched: list[str] = []

    def check(executor: Any, *args: Any, **options: Any) -> None:
        unknown = set(options) - set(executor.arg_names) - {option.name for option in fields(CUDAOptions)}
        launched.append(executor.fn.__name__)
        assert not args and not unknown, f"{executor.fn.__name__}: {unknown}"

    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", check)
    rows = list(first_hour.QUESTIONS[name](replace(bench, shapes=replace(bench.shapes, B=1))))
    assert launched and not any("AssertionError" in row.get("error", "") for row in rows), rows


def test_an_error_is_a_row_and_the_next_question_is_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def broken(_: Bench):
        """Which way?"""
        yield dict(case="fine", us=1.0)
        raise RuntimeError("no memory\nand a long trace")

    def fails() -> None:
        raise ValueError("too large a tile")

    def next_one(bench: Bench):
        """Which other way?"""
        yield case(bench, "bad", fails)
        yield case(bench, "good", lambda: None)

    monkeypatch.setattr(first_hour, "QUESTIONS", dict(broken=broken, next=next_one))
    file = tmp_path / "rows.json"
    rows = first_hour.ask(["broken", "next"], bench, {}, file)
    assert [row["case"] for row in rows] == ["fine", "the question", "bad", "good"]
    assert rows[1]["error"] == "RuntimeError: no memory" and rows[2]["error"] == "ValueError: too large a tile"
    assert not first_hour.failed(rows) and json.loads(file.read_text())["rows"] == rows
    assert "too large a tile" in capsys.readouterr().out
    # time runs out after the first case: the others are not begun
    rows = first_hour.ask(["next"], bench, {}, file, seconds=-1)
    assert [row["case"] for row in rows] == ["bad"] and first_hour.failed(rows)


def test_the_file_holds_what_there_is_when_it_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupted(_: Bench):
        """Which way?"""
        yield dict(case="fine", us=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(first_hour, "QUESTIONS", dict(interrupted=interrupted))
    with pytest.raises(KeyboardInterrupt):
        first_hour.ask(["interrupted"], bench, {}, tmp_path / "rows.json")
    rows: list[Row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows == [dict(question="interrupted", case="fine", us=1.0)]


def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert first_hour.main([]) == 2 and "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        first_hour.main(["sdpa", "weather"])
    assert "no question weather" in capsys.readouterr().err
