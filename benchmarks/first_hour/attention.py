"""Questions about attention: what PyTorch offers for a bias that all images share, and how ours is best launched."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.first_hour.bench import DTYPE, HEAD_WIDTH, Bench, Results, against, case, named
from benchmarks.results import Row
from benchmarks.sdpa import chosen_backend

ours = import_module("fastbeit_kernels.relative_attention")  # the package has the function by this name

BACKENDS = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
MODEL_ALIGNMENT = 16  # of a row of the bias, as in model/vit.py; 8 is the least that fused attention takes
GATED_IMAGES = 4  # enough to see a wrong result, and float64 takes its time
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # of B*H*S*S*K: 2 products forward and 5 backward

# of queries, of keys, warps, stages; the first are what `relative_attention` takes on an H100
FORWARD_TILES = (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 3)
KEY_TILES = (16, 64, 4, 3), (16, 64, 4, 4), (32, 64, 4, 1), (64, 64, 4, 1), (16, 128, 8, 3)
# of queries, images that are added up, warps, stages
QUERY_TILES = (64, 32, 8, 3), (64, 16, 8, 3), (64, 32, 8, 2)
IMAGES = 32, 64, 128  # in the workspace, 1 MB each


def sdpa(bench: Bench) -> Iterator[Row]:
    """Which backend the model's attention shall ask PyTorch for, and what a kernel of our own would have to beat.

    A bias that is trained, as in pre-training, may leave fewer backends than one that is not, as in evaluation.
    """
    qkv, grad_out = _qkv(bench, bench.shapes.B).requires_grad_(), _grad_out(bench, bench.shapes.B)
    trained = _bias(bench, MODEL_ALIGNMENT).requires_grad_()
    kinds = {
        "no bias": None,
        "bias without gradient": trained.detach(),
        "bias with gradient": trained,
        "bias with gradient, rows of a multiple of 8": _bias(bench, 8).requires_grad_(),
    }
    for kind, bias in kinds.items():
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        yield dict(case=f"chosen, {kind}", sdpa=chosen_backend(q, k, v, attn_mask=_mask(qkv, bias)))
    for kind, bias in kinds.items():
        yield from _backends(bench, kind, qkv, bias, grad_out)


def _backends(bench: Bench, kind: str, qkv: Tensor, bias: Tensor | None, grad_out: Tensor) -> Iterator[Row]:
    few, grad_few = qkv[:GATED_IMAGES].detach().requires_grad_(), grad_out[:GATED_IMAGES]
    plain = partial(attend, backend=SDPBackend.MATH)
    exact = _results(plain, few.detach().double().requires_grad_(), bias, grad_few)
    eager = _results(plain, few, bias, grad_few)
    for backend in BACKENDS:
        run = partial(attend, backend=backend)
        gate = against(exact, eager, partial(_results, run, few, bias, grad_few))
        name, flops = f"{backend.name}, {kind}", bench.H * qkv.shape[0] * qkv.shape[1] ** 2 * HEAD_WIDTH
        yield case(bench, f"{name}, forward", partial(run, qkv, bias), gate=gate, flops=FORWARD_FLOPS * flops)
        both = partial(_results, run, qkv, bias, grad_out)
        yield case(bench, f"{name}, both", both, gate=gate, flops=(FORWARD_FLOPS + BACKWARD_FLOPS) * flops)


def attend(qkv: Tensor, bias: Tensor | None, backend: SDPBackend | None = None) -> Tensor:
    """As `Attention` of model/vit.py does it.

    Args:
        qkv: [B, S, 3, H, K].
        bias: [H, S, S_pad] float32, or None.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(qkv, bias)).transpose(1, 2).flatten(2)


