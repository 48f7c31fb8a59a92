"""Parameter groups, learning-rate schedule and AdamW as the authors set them (Table 12); other optimizers likewise."""

import math
from typing import Any

import torch
from torch import nn

from fastbeit.config.sections import OptimConfig
from fastbeit.engine.sharded import shape_of
from fastbeit.errors import ConfigError
from fastbeit.train.muon import MuonAndAdamW, matrix_parts
from fastbeit.train.other_optimizers import APEX, make_apex, make_cpu_adam

NO_DECAY_TOKENS = ("cls_token", "pos_embed")  # the mask token, the bias table and the head do decay, as officially
STEM = ("cls_token", "mask_token", "pos_embed", "patch_embed")  # what is below the blocks


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, muon: bool = False
) -> list[dict[str, Any]]:
    """Split the parameters: no weight decay for vectors, biases, cls token and positions; decay for the rest.

    Args:
        layer_decay: each block learns so many times as fast as the one above it; what is below the blocks as one block
            more, what is above them at the full rate. `scale` of a group says how fast.
        muon: split them by `matrix_parts` too; `parts` of a group says how many, else 0.
    """
    top = len(getattr(model, "blocks", ())) + 1
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_still = len(shape_of(parameter)) == 1 or name.endswith(".bias") or name in NO_DECAY_TOKENS
        scale, parts = layer_decay ** (top - _layer_of(name, top)), matrix_parts(name, parameter) if muon else 0
        groups.setdefault((scale, not is_still, parts), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0, "scale": key[0], "parts": key[2]}
        for key in sorted(groups)
    ]


def _layer_of(name: str, top: int) -> int:
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in STEM else top


def make_optimizer(model: nn.Module, optim: OptimConfig, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for, of a model on its device.

    Raises:
        RunError: what it needs is not here.
    """
    groups = parameter_groups(model, optim.weight_decay, layer_decay, muon=optim.name == "muon")
    if optim.name in APEX:
        return make_apex(optim, groups, next(model.parameters()).device)
    if optim.name == "ds_cpu_adam":
        return make_cpu_adam(optim, groups)
    if optim.name == "muon":
        if not any(group["parts"] for group in groups):
            raise ConfigError("optim.name=muon is for the matrices of blocks, and this model has none; set adamw")
        return MuonAndAdamW(groups, optim.lr, optim.betas, optim.eps, optim.weight_decay)
    # its one kernel also clips and skips: see `clip_and_step`
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(step: int, num_steps: int, num_warmup: int, optim: OptimConfig) -> float:
    """Linear warmup from 0, then half a cosine to `min_lr`; step num_warmup - 1 and the next have the peak.

    Args:
        step: steps already taken, from 0.
        num_steps, num_warmup: of the whole run.
    """
    if step < num_warmup:
        return optim.lr * step / max(1, num_warmup - 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
