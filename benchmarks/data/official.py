"""The authors' data loading, restated with Pillow, NumPy and torch: what the pipelines are measured against.

One image: decode to RGB, colour jitter of the whole image, flip, one random-resized-crop box, resized twice (bicubic
for patches, Lanczos for tokens), to tensors, normalised, and one blockwise mask. Orders and draws are those of
torchvision's `ColorJitter` and `RandomHorizontalFlip` (torch's generator) and of timm's `RandomResizedCrop` (Python's
`random`), with the arguments that the authors give them. The mask is by `fastbeit.masking.blockwise_mask`, which draws
the very masks of the authors' generator and is no slower than its loops over patches: the fairer peer of the two.
"""

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import Dataset

from fastbeit.data.index.reader import Index
from fastbeit.masking import blockwise_mask

SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
STRENGTH = 0.4
PATCH_SIZE, TOKEN_SIZE = 224, 112
MEAN = STD = 0.5
LOGIT_LAPLACE_EPS = 0.1  # of the dVAE's `map_pixels`
GRID, NUM_MASKED, MIN_BLOCK, MIN_ASPECT = (14, 14), 75, 16, 0.3
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
HUE = 3  # torchvision draws its turn, though its strength is 0


@dataclass(frozen=True)
class Box:
    top: int
    left: int
    height: int
    width: int


class ColorJitter:
    """Brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength], in random order."""

    def __init__(self, strength: float = STRENGTH) -> None:
        self.strength = strength

    def draw(self) -> tuple[list[int], list[float]]:
        """Order (numbers into `ENHANCERS`) and factors."""
        order = torch.randperm(len(ENHANCERS) + 1).tolist()
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        factors = [float(torch.empty(1).uniform_(low, high)) for _ in ENHANCERS]
        return [op for op in order if op != HUE], factors

    def __call__(self, image: Image.Image) -> Image.Image:
        order, factors = self.draw()
        for op in order:
            image = ENHANCERS[op](image).enhance(factors[op])
        return image


def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image


def draw_box(width: int, height: int) -> Box:
    for _ in range(TRIES):
        area = random.uniform(*SCALE) * width * height
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_width <= width and box_height <= height:
            top, left = random.randint(0, height - box_height), random.randint(0, width - box_width)
            return Box(top, left, box_height, box_width)
    # the largest box in the middle with a ratio in range
    box_width, box_height = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resized_crop(image: Image.Image, box: Box, side: int, resample: Image.Resampling) -> Image.Image:
    crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return crop.resize((side, side), resample)


def to_tensor(image: Image.Image) -> Tensor:
    """[3, h, w] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def normalize(pixels: Tensor) -> Tensor:
    mean, std = (torch.full((3, 1, 1), value) for value in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


def map_pixels(pixels: Tensor) -> Tensor:
    return (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS


def draw_mask() -> Tensor:
    return torch.from_numpy(blockwise_mask(random, GRID, NUM_MASKED, MIN_BLOCK, MIN_ASPECT).astype(np.int64))


class Transform:
    """From an RGB image to what a training step is given."""

    def __init__(self, jitter: bool = True, jitter_crop: bool = False, two_views: bool = True) -> None:
        """
        Args:
            jitter_crop: jitter the crop instead of the whole image, which the authors do not do.
        """
        self.jitter, self.jitter_crop, self.two_views = ColorJitter() if jitter else None, jitter_crop, two_views

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        """Patch view [3, 224, 224] and, when there are two, token view [3, 112, 112], float32; mask [14, 14] int64."""
        if self.jitter and not self.jitter_crop:
            image = self.jitter(image)
        image = flip(image)
        box = draw_box(*image.size)
        if self.jitter and self.jitter_crop:
            image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
            image, box = self.jitter(image), Box(0, 0, box.height, box.width)
        views = [normalize(to_tensor(resized_crop(image, box, PATCH_SIZE, Image.Resampling.BICUBIC)))]
        if self.two_views:
            views.append(map_pixels(to_tensor(resized_crop(image, box, TOKEN_SIZE, Image.Resampling.LANCZOS))))
        return *views, draw_mask()


class TorchvisionTransform:
    """As `Transform`, by the calls to torchvision that the authors make; the box is drawn as there."""

    def __init__(self, jitter: bool = True, jitter_crop: bool = False, two_views: bool = True) -> None:
        from torchvision import transforms  # pyright: ignore[reportMissingImports]

        assert not jitter_crop
        strengths = (STRENGTH, STRENGTH, STRENGTH) if jitter else ()
        self.before = transforms.Compose([transforms.ColorJitter(*strengths), transforms.RandomHorizontalFlip()])
        self.tensor, self.crop = transforms.ToTensor(), transforms.functional.resized_crop
        self.normalize = transforms.Normalize((MEAN,) * 3, (STD,) * 3)
        modes = transforms.InterpolationMode
        self.views = [(PATCH_SIZE, modes.BICUBIC, self.normalize), (TOKEN_SIZE, modes.LANCZOS, map_pixels)]
        self.num_views = 1 + two_views

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        image = self.before(image)
        box = draw_box(*image.size)
        place = box.top, box.left, box.height, box.width
        return *(
            last(self.tensor(self.crop(image, *place, (side, side), mode)))
            for side, mode, last in self.views[: self.num_views]
        ), draw_mask()


class Images(Dataset):
    """The images of an index, each opened as the authors' `ImageFolder` does, and transformed."""

    def __init__(self, index: Index, in_files: bool, transform: Callable[[Image.Image], Any]) -> None:
        self.index, self.in_files, self.transform = index, in_files, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        # the authors read files alone; out of shards, bytes come by our index
        with self.index.path(i).open("rb") if self.in_files else io.BytesIO(self.index.read_bytes(i)) as file:
            return self.transform(Image.open(file).convert("RGB"))