def _mask(qkv: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(qkv.dtype)[..., : qkv.shape[1]].expand(len(qkv), -1, -1, -1)


def _results(run: Callable, qkv: Tensor, bias: Tensor | None, grad_out: Tensor) -> Results:
    inputs = dict(qkv=qkv) if bias is None else dict(qkv=qkv, bias=bias)
    out = run(qkv, bias)
    return named(out, inputs, grad_out.to(out.dtype))


def attention(bench: Bench) -> Iterator[Row]:
    """Which tiles `relative_attention` shall have, and how much workspace.

    It stands against `sdpa`, "bias with gradient": forward, both, and memory.
    """
    few = _qkv(bench, GATED_IMAGES), _bias(bench, MODEL_ALIGNMENT), _grad_out(bench, GATED_IMAGES)
    exact, eager = (_by_definition(*few, dtype) for dtype in (torch.float64, DTYPE))
    gate = against(exact, eager, partial(_results, _ours, few[0].requires_grad_(), few[1].requires_grad_(), few[2]))
    qkv, bias, grad_out = (make(bench, bench.shapes.B) for make in (_qkv, _trained, _grad_out))
    qkv.requires_grad_()
    flops = bench.H * bench.shapes.B * bench.shapes.S**2 * HEAD_WIDTH
    for name, patches, backward in _choices(bench):
        with patch.multiple(ours, **patches):
            if backward:
                work = partial(_results, _ours, qkv, bias, grad_out)
                yield case(bench, f"both, {name}", work, gate=gate, flops=(FORWARD_FLOPS + BACKWARD_FLOPS) * flops)
            else:
                work = partial(_ours, qkv.detach(), bias.detach())
                yield case(bench, f"forward, {name}", work, gate=gate, flops=FORWARD_FLOPS * flops)


def _choices(bench: Bench) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """A name, what of the op's module is another, and whether the backward is asked about."""
    names = "BLOCK_I", "BLOCK_J", "num_warps", "num_stages"
    for numbers in FORWARD_TILES:
        tiles = dict(zip(names, numbers, strict=True))
        yield f"tiles {numbers}", dict(forward_tiles=lambda _, tiles=tiles: tiles), False
    for numbers in KEY_TILES:
        tiles = dict(zip(names, numbers, strict=True))
        yield f"keys {numbers}", dict(key_tiles=lambda _, tiles=tiles: tiles), True
    for numbers in QUERY_TILES:
        tiles = dict(zip(("BLOCK_I", "GROUP", "num_warps", "num_stages"), numbers, strict=True))
        yield f"queries {numbers}", dict(query_tiles=lambda *_, tiles=tiles: tiles), True
    S = bench.shapes.S
    for images in (n for n in IMAGES if n < bench.shapes.B):
        rows = bench.H * S * -(-S // ours.ROW_ALIGNMENT) * ours.ROW_ALIGNMENT
        yield f"scores of {images} images", dict(WORKSPACE_BYTES=images * rows * DTYPE.itemsize), True


def _ours(qkv: Tensor, bias: Tensor) -> Tensor:
    return ours.relative_attention(qkv, bias, backend="triton")


def _trained(bench: Bench, _: int) -> Tensor:
    return _bias(bench, MODEL_ALIGNMENT).requires_grad_()


def _by_definition(qkv: Tensor, bias: Tensor, grad_out: Tensor, dtype: torch.dtype) -> Results:
    leaves = dict(qkv=qkv.to(dtype, copy=True).requires_grad_(), bias=bias.to(dtype, copy=True).requires_grad_())
    return named(ours.relative_attention_reference(**leaves), leaves, grad_out.to(dtype))


def _qkv(bench: Bench, B: int) -> Tensor:
    return _randn(bench, B, bench.shapes.S, 3, bench.H, HEAD_WIDTH).to(DTYPE)


def _grad_out(bench: Bench, B: int) -> Tensor:
    return _randn(bench, B, bench.shapes.S, bench.H * HEAD_WIDTH).to(DTYPE)


def _bias(bench: Bench, alignment: int) -> Tensor:
    S = bench.shapes.S
    return _randn(bench, bench.H, S, -(-S // alignment) * alignment)


def _randn(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(bench.device).manual_seed(0), device=bench.device)
