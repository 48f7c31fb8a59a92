"""Mixup (1710.09412) and CutMix (1905.04899), as timm's mode `batch`, which the authors' recipe names.

A rank mixes its images of a step with one another, the first with the last: another number of ranks makes other pairs.
What is drawn is a function of (seed, step, rank).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.finetune import AugmentConfig
from fastbeit.config.sections import Size
from fastbeit.data.sampling import Purpose

Box = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Mix:
    """How the images of a step are mixed."""

    share: float  # that an image keeps of itself
    box: Box | None  # what CutMix takes from the other; None: Mixup


def draw_mix(augment: AugmentConfig, seed: int, step: int, rank: int, size: Size) -> Mix:
    """Whether Mixup or CutMix, and how much, for the images of one rank in one step.

    Args:
        size: of an image, height and width.
    """
    random = np.random.default_rng(np.random.SeedSequence((seed, Purpose.MIX, step, rank)))
    apply, switch, *centre = random.random(4)
    if apply >= augment.mix_prob or not (augment.mixup or augment.cutmix):
        return Mix(1.0, None)
    cuts = augment.cutmix and (not augment.mixup or switch < augment.cutmix_share)
    alpha = augment.cutmix if cuts else augment.mixup
    share = float(random.beta(alpha, alpha))
    if not cuts:
        return Mix(share, None)
    top, bottom = _span(size[0], share, centre[0])
    left, right = _span(size[1], share, centre[1])
    # the box is cut off at the border, so that the share follows from it
    return Mix(1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right))


def _span(side: int, share: float, centre: float) -> tuple[int, int]:
    half, middle = int(side * (1 - share) ** 0.5) // 2, int(centre * side)
    return max(0, middle - half), min(side, middle + half)


def mix(pixels: Tensor, labels: Tensor, how: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        pixels: [B, height, width, 3] of a floating type.
        labels: [B].

    Returns:
        Mixed pixels, a tensor of their own; [B] labels of what was mixed in; [B] float32 share that is the image's own.
    """
    others = pixels.flip(0)
    if how.box:
        top, bottom, left, right = how.box
        mixed = pixels.clone()
        mixed[:, top:bottom, left:right] = others[:, top:bottom, left:right]
    else:
        mixed = torch.lerp(others, pixels, how.share)
    return mixed, labels.flip(0), torch.full((len(labels),), how.share, device=labels.device)
