"""Which patches are hidden: blockwise (Algorithm 1, as the authors' code draws it) or random, in fixed slots.

The code differs from the paper's Algorithm 1: a mask never holds more than `num_masked` patches and may hold fewer. A
block that would go over is drawn again, and after `ATTEMPTS` draws in vain the mask is left as it is.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.config.running import Backend
from fastbeit.config.sections import MaskingConfig
from fastbeit.errors import ConfigError
from fastbeit_kernels.block_masks import ATTEMPTS, block_masks, random_masks
from fastbeit_kernels.cross_entropy import IGNORE_INDEX

UNUSED = IGNORE_INDEX  # label of a slot that the loss leaves out
NUM_TRIED = 256  # masks, before a run: enough for shares to the percent
SMALL_SHARE = 0.2  # of the patches; the paper hides 0.4


@dataclass(frozen=True)
class Masks:
    """Masked patches in slots: `masked_idx[b, :num_masked[b]]` are masked, in row-major order.

    The slots after them hold unmasked patches, so that no patch stands twice in an image.
    """

    masked_idx: Tensor  # [B, M] int64
    num_masked: Tensor  # [B] int64, at most M


@dataclass(frozen=True)
class Slots:
    """Which patches the model does not see, and which it predicts, in as many slots for each image."""

    masked: Tensor  # [B, N] bool
    predict_idx: Tensor  # [B, M] int64, distinct in an image
    used: Tensor  # [B, M] bool: slots that the loss looks at


@dataclass(frozen=True)
class MaskRule:
    """How a run masks."""

    kind: Literal["blockwise", "random", "none"]
    masking: MaskingConfig
    grid: tuple[int, int]
    seed: int
    predict: Literal["masked", "all"] = "masked"
    backend: Backend = "auto"

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_masked(self) -> int:
        return self.masking.num_masked_of(self.num_patches)

    @property
    def min_block(self) -> int:
        return self.masking.min_block_of(self.num_patches)


def rule_of(config: Config) -> MaskRule:
    return MaskRule(config.mask, config.masking, config.grid, config.seed, config.predict, config.kernels.by_op.masks)


def draw(rule: MaskRule, epoch: Tensor, sample: Tensor) -> Slots:
    """The slots of some samples, [B] int64, on their device: a function of (seed, epoch, sample)."""
    masks = draw_masks(rule, epoch, sample)
    return slots_of(masks, rule.num_patches, rule.predict)


def label(slots: Slots, tokens: Tensor | None) -> Tensor:
    """What is to be predicted in each slot, [B, M] int64: its visual token, or UNUSED.

    Args:
        tokens: [B, M] int64 of the slots; None when pixels are regressed: the label of a used slot is then 0.
    """
    labels = torch.zeros_like(slots.predict_idx) if tokens is None else tokens
    return labels.masked_fill(~slots.used, UNUSED)


def blockwise_mask(rng, grid: tuple[int, int], num_masked: int, min_block: int, min_aspect: float) -> np.ndarray:
    """One mask, drawn as the authors' `MaskingGenerator` draws it, to the random number.

    Args:
        rng: gives `uniform(a, b)` and the inclusive `randint(a, b)`, as `random.Random` does.

    Returns:
        [height, width] bool.
    """
    mask = np.zeros(grid, dtype=bool)
    while (budget := num_masked - int(mask.sum())) > 0:
        block = _draw_block(rng, mask, budget, min_block, math.log(min_aspect))
        if block is None:
            break
        mask[block] = True
    return mask


def _draw_block(rng, mask: np.ndarray, budget: int, min_block: int, log_aspect: float) -> tuple[slice, slice] | None:
    """A block with 1 to `budget` patches that are not masked yet; None when `ATTEMPTS` draws give none."""
    for _ in range(ATTEMPTS):
        area = rng.uniform(min_block, budget)  # the bounds may be in reverse
        aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < mask.shape[0] and width < mask.shape[1]:
            top, left = rng.randint(0, mask.shape[0] - height), rng.randint(0, mask.shape[1] - width)
            block = slice(top, top + height), slice(left, left + width)
            if 0 < height * width - mask[block].sum() <= budget:
                return block
    return None


def draw_masks(rule: MaskRule, epoch: Tensor, sample: Tensor) -> Masks:
    """The masks of some samples, on their device: a function of (seed, epoch, sample), not of the batch they stand in.

    `rule.kind` is blockwise: at most `num_masked` patches in blocks; random: exactly so many; none: no slots at all.

    Args:
        epoch, sample: [B] int64.
    """
    place = rule.seed, epoch, sample, rule.grid
    if rule.kind == "none":
        return Masks(sample.new_empty(len(sample), 0), torch.zeros_like(sample))
    if rule.kind == "random":
        return Masks(*random_masks(*place, rule.num_masked, rule.backend))
    blocks = rule.num_masked, rule.min_block, rule.masking.min_aspect
    return Masks(*block_masks(*place, *blocks, rule.backend))


def try_rule(rule: MaskRule) -> list[str]:
    """Draw the first masks of a run, by the reference; what a user should know of them, a line each.

    Raises:
        ConfigError: most of them hide nothing.
    """
    if rule.kind == "none":
        return []
    sample = torch.arange(NUM_TRIED)
    counts = draw_masks(replace(rule, backend="reference"), torch.zeros_like(sample), sample).num_masked.double()
    (height, width), mean, empty = rule.grid, counts.mean().item(), (counts == 0).double().mean().item()
    room = (
        f"blocks have {rule.min_block} patches or more (masking.min_block), and must be smaller than the grid of "
        f"{height}x{width} on both sides: lower masking.min_block"
    )
    if empty > 0.5:
        raise ConfigError(f"{empty:.0%} of the first {NUM_TRIED} masks hide no patch: {room}")
    lines = []
    if mean < rule.num_masked / 2:
        lines.append(
            f"WARNING: masks hide {mean:.1f} patches on average, less than half of the {rule.num_masked} that "
            f"masking asks for, and {empty:.0%} of them none; {room}"
        )
    if mean < SMALL_SHARE * rule.num_patches:
        lines.append(
            f"WARNING: only {mean / rule.num_patches:.0%} of the patches are hidden, {mean:.1f} of {rule.num_patches}; "
            "the paper hides 40 %, and fewer are easier to guess from what lies around them: masking.ratio=0.4"
        )
    return lines


def slots_of(masks: Masks, num_patches: int, predict: Literal["masked", "all"]) -> Slots:
    """What to hide and what to predict (Table 4: masked patches only, or all of them)."""
    slots, num_masked = masks.masked_idx, masks.num_masked
    used = torch.arange(slots.shape[1], device=slots.device) < num_masked[:, None]  # [B, M]
    masked = torch.zeros(len(slots), num_patches, dtype=torch.bool, device=slots.device).scatter_(1, slots, used)
    if predict == "all":
        slots = torch.arange(num_patches, device=slots.device).expand(len(slots), -1)
        used = torch.ones_like(masked)
    return Slots(masked, slots, used)
