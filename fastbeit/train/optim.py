"""Parameter groups, learning-rate schedule and AdamW as the authors set them (Table 12)."""

import math

import torch
from torch import nn

from fastbeit.config.sections import OptimConfig

NO_DECAY_TOKENS = ("cls_token", "pos_embed")  # the mask token, the bias table and the head do decay, as officially


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters in two: no decay for vectors, biases, cls token and positions; decay for the rest."""
    still, decayed = [], []
    for name, parameter in model.named_parameters():
        is_still = parameter.ndim == 1 or name.endswith(".bias") or name in NO_DECAY_TOKENS
        (still if is_still else decayed).append(parameter)
    return [{"params": still, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW whose one kernel also clips and skips: see `clip_and_step`."""
    groups = parameter_groups(model, optim.weight_decay)
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
        group["lr"] = lr
