"""Which implementation of each fused operator a run takes: as set, or what runs on its device and is right there.

"auto" tries each Triton kernel once, at the model's widths, forward and backward, against float64 (`trials.py`). What a
card refuses (too little shared memory, a compiler that fails), and what is wrong there, is replaced by plain PyTorch
and said; what the configuration asks for by name and does not run ends the run before it begins.
"""

from dataclasses import asdict, replace
from typing import Any

import torch

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import AttentionBackend, Kernels, KernelsConfig
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.model.attention import attention_choice, check_attention
from fastbeit.model.trials import Results, trials_of, tried
from fastbeit_kernels.backend import HAS_TRITON, Backend, check_backend, uses_triton

OLDEST = (8, 0)  # Ampere: older cards have no bfloat16 in their matrix units, and nothing was tried on one


def chosen_kernels(config: Config, num_outputs: int, world: World) -> tuple[Config, list[str]]:
    """The configuration with each operator's implementation named, alike on all ranks; and lines that say why.

    Raises:
        ConfigError: what is set does not run; on all ranks.
    """
    device, dtype = world.device, compute_dtype(config.engine, world.device)
    wanted = config.kernels.by_op
    refused = _refusals(config, wanted, num_outputs, device, dtype)
    first = {op: why for told in world.gather([refused]) for op, why in told.items()}
    for op, why in first.items():
        if getattr(wanted, op) != "auto":
            key = op if getattr(config.kernels, op) else "backend"
            raise ConfigError(f"kernels.{key}={getattr(wanted, op)}: {why}")
    attention, reason = _chosen_attention(config, device)
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
                refused |= _attention_refusal(config, backend, device, dtype)
            else:
                check_backend(backend, device)
        except (ValueError, ModuleNotFoundError) as err:
            if backend != "auto":
                refused[op] = str(err)
    if not _tries(device):
        return refused
    too_old = not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST
    wanted = replace(wanted, attention=_chosen_attention(config, device)[0])
    for kind in dict.fromkeys((dtype, torch.float32)):  # a validation computes in float32
        for op, trial in trials_of(config, num_outputs, device, kind).items():
            if getattr(wanted, op) in ("auto", "triton") and op not in refused:
                why = tried(_too_old if too_old else trial, "triton", kind).wrong
                refused |= {op: why} if why else {}
    return refused


def _tries(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


def _chosen_attention(config: Config, device: torch.device) -> tuple[AttentionBackend, str]:
    model, has_bias = config.model, config.model.relative_position != "none"
    shape = config.num_patches + 1, model.width // model.num_heads
    return attention_choice(config.kernels.by_op.attention, device, *shape, has_bias)


def _attention_refusal(
    config: Config, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    if backend == "auto":
        return {}
    model = config.model
    why = check_attention(
        backend, device, dtype, config.num_patches + 1, model.num_heads, model.width // model.num_heads
    )
    return {"attention": why} if why else {}


def _too_old(how: str) -> Results:
    raise RuntimeError(f"it is for cards of compute capability {OLDEST[0]}.{OLDEST[1]} and newer")
