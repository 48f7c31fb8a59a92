"""Each op on random data of BEiT-B's shapes: inputs, who computes it, the least that it must move or multiply."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import liger
from fastbeit_kernels.backend import Backend
from fastbeit_kernels.block_masks import block_masks
from fastbeit_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastbeit_kernels.masked_embed import masked_embed, masked_embed_reference

DTYPE = torch.bfloat16
TORCH_HAS_IT = hasattr(F, "linear_cross_entropy")


@dataclass(frozen=True)
class Shapes:
    """BEiT-B on 224 x 224 pixels, with the letters of model/vit.py; tests and the interpreter take smaller ones."""

    B: int = 256
    grid: int = 14
    M: int = 75
    D: int = 768
    V: int = 8192
    P: int = 16

    @property
    def N(self) -> int:
        return self.grid**2

    @property
    def S(self) -> int:
        return self.N + 1

    @property
    def K(self) -> int:
        return 3 * self.P**2

    @property
    def R(self) -> int:
        return self.B * self.M


@dataclass(frozen=True)
class Op:
    """An op at one shape. All callables take inputs by name; a second result, a count, has no gradient."""

    name: str
    make_inputs: Callable[[str, int], dict[str, Any]]  # on a device, from a seed
    differentiable: tuple[str, ...]
    contestants: dict[str, Callable]
    exact: Callable  # the reference, which takes float64
    num_bytes: int = 0  # forward and backward: inputs and outputs once, their gradients once
    flops: int = 0  # of the products over which the op is bound to spend its time
    overwritten: str = ""  # the input that a contestant computes in place of


def cross_entropy_op(shapes: Shapes, backend: Backend) -> Op:
    def make_inputs(device: str, seed: int) -> dict[str, Tensor]:
        gen = torch.Generator(device).manual_seed(seed)
        labels = _labels(shapes, device, gen)
        logits = torch.randn(shapes.R, shapes.V, generator=gen, device=device)
        # every second row is right, as late in a run
        logits[::2].scatter_(1, labels[::2, None].clamp_min(0), 12)
        return dict(logits=logits.to(DTYPE), labels=labels)

    contestants: dict[str, Callable] = dict(ours=partial(cross_entropy, backend=backend), eager=cross_entropy_reference)
    if liger.INSTALLED:
        contestants["liger"] = liger.cross_entropy
    # reads the logits, writes their gradient
    num_bytes = 2 * shapes.R * shapes.V * DTYPE.itemsize
    exact = cross_entropy_reference
    return Op("cross_entropy", make_inputs, ("logits",), contestants, exact, num_bytes, overwritten="logits")


def linear_cross_entropy_op(shapes: Shapes, backend: Backend) -> Op:
    def make_inputs(device: str, seed: int) -> dict[str, Tensor]:
        gen = torch.Generator(device).manual_seed(seed)
        labels = _labels(shapes, device, gen)
        hidden = torch.randn(shapes.R, shapes.D, generator=gen, device=device)
        weight = torch.randn(shapes.V, shapes.D, generator=gen, device=device) / shapes.D**0.5
        bias = torch.randn(shapes.V, generator=gen, device=device)
        hidden[::2] += 12 * weight[labels[::2].clamp_min(0)]
        return dict(hidden=hidden.to(DTYPE), weight=weight.to(DTYPE), bias=bias.to(DTYPE), labels=labels)

    ours = partial(linear_cross_entropy, backend=backend)
    contestants: dict[str, Callable] = dict(ours=ours, eager=linear_cross_entropy_reference)
    # the default chunk is 16 MiB of logits, 1024 rows of 8192 words
    contestants |= {f"{chunk} rows": partial(ours, chunk=chunk) for chunk in (512, 2048, shapes.R)}
    if TORCH_HAS_IT:
        contestants["torch"] = _torch_linear_cross_entropy
    if liger.INSTALLED:
        contestants["liger"] = liger.linear_cross_entropy
    flops = 6 * shapes.R * shapes.D * shapes.V  # the logits, and the gradients of hidden and weight
    differentiable = "hidden", "weight", "bias"
    exact = linear_cross_entropy_reference
    return Op("linear_cross_entropy", make_inputs, differentiable, contestants, exact, flops=flops)


def masked_embed_op(shapes: Shapes, backend: Backend) -> Op:
    B, N, S, K, D = shapes.B, shapes.N, shapes.S, shapes.K, shapes.D

    def make_inputs(device: str, seed: int) -> dict[str, Any]:
        gen = torch.Generator(device).manual_seed(seed)
        size = shapes.grid * shapes.P
        weight = torch.randn(D, 3, shapes.P, shapes.P, generator=gen, device=device) / K**0.5
        bias, cls_token, mask_token = torch.randn(3, D, generator=gen, device=device).unbind()
        return dict(
            images=torch.randint(256, (B, size, size, 3), generator=gen, device=device, dtype=torch.uint8),
            masked=_blocks(shapes, seed).to(device),
            weight=weight,
            bias=bias,
            cls_token=cls_token,
            mask_token=mask_token,
            positions=None,  # BEiT has relative ones, inside its attention
            mean=torch.full((3,), 0.5, device=device),
            std=torch.full((3,), 0.5, device=device),
            dtype=DTYPE,
            out_dtype=DTYPE,
        )

    contestants = dict(ours=partial(masked_embed, backend=backend), eager=masked_embed_reference)
    # reads visible pixels and writes tokens; then reads the gradient of the tokens and, for the weight, pixels again
    num_bytes = round(2 * (N - shapes.M) / N * B * N * K + 2 * B * S * D * DTYPE.itemsize)
    differentiable = "weight", "bias", "cls_token", "mask_token"
    return Op("masked_embed", make_inputs, differentiable, contestants, masked_embed_reference, num_bytes)


def block_masks_op(shapes: Shapes, backend: Backend) -> Op:
    reference = partial(block_masks, backend="reference")

    def on_the_host(epoch: Tensor, sample: Tensor, **settings: Any) -> tuple[Tensor, ...]:
        found = reference(epoch=epoch.cpu(), sample=sample.cpu(), **settings)
        return tuple(x.to(sample.device) for x in found)

    contestants = dict(ours=partial(block_masks, backend=backend), eager=reference, host=on_the_host)
    return Op("block_masks", partial(_samples, shapes), (), contestants, reference)


def _labels(shapes: Shapes, device: str, gen: torch.Generator) -> Tensor:
    """[R] int64; one in 128 is not labelled: 74.5 of 75 slots are used, on average."""
    labels = torch.randint(shapes.V, (shapes.R,), generator=gen, device=device)
    return labels.masked_fill_(torch.rand(shapes.R, generator=gen, device=device) < 1 / 128, -100)


def _blocks(shapes: Shapes, seed: int) -> Tensor:
    """[B, N] bool, blockwise masks."""
    masked_idx, num_masked = block_masks(**_samples(shapes, "cpu", seed), backend="reference")
    used = torch.arange(shapes.M) < num_masked[:, None]
    return torch.zeros(shapes.B, shapes.N, dtype=torch.bool).scatter_(1, masked_idx, used)


def _samples(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    sample = torch.arange(shapes.B, device=device)
    grid = shapes.grid, shapes.grid
    return dict(seed=seed, epoch=torch.zeros_like(sample), sample=sample, grid=grid, num_masked=shapes.M)


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # its chunked form, and no count of right rows
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options)


def left_out() -> list[str]:
    """Contestants that cannot take part here, each with what would bring it."""
    torch_has_not = f"F.linear_cross_entropy: PyTorch has it from 2.13 on, this is {torch.__version__}"
    return [*([] if TORCH_HAS_IT else [torch_has_not]), *([] if liger.INSTALLED else [liger.HOW_TO_INSTALL])]


def ops(shapes: Shapes, backend: Backend = "triton") -> list[Op]:
    makers = cross_entropy_op, linear_cross_entropy_op, masked_embed_op, block_masks_op
    return [make(shapes, backend) for make in makers]
