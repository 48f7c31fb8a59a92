"""Weights for tests: far from the start of a training."""

import math

import torch


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Away from the start, where zeros and ones hide errors: weights that keep the variance, peaked attention."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "token" in name or "table" in name or "pos_embed" in name:
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=1.5 / math.sqrt(parameter[0].numel()))
