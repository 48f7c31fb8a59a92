"""Trials: each fused operator on random numbers, and how wrong its results are, judged against float64.

What plain PyTorch errs by in the same dtype is the measure: rounding to 16 bits is no fault of a kernel, and a kernel
whose gradient is wrong by one part in a hundred is not excused by it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit import masking
from fastbeit.config.finetune import VitConfig
from fastbeit.config.pretrain import Config
from fastbeit.model.attention import BIAS_ALIGNMENT, attend
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastbeit_kernels.masked_embed import masked_embed, masked_embed_reference

IMAGES, ROWS = 2, 64  # that a trial takes: enough for each tile to have a neighbour
# relative errors that are forgiven where plain PyTorch happens to be exact, as in tests/helpers/numerics.py; in float32
# all that is forgiven: sums in another order err by some 1e-6
FLOOR = {torch.float32: 1e-4, torch.float16: 2e-4, torch.bfloat16: 2e-3}
MAX_ERROR = 0.05  # in 16 bits whatever plain PyTorch errs by, which is 0.01 at most

Results = dict[str, Tensor]  # the output and each gradient, by name
# how an operator is computed ("triton", "reference", ...) -> its results; "exact": by its definition, in float64
Trial = Callable[[str], Results]


@dataclass(frozen=True)
class Verdict:
    """How wrong an implementation is, where it is most so."""

    error: float  # relative to the largest value of a result, or to its norm, whichever is worse
    where: str  # the result
    wrong: str | None  # None: no more than it may be


def judge(fast: Results, plain: Results, exact: Results, dtype: torch.dtype) -> Verdict:
    """Compare each result with float64; more than twice the error of plain PyTorch, and a floor, is wrong.

    Args:
        dtype: what products are computed in.
    """
    worst, wrong = (0.0, "nothing"), []
    for name, truth in exact.items():
        plain_errors = _errors(plain[name], truth)
        for kind, error in _errors(fast[name], truth).items():
            limit = _limit(plain_errors[kind], dtype) if truth.is_floating_point() else 0.0
            if not error <= worst[0]:
                worst = error, name
            if not error <= limit:
                wrong.append((error, f"its {name} differs from float64's by {error:.1e} ({kind})", plain_errors[kind]))
    if not wrong:
        return Verdict(*worst, None)
    _, told, plain_error = max(wrong)
    return Verdict(*worst, f"{told}, plain PyTorch's by {plain_error:.1e}; please report this machine")


def _limit(plain_error: float, dtype: torch.dtype) -> float:
    return FLOOR[dtype] if dtype == torch.float32 else min(2 * plain_error + FLOOR[dtype], MAX_ERROR)


def _errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative errors. Those of rounding are as often up as down: they leave the scale alone, and a wrong factor does
    not hide among them."""
    got, exact = got.double(), exact.double()
    error, norm = got - exact, exact.norm().clamp_min(1e-12)
    largest, scale = error.abs().max() / exact.abs().max().clamp_min(1e-12), (error * exact).sum().abs() / norm**2
    return {"largest value": largest.item(), "norm": (error.norm() / norm).item(), "scale": scale.item()}


def tried(trial: Trial, how: str, dtype: torch.dtype) -> Verdict:
    """What is wrong with an implementation; whatever it raises is a verdict too."""
    try:
        return judge(trial(how), trial("reference"), trial("exact"), dtype)
    except Exception as err:  # whatever a compiler or a card may say
        told = str(err).splitlines()[0] if str(err) else "no reason told"
        return Verdict(float("nan"), "nothing", f"{type(err).__name__}: {told}")


def trials_of(config: VitConfig, num_outputs: int, device: torch.device, dtype: torch.dtype) -> dict[str, Trial]:
    """By operator: its trial at the model's widths. Those that the configuration has no use for are left out."""
    trials: dict[str, Trial] = dict(attention=partial(_attention, config, device, dtype))
    if config.objective != "classes":
        trials["masked_embed"] = partial(_embedding, config, device, dtype)
    if config.objective != "pixels":
        trials["loss"] = partial(_loss, config.model.width, num_outputs, device, dtype)
    if isinstance(config, Config) and config.mask != "none":
        trials["masks"] = partial(_masks, config, device)
    return trials


