"""An optimizer with the habits of apex's, for a CPU."""

from typing import Any

import torch


class GroupStep(torch.optim.Optimizer):
    """Adam whose step is a number of the group, whose `zero_grad` takes nothing, and which knows no `found_inf`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    def zero_grad(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - apex's
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closures
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if not (state := self.state[parameter]):
                    state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                mean, square, grad = state["exp_avg"], state["exp_avg_sq"], parameter.grad
                mean.lerp_(grad, 0.1)
                square.lerp_(grad.square(), 0.001)
                corrected = square / (1 - 0.999 ** group["step"])
                parameter.sub_(group["lr"] * mean / (1 - 0.9 ** group["step"]) / (corrected.sqrt() + 1e-8))
