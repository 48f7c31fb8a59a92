"""Which implementation of each fused operator a run takes: as set, or what runs on its device and is right there.

"auto" tries each Triton kernel once, at the model's widths, forward and backward, against plain PyTorch. What a card
refuses (too little shared memory, a compiler that fails), and what is wrong there, is replaced by plain PyTorch and
said; what the configuration asks for by name and does not run ends the run before it begins.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.config.sections import AttentionBackend, Kernels, KernelsConfig
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.model.attention import attention_choice, check_attention
from fastbeit_kernels.backend import HAS_TRITON, Backend, check_backend, uses_triton
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy
from fastbeit_kernels.masked_embed import masked_embed
from fastbeit_kernels.relative_attention import relative_attention

IMAGES, ROWS = 2, 64  # that a trial takes: enough for each tile to have a neighbour
MAX_ERROR = 0.05  # of a result's norm: 16 bits err by 0.01 at most, and what is wrong by as much as the result itself
OLDEST = (8, 0)  # Ampere: older cards have no bfloat16 in their matrix units, and nothing was tried on one

Results = list[Tensor]


def chosen_kernels(config: Config, num_outputs: int, world: World) -> tuple[Config, list[str]]:
    """The configuration with each operator's implementation named, alike on all ranks; and lines that say why.

    Raises:
        ConfigError: what is set does not run; on all ranks.
    """
    device, dtype = world.device, compute_dtype(config.engine, world.device)
    wanted, S = config.kernels.by_op, config.num_patches + 1
    head_width, has_bias = config.model.width // config.model.num_heads, config.model.relative_position != "none"
    refused = _refusals(config, wanted, num_outputs, device, dtype)
    first = {op: why for told in world.gather([refused]) for op, why in told.items()}
    for op, why in first.items():
        if getattr(wanted, op) != "auto":
            key = op if getattr(config.kernels, op) else "backend"
            raise ConfigError(f"kernels.{key}={getattr(wanted, op)}: {why}")
    attention, reason = attention_choice(wanted.attention, device, S, head_width, has_bias)
    lines = [f"attention: {attention} ({reason})"] if wanted.attention == "auto" and "attention" not in first else []
    names: dict[str, Any] = {op: _name(one, device) for op, one in asdict(wanted).items() if op != "attention"}
    names["attention"] = attention
    for op, why in first.items():
        names[op] = "sdpa" if op == "attention" else "reference"
        lines.append(f"{op}: {names[op]}, because triton does not serve: {why}")
    kernels = Kernels(**names)
    return config.model_copy(update={"kernels": KernelsConfig(**asdict(kernels))}), [_line(kernels), *lines]


def _name(backend: Backend, device: torch.device) -> str:
    return "triton" if uses_triton(backend, device) and HAS_TRITON else "reference"


def _line(kernels: Kernels) -> str:
    return "kernels: " + ", ".join(f"{op} {name}" for op, name in asdict(kernels).items())


def _refusals(
    config: Config, wanted: Kernels, num_outputs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Why an operator does not run as wanted, by its name."""
    refused = {}
    for op, backend in asdict(wanted).items():
        try:
            if op == "attention":
                refused |= _of_attention(config, backend, device, dtype)
            else:
                check_backend(backend, device)
        except (ValueError, ModuleNotFoundError) as err:
            if backend != "auto":
                refused[op] = str(err)
    if device.type != "cuda" or not HAS_TRITON:
        return refused
    old = not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST
    for kind in dict.fromkeys((dtype, torch.float32)):  # a validation computes in float32
        for op, trial in trials_of(config, num_outputs, device, kind).items():
            if getattr(wanted, op) not in ("auto", "triton") or op in refused:
                continue
            if why := tried(_too_old if old else trial):
                refused[op] = why
    return refused


def _of_attention(
    config: Config, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    if backend == "auto":
        return {}
    model = config.model
    why = check_attention(
        backend, device, dtype, config.num_patches + 1, model.num_heads, model.width // model.num_heads
    )
    return {"attention": why} if why else {}


def _too_old(backend: Backend) -> Results:
    raise RuntimeError(f"it is for cards of compute capability {OLDEST[0]}.{OLDEST[1]} and newer")


def tried(trial: Callable[[Backend], Results]) -> str | None:
    """What is wrong with the Triton kernels of a trial; None: nothing."""
    try:
        fast, plain = trial("triton"), trial("reference")
    except Exception as err:  # whatever a compiler or a card may say
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else 'no reason told'}"
    for got, expected in zip(fast, plain, strict=True):
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
        if not error <= MAX_ERROR:
            return f"its result differs from plain PyTorch's by {error.item():.0%}; please report this card"
    return None


def trials_of(
    config: Config, num_outputs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[Backend], Results]]:
    """By operator: outputs and gradients with one backend or the other, on random numbers."""
    model, D, (height, width) = config.model, config.model.width, config.data.image_size

    def random(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)

    def embedding(backend: Backend) -> Results:
        images = (random(IMAGES, height, width, 3) * 40 + 128).clamp(0, 255).to(torch.uint8)
        masked = random(IMAGES, config.num_patches, seed=1) > 0
        weight, tokens = random(D, 3, *model.patch_size).requires_grad_(), random(3, D, seed=2).requires_grad_()
        bias, cls_token, mask_token = tokens
        half = torch.full((3,), 0.5, device=device)
        args = images, masked, weight, bias, cls_token, mask_token, None, half, half
        out = masked_embed(*args, dtype=dtype, backend=backend)
        return [out, *torch.autograd.grad(out, (weight, tokens), random(*out.shape, seed=3))]

    def loss(backend: Backend) -> Results:
        hidden, weight = random(ROWS, D).requires_grad_(), (random(num_outputs, D, seed=1) / D**0.5).requires_grad_()
        bias, labels = random(num_outputs, seed=2).requires_grad_(), torch.arange(ROWS, device=device) % num_outputs
        total, _ = linear_cross_entropy(hidden, weight, bias, labels, dtype=dtype, backend=backend)
        return [total, *torch.autograd.grad(total, (hidden, weight, bias))]

    def masks(backend: Backend) -> Results:
        sample = torch.arange(ROWS, device=device)
        return [masking.draw(replace(masking.rule_of(config), backend=backend), sample * 0, sample).masked.float()]

    def attention(backend: Backend) -> Results:
        S, H = config.num_patches + 1, model.num_heads
        qkv, bias = random(IMAGES, S, 3, H, D // H).to(dtype).requires_grad_(), random(H, S, S, seed=1).requires_grad_()
        out = relative_attention(qkv, bias, backend=backend)
        return [out, *torch.autograd.grad(out, (qkv, bias), random(*out.shape, seed=2).to(dtype))]

    trials: dict[str, Callable[[Backend], Results]] = dict(masked_embed=embedding)
    if config.mask != "none":
        trials["masks"] = masks
    if config.objective == "tokens":
        trials["loss"] = loss
    has_bias = model.relative_position != "none"
    chosen, _ = attention_choice("auto", device, config.num_patches + 1, model.width // model.num_heads, has_bias)
    if chosen == "triton":
        trials["attention"] = attention
    return trials
