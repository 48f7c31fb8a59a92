"""A loss scale for float16, whose smallest numbers are too large for gradients: dynamic, on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor

# of torch.amp.GradScaler, which the authors train with
FIRST, GROWTH, BACKOFF, STEPS_TO_GROW = 2.0**16, 2.0, 0.5, 2000
LEAST = 1.0  # it rises above it again; DeepSpeed's is the same, and GradScaler has none


class LossScale:
    """What the loss is multiplied by: halved where a gradient overflows, doubled after 2000 steps without.

    As torch.amp.GradScaler, by the same operator, but that whether a gradient is finite is known from its norm: another
    look at all gradients is saved. No value comes to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST, device=device)  # float32
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)  # steps since it changed
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)  # in the last step, and could be lowered

    def adjust(self, not_finite: Tensor) -> None:
        """After a step.

        Args:
            not_finite: whether its gradient was not; a bool scalar on the device.
        """
        self.overflowed = not_finite & (self.value > LEAST)
        torch._amp_update_scale_(  # pyright: ignore[reportPrivateImportUsage]
            self.value, self._growth_tracker, not_finite.float(), GROWTH, BACKOFF, STEPS_TO_GROW
        )
        self.value.clamp_(min=LEAST)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, on the host."""
        return {"loss_scale": self.value.cpu(), "growth_tracker": self._growth_tracker.cpu()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; nothing, where it comes from a part of the run that had no loss scale."""
        if "loss_scale" in state:
            self.value.copy_(state["loss_scale"])
            self._growth_tracker.copy_(state["growth_tracker"])
