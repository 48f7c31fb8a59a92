"""Questions about attention: what PyTorch offers for a bias that all images share, and what our own kernel would."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention_prototype as prototype
from benchmarks.first_hour.bench import DTYPE, HEAD_WIDTH, Bench, Results, against, case, named
from benchmarks.results import Row
from benchmarks.sdpa import chosen_backend

BACKENDS = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
MODEL_ALIGNMENT = 16  # of a row of the bias, as in model/vit.py; 8 is the least that fused attention takes
GATED_IMAGES = 4  # enough to see a wrong result, and float64 takes its time
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # of B*H*S*S*K: 2 products forward and 5 backward

# queries and keys a tile, warps, stages
FORWARD_TILES = (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3)
KEY_TILES = (64, 64, 8, 1), (64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 1)
QUERY_TILES = (64, 256, 8, 2), (64, 256, 8, 1), (32, 256, 8, 2)  # a program takes all keys
IMAGES = 16, 32, 64, 128, 256  # in the workspace, 1 MB each


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
    """Whether attention of our own with the bias's gradient shall be built, with which tiles and how much workspace.

    It stands against `sdpa`, "bias with gradient, both": forward plus backward, and memory.
    """
    B, S = bench.shapes.B, bench.shapes.S
    flops = bench.H * B * S**2 * HEAD_WIDTH
    qkv, grad_out, bias = _qkv(bench, B), _grad_out(bench, B), _bias(bench, prototype.ROW_ALIGNMENT).to(DTYPE)
    few = qkv[:GATED_IMAGES], bias, grad_out[:GATED_IMAGES]
    exact, eager = (_by_definition(*few, dtype) for dtype in (torch.float64, DTYPE))
    for numbers in FORWARD_TILES:
        tiles = _tiles(numbers)
        gate = against(exact, eager, lambda t=tiles: dict(out=prototype.forward(*few[:2], t)[0]))
        work = partial(prototype.forward, qkv, bias, tiles)
        yield case(bench, f"forward, tiles {numbers}", work, gate=gate, flops=FORWARD_FLOPS * flops)
    out, lse = prototype.forward(qkv, bias)
    for name, options in _backwards(B).items():
        gate = against(exact, eager, partial(_prototype_gradients, *few, options))
        work = partial(prototype.backward, grad_out, qkv, bias, out, lse, **options)
        yield case(bench, f"backward, {name}", work, gate=gate, flops=BACKWARD_FLOPS * flops)


def _tiles(numbers: tuple[int, ...]) -> dict[str, int]:
    names = ["BLOCK_I", "BLOCK_J", "num_warps", "num_stages"]
    return dict(zip(names, numbers, strict=True))


def _backwards(B: int) -> dict[str, dict[str, Any]]:
    """Each workspace with the tiles that are the default, then each other choice of tiles with two of them."""
    found: dict[str, dict[str, Any]] = {}
    for images in [n for n in IMAGES if n < B] + [B]:
        found[f"scores of {images} images"] = dict(images=images)
    for images in dict.fromkeys((min(32, B), B)):
        for numbers in KEY_TILES[1:]:
            found[f"scores of {images} images, keys {numbers}"] = dict(images=images, key_tiles=_tiles(numbers))
        for numbers in QUERY_TILES[1:]:
            tiles = _tiles(numbers)
            del tiles["BLOCK_J"]
            found[f"scores of {images} images, queries {numbers}"] = dict(images=images, query_tiles=tiles)
    return found


def _by_definition(qkv: Tensor, bias: Tensor, grad_out: Tensor, dtype: torch.dtype) -> Results:
    leaves = dict(qkv=qkv.to(dtype, copy=True).requires_grad_(), bias=bias.to(dtype, copy=True).requires_grad_())
    return named(prototype.attention_reference(**leaves), leaves, grad_out.to(dtype))


def _prototype_gradients(qkv: Tensor, bias: Tensor, grad_out: Tensor, options: dict[str, Any]) -> Results:
    out, lse = prototype.forward(qkv, bias)
    few: dict[str, Any] = options | dict(images=3)  # the last workspace is ragged
    grad_qkv, grad_bias = prototype.backward(grad_out, qkv, bias, out, lse, **few)
    return dict(grad_qkv=grad_qkv, grad_bias=grad_bias.to(bias.dtype))


def _qkv(bench: Bench, B: int) -> Tensor:
    return _randn(bench, B, bench.shapes.S, 3, bench.H, HEAD_WIDTH).to(DTYPE)


def _grad_out(bench: Bench, B: int) -> Tensor:
    return _randn(bench, B, bench.shapes.S, bench.H * HEAD_WIDTH).to(DTYPE)


def _bias(bench: Bench, alignment: int) -> Tensor:
    S = bench.shapes.S
    return _randn(bench, bench.H, S, -(-S // alignment) * alignment)


def _randn(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(bench.device).manual_seed(0), device=bench.device)
