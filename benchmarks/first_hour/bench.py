"""How a question times one case: checked first, then medians of a clock; an error is an answer too."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.card import Clock, Work, cuda_clock, cuda_peak_mib
from benchmarks.gate import first_fault
from benchmarks.kernels.ops import Shapes
from benchmarks.results import Row, first_line

DTYPE = torch.bfloat16
HEAD_WIDTH = 64  # K
REASONS = 8  # warnings that are told beside an error: a refused SDPA backend says there what it did not like

Results = dict[str, Tensor]
Gate = Callable[[], str | None]  # what is wrong, or None


@dataclass(frozen=True)
class Bench:
    """What questions are asked with; tests take a clock of their own, small shapes and another compiler."""

    device: str = "cuda"
    shapes: Shapes = Shapes()
    clock: Clock = cuda_clock
    peak_mib: Callable[[Work], float] = cuda_peak_mib
    compiler: Callable[[Callable], Callable] = partial(torch.compile, fullgraph=True)
    warm_up: int = 2  # calls; the first compiles
    rounds: int = 20

    @property
    def H(self) -> int:
        return self.shapes.D // HEAD_WIDTH


Question = Callable[[Bench], Iterator[Row]]


def case(
    bench: Bench,
    name: str,
    work: Callable,
    *,
    setup: Callable[[], tuple] = tuple,
    gate: Gate = lambda: None,
    flops: float = 0,
    num_bytes: float = 0,
) -> Row:
    """Time one case, unless its gate finds it wrong.

    Cases do not take turns, as in `benchmarks.kernels`: each row is there as soon as it can be, for time may run out.

    Args:
        work: what is timed, given what `setup` returns, which is not.
        flops, num_bytes: the least work; rates are this over the time.

    Returns:
        `us` is of the card, `host_us` what the host takes to enqueue the work: where that is longer than the clock
        hides (`card.SLEEP`), `us` holds some of it.
    """
    row: Row = dict(case=name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            wrong = gate()
            return row | (dict(wrong=wrong) if wrong else _timed(bench, work, setup, flops, num_bytes))
        # any error at all is the answer of this case, and the next one is asked
        except Exception as err:
            reasons = [first_line(warning.message) for warning in said if isinstance(warning.message, Warning)]
            return row | dict(error="; ".join([first_line(err), *dict.fromkeys(reasons)][: 1 + REASONS]))


def _timed(bench: Bench, work: Callable, setup: Callable[[], tuple], flops: float, num_bytes: float) -> Row:
    host_us: list[float] = []

    def enqueue(*given: Any) -> None:
        start = time.perf_counter()
        work(*given)
        host_us.append(1e6 * (time.perf_counter() - start))

    for _ in range(bench.warm_up):
        work(*setup())
    peak_mib = bench.peak_mib(partial(work, *setup()))
    us = median(bench.clock(partial(enqueue, *setup())) for _ in range(bench.rounds))
    row: Row = dict(us=us, host_us=median(host_us), peak_mib=peak_mib)
    if flops:
        row["tflop_per_s"] = flops / us / 1e6
    if num_bytes:
        row["gb_per_s"] = num_bytes / us / 1e3
    return row


def against(exact: Results, eager: Results, got: Callable[[], Results]) -> Gate:
    """A gate: float64 and plain PyTorch are computed once, what they are held against when the gate is asked."""
    return lambda: first_fault(got(), eager, exact)


def named(out: Tensor, inputs: Mapping[str, Tensor], grad_out: Tensor | None = None) -> Results:
    """A result and its gradients by name; an input that needs no gradient has none."""
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out) if leaves else ()
    return dict(out=out.detach()) | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
