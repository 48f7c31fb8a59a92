"""Which patches are hidden: blockwise (Algorithm 1, as the authors' code draws it) or random, in fixed slots (D3).

The code differs from the paper's Algorithm 1: a mask never holds more than `num_masked` patches and may hold fewer. A
block that would go over is drawn again, and after `ATTEMPTS` draws in vain the mask is left as it is.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastbeit.config import MaskingConfig
from fastbeit.data.sampling import Purpose, uniform

ATTEMPTS = 10  # draws for one block before the mask is left as it is
WORDS = 4  # random numbers an attempt: area, aspect ratio, top, left; one Philox counter
ATTEMPTS_A_CALL = 8  # Philox is called for so many attempts at once: a mask takes about 11
UNUSED = -100  # label of a slot that the loss leaves out


@dataclass(frozen=True)
class Masks:
    """Masked patches in slots: `masked_idx[b, :num_masked[b]]` are masked, in row-major order.

    The slots after them hold unmasked patches, so that no patch stands twice in an image.
    """

    masked_idx: Tensor  # [B, M] int64
    num_masked: Tensor  # [B] int64, at most M

    def to(self, device: torch.device) -> "Masks":
        return Masks(*(t.to(device, non_blocking=True) for t in (self.masked_idx, self.num_masked)))


@dataclass(frozen=True)
class Prediction:
    """What the model is given beside the images."""

    masked: Tensor  # [B, N] bool: patches that the model does not see
    predict_idx: Tensor  # [B, M] int64: patches that it predicts, distinct in an image
    labels: Tensor  # [B, M] int64: their visual tokens, UNUSED in slots that the loss leaves out


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


def draw_masks(
    kind: Literal["blockwise", "random", "none"],
    masking: MaskingConfig,
    grid: tuple[int, int],
    seed: int,
    epoch: ArrayLike,
    sample: ArrayLike,
) -> Masks:
    """The masks of some samples: a function of (seed, epoch, sample), not of the batch they stand in.

    Args:
        kind: blockwise: at most `masking.num_masked` patches in blocks; random: exactly so many; none: no slots at all.
        epoch, sample: [B] integers; one epoch may stand for all.
    """
    epoch, sample = np.broadcast_arrays(epoch, sample)
    if kind == "blockwise":
        mask = _blockwise_masks(masking, grid, seed, epoch, sample)
    elif kind == "random":
        mask = _random_masks(masking.num_masked, grid, seed, epoch, sample)
    else:
        mask = np.zeros((len(sample), 0), dtype=bool)
    # a stable sort puts the masked patches first, and each part in row-major order
    slots = np.argsort(~mask, axis=1, kind="stable")[:, : masking.num_masked]
    return Masks(torch.from_numpy(slots), torch.from_numpy(mask.sum(1)))


def _random_masks(
    num_masked: int, grid: tuple[int, int], seed: int, epoch: np.ndarray, sample: np.ndarray
) -> np.ndarray:
    """[B, N] bool: the patches with the smallest keys."""
    keys = uniform(seed, Purpose.MASK, epoch, sample, grid[0] * grid[1])
    mask = np.zeros(keys.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(keys, axis=1, kind="stable")[:, :num_masked], True, axis=1)
    return mask


def _blockwise_masks(
    masking: MaskingConfig, grid: tuple[int, int], seed: int, epoch: np.ndarray, sample: np.ndarray
) -> np.ndarray:
    """[B, N] bool, `blockwise_mask` for all samples in step: attempt k of a sample uses its Philox counter k."""
    masks = np.zeros((len(sample), *grid), dtype=bool)
    budgets = np.full(len(sample), masking.num_masked)
    failures = np.zeros(len(sample), dtype=np.int64)  # attempts in vain since the last block
    draws = np.zeros((len(sample), ATTEMPTS_A_CALL, WORDS))
    rows = np.arange(len(sample))  # samples that still draw
    attempt = 0
    while len(rows):
        place = attempt % ATTEMPTS_A_CALL
        if place == 0:
            numbers = ATTEMPTS_A_CALL * WORDS, attempt * WORDS
            draws[rows] = uniform(seed, Purpose.MASK, epoch[rows], sample[rows], *numbers).reshape(-1, *draws.shape[1:])
        budget = budgets[rows]
        fresh = _draw_blocks(draws[rows, place], budget, masking, grid) & ~masks[rows]
        gain = np.count_nonzero(fresh, axis=(1, 2))
        accepted = (gain > 0) & (gain <= budget)
        masks[rows[accepted]] |= fresh[accepted]
        budgets[rows] -= gain * accepted
        failures[rows] = np.where(accepted, 0, failures[rows] + 1)
        rows = rows[(budgets[rows] > 0) & (failures[rows] < ATTEMPTS)]
        attempt += 1
    return masks.reshape(len(sample), grid[0] * grid[1])


def _draw_blocks(draws: np.ndarray, budget: np.ndarray, masking: MaskingConfig, grid: tuple[int, int]) -> np.ndarray:
    """[n, height, width] bool: a block for each row of `draws` [n, 4]; empty where it does not fit."""
    log_aspect = math.log(masking.min_aspect)
    area = masking.min_block + (budget - masking.min_block) * draws[:, 0]
    aspect = np.exp(log_aspect + (-log_aspect - log_aspect) * draws[:, 1])
    size = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)))  # [n, 2]
    fits = (size < grid).all(axis=1, keepdims=True)
    first = np.floor(draws[:, 2:] * (np.array(grid) - size + 1))  # [n, 2]: top, left
    end = first + size
    y, x = np.arange(grid[0]), np.arange(grid[1])
    in_height = (y >= first[:, :1]) & (y < end[:, :1]) & fits
    in_width = (x >= first[:, 1:]) & (x < end[:, 1:])
    return in_height[:, :, None] & in_width[:, None, :]


def plan_prediction(
    masks: Masks, num_patches: int, predict: Literal["masked", "all"], visual_tokens: Tensor | None = None
) -> Prediction:
    """What to hide, what to predict, and the labels (Table 4: masked patches only, or all of them).

    Args:
        visual_tokens: [B, N] int64; None when pixels are regressed: the label of a used slot is then 0.
    """
    slots, num_masked = masks.masked_idx, masks.num_masked
    used = torch.arange(slots.shape[1], device=slots.device) < num_masked[:, None]  # [B, M]
    masked = torch.zeros(len(slots), num_patches, dtype=torch.bool, device=slots.device).scatter_(1, slots, used)
    if predict == "all":
        slots = torch.arange(num_patches, device=slots.device).expand(len(slots), -1)
        used = torch.ones_like(masked)
    labels = torch.zeros_like(slots) if visual_tokens is None else visual_tokens.gather(1, slots)
    return Prediction(masked, slots, labels.masked_fill(~used, UNUSED))
