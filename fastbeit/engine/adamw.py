"""AdamW's step with clipping and skipping in its one kernel, and its moments by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def clip_and_step(optimizer: torch.optim.Optimizer, clip_grad: float) -> Tensor:
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


def read_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW remembers of each parameter, on the host: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
    return {
        f"{key}.{name}": value.detach().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """The inverse of `read_moments`."""
    for name, parameter in model.named_parameters():
        state = {"step": moments[f"step.{name}"].to(parameter.device, copy=True)}
        # in the parameter's memory format: the fused kernel walks both as they lie in memory
        state |= {key: torch.empty_like(parameter).copy_(moments[f"{key}.{name}"]) for key in MOMENTS}
        optimizer.state[parameter] = state
