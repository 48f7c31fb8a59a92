"""Questions about the loss: how many rows a chunk, what bounds each product, and how the cross-entropy is launched."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_hour.bench import DTYPE, Bench, Results, against, case, named
from benchmarks.results import Row
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy as ours
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy_reference as reference

ce = import_module("fastbeit_kernels.cross_entropy")  # the package has the function by this name

CHUNKS = 512, 1024, 2048, 4096, 4800, 6400, 9600, 19200  # rows
PRODUCT_CHUNKS = 1024, 9600, 19200
GATED_ROWS = 256
# registers a thread to compile for, by warps a row; None: as many as the compiler likes. Each step down lets an SM of
# sm_90 hold one more row
REGISTERS = {4: (None, 128), 8: (None, 96, 80, 72, 64), 16: (None, 64, 48, 40)}


def linear_cross_entropy(bench: Bench) -> Iterator[Row]:
    """How many rows a chunk of `linear_cross_entropy` shall have, and which of its products is worth work.

    Few rows leave an SM idle and read the weight's float32 gradient often; many need memory, and leave the L2 cache.
    """
    R, D, V = bench.shapes.R, bench.shapes.D, bench.shapes.V
    inputs, labels = _inputs(bench)
    run = partial(_run, inputs=inputs, labels=labels)
    exact = _run(reference, {name: x.detach().double().requires_grad_() for name, x in inputs.items()}, labels, False)
    eager = run(reference)
    flops = 6 * R * D * V
    for chunk, has_bias in itertools.product(_up_to(R, CHUNKS), (True, False)):
        fn = partial(ours, chunk=chunk, backend="triton")
        used = inputs if has_bias else dict(hidden=inputs["hidden"], weight=inputs["weight"])
        # the same code but for the bias: what is right with it is not computed again without
        gate = against(exact, eager, partial(run, fn)) if has_bias else lambda: None
        name = f"{chunk} rows a chunk, {'bias' if has_bias else 'no bias'}"
        yield case(bench, name, partial(_run, fn, used, labels), gate=gate, flops=flops)
    yield case(bench, "eager", partial(run, reference), flops=flops)
    compiled = bench.compiler(reference)
    gate = against(exact, eager, partial(run, compiled))
    yield case(bench, "torch.compile of the reference", partial(run, compiled), gate=gate, flops=flops)
    for rows in _up_to(R, PRODUCT_CHUNKS):
        yield from _products(bench, rows)


def _products(bench: Bench, rows: int) -> Iterator[Row]:
    """Each product of a chunk alone, on buffers that it finds in the cache if they fit, as in the op."""
    D, V, device = bench.shapes.D, bench.shapes.V, bench.device
    gen = torch.Generator(device).manual_seed(0)
    hidden, weight, logits = (
        torch.randn(shape, generator=gen, device=device).to(DTYPE) for shape in ((rows, D), (V, D), (rows, V))
    )
    bias, ones = logits[0].clone(), torch.ones(8, rows, device=device, dtype=DTYPE)
    out, total = torch.empty_like(hidden), torch.zeros(V, D, device=device)
    single: dict[str, Any] = dict(out_dtype=torch.float32)
    products: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: torch.addmm(bias, hidden, weight.T, out=logits),
        "grad_hidden": lambda: torch.mm(logits, weight, out=out),
        "grad_weight, added in float32": lambda: torch.addmm(total, logits.T, hidden, **single, out=total),
        "grad_weight, float32": lambda: torch.mm(logits.T, hidden, **single),
        "grad_weight, bfloat16": lambda: torch.mm(logits.T, hidden),
    }
    for name, work in products.items():
        yield case(bench, f"{rows} rows: {name}", work, flops=2 * rows * D * V)
    sums = {
        "grad_bias, sum over rows": lambda: logits.sum(0, dtype=torch.float32),
        "grad_bias, ones @ logits": lambda: torch.mm(ones, logits, **single),
    }
    for name, work in sums.items():
        yield case(bench, f"{rows} rows: {name}", work, num_bytes=logits.nbytes)


def host(bench: Bench) -> Iterator[Row]:
    """Whether the chunks of `linear_cross_entropy` cost the host more than they cost the card: see `host_us`.

    A step whose host falls behind wants fewer chunks, or CUDA graphs.
    """
    inputs, labels = _inputs(bench)

    def loss(chunk: int) -> Tensor:
        return _loss(partial(ours, chunk=chunk, backend="triton"), inputs, labels)

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, list(inputs.values()))

    for chunk in _up_to(bench.shapes.R, CHUNKS):
        yield case(bench, f"{chunk} rows a chunk, forward", partial(loss, chunk))
        yield case(bench, f"{chunk} rows a chunk, backward", backward, setup=lambda c=chunk: (loss(c),))


def cross_entropy(bench: Bench) -> Iterator[Row]:
    """Which warps and registers `cross_entropy` shall be launched with, and what its device assertion costs.

    More rows an SM hide more of the memory's latency; registers bound them.
    """
    R, V = bench.shapes.R, bench.shapes.V
    logits = torch.randn(R, V, generator=torch.Generator(bench.device).manual_seed(0), device=bench.device).to(DTYPE)
    labels = _labels(bench)
    few = logits[:GATED_ROWS], labels[:GATED_ROWS]
    exact, eager = (_by_definition(few[0].to(dtype), few[1]) for dtype in (torch.float64, DTYPE))
    for num_warps, registers in REGISTERS.items():
        for maxnreg, asserts in itertools.product(registers, (True, False)):
            options: dict[str, Any] = dict(num_warps=num_warps, debug=asserts, sanitize_overflow=False)
            if maxnreg is not None:
                options["maxnreg"] = maxnreg
            gate = against(exact, eager, partial(_launch, *few, options))
            name = f"{num_warps} warps, {maxnreg or 'free'} registers, {'asserting' if asserts else 'silent'}"
            work = partial(_launch, logits, labels, options)
            yield case(bench, name, work, gate=gate, num_bytes=2 * logits.nbytes)


def _launch(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Results:
    """The forward kernel as `cross_entropy.launch_forward` launches it, but for the options."""
    R, V = logits.shape
    row_loss, row_correct = logits.new_empty(R, dtype=torch.float32), labels.new_empty(R, dtype=torch.int32)
    residual = torch.empty_like(logits)
    ce._cross_entropy_fwd_kernel[(R,)](
        logits_ptr=logits,
        labels_ptr=labels,
        row_loss_ptr=row_loss,
        row_correct_ptr=row_correct,
        residual_ptr=residual,
        V=V,
        LABEL_SMOOTHING=0.0,
        SMOOTHING_PER_WORD=0.0,
        Z_LOSS=0.0,
        IGNORE_INDEX=ce.IGNORE_INDEX,
        WITH_GRAD=True,
        BLOCK_V=ce.triton.next_power_of_2(V),
        **options,
    )
    return dict(out=row_loss.sum(), grad_logits=residual)


def _by_definition(logits: Tensor, labels: Tensor) -> Results:
    logits.requires_grad_()
    loss, _ = ce.cross_entropy_reference(logits, labels, torch.ones((), device=logits.device))
    return named(loss, dict(logits=logits))


def _inputs(bench: Bench) -> tuple[dict[str, Tensor], Tensor]:
    """What the model's head is given: hidden vectors in bfloat16, parameters in float32."""
    R, D, V = bench.shapes.R, bench.shapes.D, bench.shapes.V
    gen = torch.Generator(bench.device).manual_seed(0)
    randn = partial(torch.randn, generator=gen, device=bench.device)
    inputs = dict(hidden=randn(R, D).to(DTYPE), weight=randn(V, D) / D**0.5, bias=randn(V))
    return {name: x.requires_grad_() for name, x in inputs.items()}, _labels(bench)


def _labels(bench: Bench) -> Tensor:
    gen = torch.Generator(bench.device).manual_seed(1)
    return torch.randint(bench.shapes.V, (bench.shapes.R,), generator=gen, device=bench.device)


def _loss(fn: Callable, inputs: dict[str, Tensor], labels: Tensor, autocast: bool = True) -> Tensor:
    with torch.autocast(labels.device.type, DTYPE, enabled=autocast):
        loss, _ = fn(inputs["hidden"], inputs["weight"], inputs.get("bias"), labels)
    return loss


def _run(fn: Callable, inputs: dict[str, Tensor], labels: Tensor, autocast: bool = True) -> Results:
    return named(_loss(fn, inputs, labels, autocast), inputs)


def _up_to(R: int, sizes: tuple[int, ...]) -> list[int]:
    return [rows for rows in sizes if rows < R] + [R]
