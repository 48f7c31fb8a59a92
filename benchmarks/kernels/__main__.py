"""Each op against others that compute the same, on this GPU, at BEiT-B's shapes; does not time an op that is wrong.

    python -m benchmarks.kernels [--rounds N] [--json FILE]     wants CUDA
    python -m benchmarks.kernels --predict [--json FILE]        wants no GPU: what an A100 and an H100 would need

Times are medians of CUDA events around a forward and a backward. Contestants take turns, on inputs that take turns too,
so that none finds its own in the L2 cache. GB/s and TFLOP/s are the least work (`num_bytes`, `flops` of ops.py) over
the time, the same work for all; the percentage is of a copy or of a product of matrices that took turns with them.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.card import Clock, Work, cuda_clock, cuda_peak_mib, environment
from benchmarks.gate import first_fault
from benchmarks.kernels.ops import Op, Shapes, left_out, ops
from benchmarks.results import write_json
from fastbeit_kernels.backend import INTERPRETED

COPY_BYTES = 2**30  # read and written
PRODUCT = 8192  # rows and columns of the matrices
WARM_UP = 3  # rounds
MAX_SETS = 64  # of inputs

Turn = Callable[[int], Work]  # by its number; what it returns is timed


@dataclass(frozen=True)
class Bench:
    """What times are taken with."""

    device: str
    l2_bytes: int
    ceilings: dict[str, Turn]  # "copy" and "product"
    clock: Clock
    peak_mib: Callable[[Work], float]


def outputs(op: Op, fn: Callable, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients by name. The gradient of what an op gives is ones."""
    out = fn(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    named = {f"output {i}": tensor.detach() for i, tensor in enumerate(out)}
    if op.differentiable:
        leaves = [inputs[name] for name in op.differentiable]
        grads = torch.autograd.grad(out[0], leaves, torch.ones_like(out[0]))
        named |= {f"grad_{name}": grad for name, grad in zip(op.differentiable, grads, strict=True)}
    return named


def inputs_of(op: Op, device: str, seed: int, exact: bool = False) -> dict[str, Any]:
    inputs = op.make_inputs(device, seed)
    for name, x in inputs.items() if exact else ():
        if isinstance(x, Tensor) and x.is_floating_point():
            inputs[name] = x.double()
        elif isinstance(x, torch.dtype):
            inputs[name] = torch.float64
    for name in op.differentiable:
        inputs[name].requires_grad_()
    return inputs


def faults(op: Op, contestants: dict[str, Callable], device: str) -> dict[str, str]:
    """Who is wrong, and where: errs over twice what eager does, by worst element or by norm, against float64."""
    exact = outputs(op, op.exact, inputs_of(op, device, 0, exact=True))
    eager = outputs(op, op.contestants["eager"], inputs_of(op, device, 0))
    found = {}
    for who, fn in contestants.items():
        if fault := first_fault(outputs(op, fn, inputs_of(op, device, 0)), eager, exact):
            found[who] = f"wrong: {fault}"
    return found


def medians(turns: Mapping[str, Turn], clock: Clock, rounds: int) -> dict[str, float]:
    """Microseconds; in each round all take their turn, in an order of its own."""
    times: dict[str, list[float]] = {who: [] for who in turns}
    numbers = itertools.count()
    for i in range(WARM_UP + rounds):
        for who in random.Random(i).sample(list(turns), len(turns)):
            us = clock(turns[who](next(numbers)))
            if i >= WARM_UP:
                times[who].append(us)
    return {who: median(found) for who, found in times.items()}


def turns_of(op: Op, contestants: dict[str, Callable], bench: Bench) -> dict[str, Turn]:
    """All share the sets of inputs, more than the L2 cache holds; each turn takes the next."""
    sets = [inputs_of(op, bench.device, 0)]
    set_bytes = sum(x.nbytes for x in sets[0].values() if isinstance(x, Tensor))
    num_sets = min(MAX_SETS, 2 + 2 * bench.l2_bytes // set_bytes)
    sets += [inputs_of(op, bench.device, seed) for seed in range(1, num_sets)]
    kept = [inputs[op.overwritten].detach().clone() for inputs in sets] if op.overwritten else []

    def turn(fn: Callable, number: int) -> Work:
        used = (number - 1) % num_sets  # by the turn before; to put back what this turn takes would warm the cache
        if kept:
            with torch.no_grad():
                sets[used][op.overwritten].copy_(kept[used])
        return partial(outputs, op, fn, sets[number % num_sets])

    return {who: partial(turn, fn) for who, fn in contestants.items()}


def cuda_bench() -> Bench:
    source, target = (torch.randn(COPY_BYTES // 4, device="cuda").bfloat16() for _ in range(2))
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda").bfloat16() for _ in range(2))
    ceilings: dict[str, Turn] = {
        "copy": lambda _: partial(target.copy_, source),
        "product": lambda _: partial(torch.mm, a, b),
    }
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return Bench("cuda", l2_bytes, ceilings, cuda_clock, cuda_peak_mib)


def measure(op: Op, contestants: dict[str, Callable], bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """One row a contestant; when ours is wrong, its fault alone."""
    wrong = faults(op, contestants, bench.device)
    if "ours" in wrong:
        return [dict(op=op.name, who="ours", wrong=wrong["ours"])]
    turns = turns_of(op, contestants, bench)
    peaks = {who: bench.peak_mib(turn(0)) for who, turn in turns.items()}
    us = medians(turns | bench.ceilings, bench.clock, rounds)
    copy, product = COPY_BYTES / us["copy"], 2 * PRODUCT**3 / us["product"]  # a microsecond
    rows = []
    for who in contestants:
        row: dict[str, Any] = dict(op=op.name, who=who, us=us[who], peak_mib=peaks[who])
        if op.num_bytes:
            rate = op.num_bytes / us[who]
            row |= dict(gb_per_s=rate / 1e3, percent_of_copy=100 * rate / copy)
        if op.flops:
            rate = op.flops / us[who]
            row |= dict(tflop_per_s=rate / 1e6, percent_of_product=100 * rate / product)
        rows.append(row | (dict(wrong=wrong[who]) if who in wrong else {}))
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [f"{row['op']:22} {row['who']:10}"]
        if "us" in row:
            cells.append(f"{row['us']:10.1f} us {row['peak_mib']:9.1f} MiB")
        if "gb_per_s" in row:
            cells.append(f"{row['gb_per_s']:8.0f} GB/s    {row['percent_of_copy']:5.1f} % of a copy")
        if "tflop_per_s" in row:
            cells.append(f"{row['tflop_per_s']:8.1f} TFLOP/s {row['percent_of_product']:5.1f} % of a product")
        print(*cells, row.get("wrong", ""))


def time_on_cuda(rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """What there is so far is kept after each op."""
    bench = cuda_bench()
    found: list[dict[str, Any]] = []
    for op in ops(Shapes()):
        contestants = dict(op.contestants)
        if op.differentiable:
            contestants["compile"] = torch.compile(op.contestants["eager"], fullgraph=True)
        rows = measure(op, contestants, bench, rounds)
        print_rows(rows)
        found += [dict(case=f"{row['op']}, {row['who']}", **row) for row in rows]
        keep(found)
        torch.cuda.empty_cache()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="predict instead, for A100 and H100; wants no GPU")
    parser.add_argument("--rounds", type=int, default=50, help="times that each takes its turn (default: 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("kernels are interpreted: unset TRITON_INTERPRET")
    if not (args.predict or torch.cuda.is_available()):
        print("no CUDA device to time kernels on; --predict says what an A100 and an H100 would need", file=sys.stderr)
        return 2
    where = environment()
    print(json.dumps(where))
    absent = left_out()
    for who in absent:
        print(f"left out: {who}")

    def keep(rows: list[dict[str, Any]]) -> None:
        if args.json:
            write_json(args.json, dict(where, predicted=args.predict, left_out=absent, rows=rows))

    if args.predict:
        from benchmarks.kernels.predict import print_predictions

        rows = print_predictions()
        keep(rows)
    else:
        rows = time_on_cuda(args.rounds, keep)
    return int(any("wrong" in row and row["who"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
