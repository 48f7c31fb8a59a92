"""`benchmarks.kernels` as far as it runs without a GPU: what it refuses, how it times and what it predicts."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.card import environment
from benchmarks.kernels.__main__ import (
    WARM_UP,
    Bench,
    faults,
    inputs_of,
    main,
    measure,
    medians,
    print_rows,
    turns_of,
)
from benchmarks.kernels.compiled import Compiled
from benchmarks.kernels.moved import Moved
from benchmarks.kernels.ops import Op, Shapes, cross_entropy_op, left_out, ops
from benchmarks.kernels.predict import occupancy, predicted_us
from benchmarks.predictions import A100, H100, KERNELS_US
from fastbeit_kernels.backend import INTERPRETED
from helpers.waiting import finished

TINY = Shapes(B=2, grid=4, M=6, D=48, V=100, P=8)
IDLE: dict[str, Any] = {"copy": lambda _: lambda: None, "product": lambda _: lambda: None}


def bench(device: str, clock: Callable[[Callable[[], object]], float], l2_bytes: int = 2**14) -> Bench:
    return Bench(device, l2_bytes, IDLE, clock, peak_mib=lambda work: 7.0)


@pytest.mark.parametrize("i", range(4))
def test_every_contestant_is_right(device: str, i: int):
    op = ops(TINY)[i]
    contestants = op.contestants
    if op.differentiable:
        compiled = torch.compile(contestants["eager"], fullgraph=True, backend="aot_eager")
        contestants = contestants | dict(compile=compiled)
    assert len(contestants) >= 3 and faults(op, contestants, device) == {}


def with_ours(op: Op, change: Callable[[Tensor, Tensor], Any]) -> Op:
    return replace(op, contestants=op.contestants | dict(ours=lambda **inputs: change(*op.exact(**inputs))))


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda loss, num_correct: (loss + 0.01 * loss.detach(), num_correct), "output 0 errs by 1.0e-02"),
        (lambda loss, num_correct: (loss, num_correct + 1), "output 1 errs"),
        (lambda loss, num_correct: (2 * loss - loss.detach(), num_correct), "grad_logits errs by 1.0e"),
        (lambda loss, num_correct: (loss * float("nan"), num_correct), "errs by nan"),
    ],
    ids=["loss", "count", "gradient", "nan"],
)
def test_what_is_wrong_is_not_timed(device: str, change: Callable, fault: str, capsys: pytest.CaptureFixture[str]):
    op = with_ours(cross_entropy_op(TINY, "triton"), change)
    (row,) = measure(op, op.contestants, bench(device, clock=lambda work: pytest.fail("was timed")), rounds=3)
    assert row["who"] == "ours" and "us" not in row and fault in row["wrong"]
    print_rows([row])
    assert fault in capsys.readouterr().out


def test_rates_are_the_least_work_over_the_time(device: str, capsys: pytest.CaptureFixture[str]):
    def clock(work: Callable[[], object]) -> float:
        work()
        return 50.0

    found = {op.name: measure(op, op.contestants, bench(device, clock), rounds=2)[0] for op in ops(TINY)}
    assert all(row["us"] == 50 and row["peak_mib"] == 7 for row in found.values())
    R, D, V = 12, 48, 100
    assert found["cross_entropy"]["gb_per_s"] == pytest.approx(2 * R * V * 2 / 50e-6 / 1e9)
    assert found["cross_entropy"]["percent_of_copy"] == pytest.approx(100 * 2 * R * V * 2 / 2**30)
    assert found["linear_cross_entropy"]["tflop_per_s"] == pytest.approx(3 * 2 * R * D * V / 50e-6 / 1e12)
    assert found["linear_cross_entropy"]["percent_of_product"] == pytest.approx(100 * 6 * R * D * V / (2 * 8192**3))
    # 16 patches, 10 of them visible, and 17 tokens an image
    assert found["masked_embed"]["gb_per_s"] == pytest.approx(2 * (2 * 10 * 192 + 2 * 17 * 48 * 2) / 50e-6 / 1e9)
    print_rows(list(found.values()))
    out = capsys.readouterr().out
    assert "% of a copy" in out and "% of a product" in out and "7.0 MiB" in out


def test_contestants_take_turns():
    taken: list[tuple[str, int]] = []

    def turn(who: str, number: int) -> Callable[[], object]:
        return lambda: taken.append((who, number))

    def clock(work: Callable[[], object]) -> float:
        work()
        return float(len(taken)) if taken[-1][0] == "a" else 5.0

    us = medians({who: partial(turn, who) for who in "abc"}, clock, rounds=3)
    assert [number for _, number in taken] == list(range(3 * (WARM_UP + 3)))
    rounds = ["".join(who for who, _ in taken[i : i + 3]) for i in range(0, len(taken), 3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 1
    at = [1 + i for i, (who, _) in enumerate(taken) if who == "a"][WARM_UP:]
    assert us == {"a": at[1], "b": 5, "c": 5}


def test_inputs_take_turns_and_are_put_back(device: str):
    """A contestant that computes in place, as Liger's does, leaves nothing to the next."""
    op = cross_entropy_op(TINY, "triton")
    seen: list[Tensor] = []

    def in_place(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        loss, _ = op.exact(logits, labels)
        logits.detach().zero_()
        return loss.detach() + 0 * logits.sum()

    logits_bytes = TINY.R * TINY.V * 2
    turn = turns_of(op, dict(liger=in_place), bench(device, clock=lambda work: 0, l2_bytes=2 * logits_bytes))["liger"]
    for number in range(14):
        turn(number)()
    originals = [inputs_of(op, device, seed)["logits"] for seed in range(20)]
    orders = [next(i for i, x in enumerate(originals) if torch.equal(x, found)) for found in seen]
    assert orders[:5] == [0, 1, 2, 3, 4] and max(orders) >= 4 and orders.count(0) > 1


def test_without_a_gpu_it_says_so(tmp_path: Path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= dict(CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(tmp_path / "rows.json")]
    run = finished(command, env=env)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "--predict" in run.stderr
    assert not run.stdout and not list(tmp_path.iterdir())


@pytest.mark.skipif(not INTERPRETED, reason="asks for the refusal of interpreted kernels")
def test_interpreted_kernels_are_neither_timed_nor_predicted(capsys: pytest.CaptureFixture[str]):
    for argv in ([], ["--predict"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_numbers_name_what_they_belong_to():
    where = json.loads(json.dumps(environment()))
    assert {*where} == {"gpu", "driver", "clocks", "cuda", "cudnn", "nccl", "cores", "versions", "commit"}
    assert where["versions"]["torch"] == torch.__version__
    assert (where["gpu"] is not None) == torch.cuda.is_available()


def code(registers: int, shared: int = 32, wide_loads: int = 4, narrow_loads: int = 0) -> Compiled:
    return Compiled(registers, 0, 0, shared, wide_loads, narrow_loads, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "chip, out, num_warps, blocks",
    [
        # 120 registers * 256 threads = 30,720 of 65,536
        (H100, code(118), 8, 2),
        # Liger's cross-entropy, 8 and 32 warps: facts of Triton 3.7.1
        (H100, code(48), 8, 5),
        (H100, code(31), 32, 2),
        # 2048 threads; 32 blocks
        (A100, code(16), 8, 8),
        (A100, code(16), 1, 32),
        # 64 KB and the system's 1 KB, of 164 and of 228
        (A100, code(16, shared=64 * 1024), 4, 2),
        (H100, code(16, shared=64 * 1024), 4, 3),
    ],
)
def test_occupancy(chip: Any, out: Compiled, num_warps: int, blocks: int):
    found = occupancy(chip, out, num_warps)
    assert found == (blocks, blocks * num_warps, blocks * num_warps * 32 * 4 * 16)
    assert occupancy(chip, out._replace(narrow_loads=1), num_warps).bytes_in_flight > found.bytes_in_flight


def test_prediction_is_the_slowest_bound():
    moved = Moved("kernel", "all", 10**9, 3 * 10**9, 10**9, scale=1, fixed=0)
    enough = 12_000  # 3 TB/s * 500 ns / 132 = 11,364
    assert predicted_us(H100, moved, 0, enough) == (pytest.approx(1000), "memory")
    assert predicted_us(H100, moved, 0, 5682) == (pytest.approx(2000, rel=1e-3), "memory")  # half of it: half as fast
    assert predicted_us(H100, moved, 1.3e12, enough) == (pytest.approx(2000), "products")
    asked = moved._replace(requested=10**10)
    assert predicted_us(H100, asked, 0, enough) == (pytest.approx(1e16 / H100.l2), "L2")


def test_traffic_of_a_run_scales_what_grows():
    moved = Moved("kernel", "all", minimum=110, unique=120, requested=300, scale=4, fixed=10).in_a_run()
    assert (moved.minimum, moved.unique, moved.requested, moved.scale) == (410, 450, 1200, 1)
    assert moved.in_a_run() == moved


@pytest.mark.long
def test_predictions(tmp_path: Path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= dict(TRITON_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--predict", "--json", str(file)]
    run = finished(command, env=env)
    assert run.returncode == 0, run.stderr
    assert "predicted, not measured" in run.stdout
    found = json.loads(file.read_text())
    rows = {(row["chip"], row["kernel"]): row for row in found["rows"]}
    assert found["predicted"] is True and {chip for chip, _ in rows} == {"A100", "H100"}
    # 2 * 19,200 * 8192 bf16 values at 3.0 and 1.75 TB/s
    for chip, us in (("H100", 210), ("A100", 360)):
        row = rows[chip, "_cross_entropy_fwd_kernel"]
        assert row["predicted_us"] == pytest.approx(us, rel=0.05) and row["blocks"] == 2
        assert row["over_minimum"] == pytest.approx(1, abs=0.1)
    # what `make gpu` compares with
    for (question, _), kept in KERNELS_US.items():
        for chip, us in kept.items():
            kernels = f"_{question}_fwd_kernel", f"{question} (op)"
            (row,) = (rows[chip, kernel] for kernel in kernels if (chip, kernel) in rows)
            assert us == pytest.approx(row["predicted_us"], rel=1e-3)


def test_who_cannot_take_part_is_named(monkeypatch: pytest.MonkeyPatch):
    for there in (True, False):
        monkeypatch.setattr("benchmarks.kernels.ops.TORCH_HAS_IT", there)
        (op,) = (op for op in ops(TINY) if op.name == "linear_cross_entropy")
        assert ("torch" in op.contestants) == there
        assert any("F.linear_cross_entropy" in line and torch.__version__ in line for line in left_out()) != there
