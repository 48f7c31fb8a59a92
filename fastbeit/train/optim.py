"""Parameter groups, learning-rate schedule and AdamW as the authors set them (Table 12)."""

import math

import torch
from torch import Tensor, nn

from fastbeit.config.sections import OptimConfig

MAX_SKIPPED_IN_A_ROW = 5  # updates with a gradient that is not finite, after which a run is stopped
MOMENTS = ("exp_avg", "exp_avg_sq")
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


def clip_and_step(optimizer: torch.optim.AdamW, clip_grad: float) -> Tensor:
    """One update with clipped gradients, or none if a gradient is not finite; no value comes to the host.

    The fused kernel divides gradients by `grad_scale` and does nothing where `found_inf` is set: clipping costs no
    pass over memory of its own, and a NaN reaches neither weights nor moments.

    Args:
        clip_grad: largest norm of the gradient; 0: no clipping.

    Returns:
        The gradient's norm before clipping, a float32 scalar on the device; not finite where the update was skipped.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # 1e-6 as in torch.nn.utils.clip_grad_norm_
    grad_scale = ((norm + 1e-6) / clip_grad).clamp_min(1.0) if clip_grad else None
    # where torch.amp.GradScaler leaves them for a fused optimizer
    vars(optimizer).update(grad_scale=grad_scale, found_inf=(~torch.isfinite(norm)).float())
    optimizer.step()
    optimizer.zero_grad()
    return norm


def read_moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What AdamW remembers of each parameter, on the host: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
    return {
        f"{key}.{name}": value.detach().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def write_moments(model: nn.Module, optimizer: torch.optim.AdamW, moments: dict[str, Tensor]) -> None:
    """The inverse of `read_moments`."""
    for name, parameter in model.named_parameters():
        state = {"step": moments[f"step.{name}"].to(parameter.device, copy=True)}
        # in the parameter's memory format: the fused kernel walks both as they lie in memory
        state |= {key: torch.empty_like(parameter).copy_(moments[f"{key}.{name}"]) for key in MOMENTS}
        optimizer.state[parameter] = state