def random_numbers(device: torch.device, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _with_gradients(out: Tensor, leaves: Mapping[str, Tensor], grad: Tensor) -> Results:
    grads = torch.autograd.grad(out, tuple(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _embedding(config: VitConfig, device: torch.device, dtype: torch.dtype, how: Any) -> Results:
    random, D, kind = (
        partial(random_numbers, device),
        config.model.width,
        torch.float64 if how == "exact" else torch.float32,
    )
    images = (random(0, IMAGES, *config.data.image_size, 3) * 40 + 128).clamp(0, 255).to(torch.uint8)
    masked = random(1, IMAGES, config.num_patches) > 0
    leaves = {"weight": random(0, D, 3, *config.model.patch_size)}
    leaves |= {name: random(2 + i, D) for i, name in enumerate(("bias", "cls_token", "mask_token"))}
    if config.model.absolute_position:
        leaves["positions"] = random(5, config.num_patches + 1, D)
    leaves = {name: leaf.to(kind).requires_grad_() for name, leaf in leaves.items()}
    mean, std = (torch.tensor(values, device=device).to(kind) for values in (config.data.mean, config.data.std))
    ordered = (leaves.get(name) for name in ("weight", "bias", "cls_token", "mask_token", "positions"))
    args: Any = images, masked, *ordered, mean, std
    if how == "exact":
        out = masked_embed_reference(*args, dtype=kind, out_dtype=kind)
    else:
        out = masked_embed(*args, dtype=dtype, backend=how)
    return _with_gradients(out, leaves, random(6, *out.shape))


def _loss(width: int, num_outputs: int, device: torch.device, dtype: torch.dtype, how: Any) -> Results:
    kind = torch.float64 if how == "exact" else torch.float32
    shapes = {"hidden": (ROWS, width), "weight": (num_outputs, width), "bias": (num_outputs,)}
    leaves = {name: random_numbers(device, seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    leaves["weight"] /= width**0.5
    leaves = {name: leaf.to(kind).requires_grad_() for name, leaf in leaves.items()}
    labels, one = torch.arange(ROWS, device=device) % num_outputs, torch.ones((), device=device)
    args: Any = *leaves.values(), labels, one
    if how == "exact":
        total, _ = linear_cross_entropy_reference(*args)
    else:
        total, _ = linear_cross_entropy(*args, dtype=dtype, backend=how)
    return _with_gradients(total, leaves, torch.ones_like(total))


def _attention(config: VitConfig, device: torch.device, dtype: torch.dtype, how: Any) -> Results:
    """By any backend of attention; what it is given is rounded to `dtype` before."""
    S, H = config.num_patches + 1, config.model.num_heads
    kind, bias_kind = (torch.float64, torch.float64) if how == "exact" else (dtype, torch.float32)
    qkv = random_numbers(device, 0, IMAGES, S, 3, H, config.model.width // H).to(dtype).to(kind).requires_grad_()
    leaves, bias = {"qkv": qkv}, None
    if config.model.relative_position != "none":
        leaves["bias"] = random_numbers(device, 1, H, S, S).to(bias_kind).requires_grad_()
        bias = F.pad(leaves["bias"], (0, -S % BIAS_ALIGNMENT))
    out = attend(qkv, bias, "eager" if how in ("exact", "reference") else how)
    return _with_gradients(out, leaves, random_numbers(device, 2, *out.shape).to(dtype))


def _masks(config: Config, device: torch.device, how: Any) -> Results:
    """Whole numbers, which are equal or wrong."""
    rule = replace(masking.rule_of(config), backend="reference" if how == "exact" else how)
    sample = torch.arange(ROWS, device=device)
    masks = masking.draw_masks(rule, torch.zeros_like(sample), sample)
    return {"masked_idx": masks.masked_idx, "num_masked": masks.num_masked}
