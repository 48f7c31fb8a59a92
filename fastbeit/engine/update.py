"""One update of the weights by any optimizer, with clipped gradients; none where they are not finite.

All ranks have the same gradients, summed over them, so what is decided here is decided alike.
"""

import torch
from torch import Tensor, nn

from fastbeit.engine.loss_scale import LossScale


def clip_and_step(optimizer: torch.optim.Optimizer, clip_grad: float, scale: LossScale | None = None) -> Tensor:
    """One update with clipped gradients, or none if a gradient is not finite: neither weights nor moments change then.

    PyTorch's fused AdamW divides gradients by `grad_scale` and does nothing where `found_inf` is set: clipping and the
    loss scale cost no pass over memory of their own, and no value comes to the host. For other optimizers the gradients
    are divided in place, and the host waits for their norm, to know whether to step.

    Args:
        clip_grad: largest norm of the gradient; 0: no clipping.
        scale: what the loss was multiplied by; it is adjusted. None: by nothing.

    Returns:
        The gradient's norm before clipping, without the loss scale, a float32 scalar on the device; not finite where
        the update was skipped.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if scale:
        norm = norm / scale.value
    # 1e-6 as in torch.nn.utils.clip_grad_norm_
    divisor = ((norm + 1e-6) / clip_grad).clamp_min(1.0) if clip_grad else None
    if scale:
        divisor = scale.value if divisor is None else scale.value * divisor
    not_finite = ~torch.isfinite(norm)
    # the mark of PyTorch's optimizers that take both
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # where torch.amp.GradScaler leaves them
        vars(optimizer).update(grad_scale=divisor, found_inf=not_finite.float())
        optimizer.step()
    elif not not_finite.item():
        if divisor is not None:
            torch._foreach_div_(gradients, divisor)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
    if scale:
        scale.adjust(not_finite)
    optimizer.zero_grad()
    return norm
