"""A linear classifier on the frozen features of each block, as the authors train it (their run_linear_eval).

All blocks' heads are trained at once; none knows of the others. Features are computed once, where the authors draw a
crop and a flip of each image anew in each epoch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.data.progress import reported

INIT_STD = 0.01
TOP = 5


@dataclass(frozen=True)
class Recipe:
    """The authors'; with cosine decay to 0 and no warmup."""

    epochs: int = 100
    lr: float = 4e-3
    batch_size: int = 1024
    weight_decay: float = 1e-4


class Heads(NamedTuple):
    weight: Tensor  # [L, C, F]
    bias: Tensor  # [L, C]

    def logits(self, values: Tensor) -> Tensor:
        """[b, L, C] of features [b, L, F]."""
        return torch.einsum("blf,lcf->blc", values, self.weight) + self.bias


def train_heads(
    values: Tensor, rows: Tensor, num_classes: int, recipe: Recipe, seed: int, device: torch.device
) -> Heads:
    """
    Args:
        values: [n, L, F] features.
        rows: [n] int64, their classes.
        seed: of the start, which is the same for all blocks, and then of the order of each epoch.
    """
    random, (num_images, num_blocks, num_features) = torch.Generator().manual_seed(seed), values.shape
    start = INIT_STD * torch.randn(num_classes, num_features, generator=random, dtype=values.dtype)
    weight = start.to(device).repeat(num_blocks, 1, 1).requires_grad_()
    heads = Heads(weight, weight.new_zeros(num_blocks, num_classes).requires_grad_())
    optimizer = torch.optim.AdamW(heads, lr=recipe.lr, weight_decay=recipe.weight_decay)
    step, num_steps = 0, recipe.epochs * math.ceil(num_images / recipe.batch_size)
    for _ in reported(range(recipe.epochs), "linear probe, epochs", recipe.epochs):
        for batch in torch.randperm(num_images, generator=random).split(recipe.batch_size):
            optimizer.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * step / num_steps)) / 2
            logits = heads.logits(values[batch].to(device))
            wanted = rows[batch].to(device)[:, None].expand(-1, num_blocks)
            # a sum over blocks of means over images
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return Heads(*(one.detach() for one in heads))


@torch.no_grad()
def accuracy(heads: Heads, values: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """[L, 2]: of each block the share of images whose class is the likeliest, or among the five likeliest."""
    found, device = torch.zeros(values.shape[1], 2, dtype=torch.float64), heads.weight.device
    for some, wanted in zip(values.split(batch_size), rows.split(batch_size), strict=True):
        logits = heads.logits(some.to(device))
        hits = logits.topk(min(TOP, logits.shape[2]), dim=2).indices == wanted.to(device)[:, None, None]
        found += torch.stack([hits[:, :, 0].sum(0), hits.sum((0, 2))], dim=1).cpu()
    return found / len(rows)
