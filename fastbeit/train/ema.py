"""The moving average of a model's weights (arXiv 2102.12092, A.2)."""

import copy

import torch
from torch import Tensor, nn

PREFIX = "average."  # of its weights in a checkpoint


class Average:
    """Weights that follow those of a model; early steps are forgotten sooner.

    Args:
        decay: None: there is no average, and `model` is None.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.model = None if decay is None else copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        if self.model is None or self.decay is None:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, weight)

    def weights(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": tensor for name, tensor in self.model.state_dict().items()} if self.model else {}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Of a checkpoint's weights, those that `weights` gave."""
        if self.model:
            mine = {name.removeprefix(PREFIX): one for name, one in weights.items() if name.startswith(PREFIX)}
            self.model.load_state_dict(mine)
