"""Augmentations of fine-tuning: RandAugment on bytes, random erasing on normalised pixels.

RandAugment (1909.13719) as timm's `rand-m9-mstd0.5-inc1`, which the authors' recipe names: its 15 operations, their
ranges and roundings, every operation with probability 1/2, on the view that was cropped, resized and mirrored. Random
erasing (1708.04896) as timm's mode `pixel`: a box of noise. What is drawn is a function of (seed, epoch, sample).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.data.sampling import Purpose, uniform
from fastbeit.data.to_device import move
from fastbeit_kernels.philox import philox

# one operation on one sample: its place in `OPS`, or -1 for none; how strong it is, in [-1, 1]
STEP = np.dtype([("op", np.int64), ("strength", np.float64)])
FULL_STRENGTH = 10.0  # magnitude of strength 1
APPLIED = 0.5  # probability of an operation that was chosen
MAX_ROTATION, MAX_SHEAR, MAX_SHIFT, MAX_ENHANCEMENT = 30.0, 0.3, 0.45, 0.9  # degrees, slope, share of a side, factor
ERASE_AREA = 0.02, 1 / 3  # share of the image
ERASE_RATIO = 0.3, 1 / 0.3  # height / width
ERASE_TRIES = 10
DRAWS_A_STEP = 8  # op, applied, negated, two of Box-Muller; in whole counters
Fill = tuple[int, int, int]


def draw_steps(seed: int, epoch, sample, num_ops: int, magnitude: float, magnitude_std: float) -> np.ndarray:
    """What RandAugment does to each sample, by timm's rule: operations are drawn with replacement, each is left out by
    probability 1/2; magnitudes are normal, cut to [0, 10]; what can go both ways goes either way.

    Returns:
        [n, num_ops] records of `STEP`.
    """
    draws = uniform(seed, Purpose.RAND_AUGMENT, epoch, sample, DRAWS_A_STEP * num_ops)
    chosen, applied, negated, radius, angle = draws.reshape(len(draws), num_ops, DRAWS_A_STEP).transpose(2, 0, 1)[:5]
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)
    steps = np.zeros(chosen.shape, STEP)
    op = (chosen * len(OPS)).astype(np.int64)
    steps["op"] = np.where(applied < APPLIED, op, -1)
    strength = np.clip(magnitude + magnitude_std * normal, 0, FULL_STRENGTH) / FULL_STRENGTH
    steps["strength"] = np.where(np.array([signed for _, signed in OPS])[op] & (negated < 0.5), -strength, strength)
    return steps


def rand_augment(view: np.ndarray, steps: np.ndarray, fill: Fill) -> np.ndarray:
    """Carry out a sample's steps.

    Args:
        view: [height, width, 3] uint8.
        steps: [num_ops] records of `STEP`.
        fill: colour of what comes in from outside.

    Returns:
        [height, width, 3] uint8; `view` itself when no step does anything.
    """
    wanted = steps[steps["op"] >= 0]
    if not len(wanted):
        return view
    image = Image.fromarray(view)
    for op, strength in wanted.tolist():
        image = OPS[op].apply(image, strength, fill)
    return np.asarray(image)


def fill_of(mean: Sequence[float]) -> Fill:
    """The colour that normalisation turns to grey, and that timm fills with."""
    red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
    return red, green, blue


class Op(NamedTuple):
    apply: Callable[[Image.Image, float, Fill], Image.Image]  # of RGB, by a strength in [-1, 1]
    signed: bool  # whether a strength may be negative


def _auto_contrast(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return image.rotate(strength * MAX_ROTATION, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    # strength 1 leaves no bit, as in timm: black. ImageOps.posterize does so too, but refuses to from Pillow 13 on
    dropped = 4 + int(strength * 4)
    return image.point([value >> dropped << dropped for value in range(256)] * 3)


def _solarize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(strength * 256))


def _solarize_add(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return image.point([value + int(strength * 110) if value < 128 else value for value in range(256)] * 3)


def _enhance(enhancer: Callable) -> Callable[[Image.Image, float, Fill], Image.Image]:
    return lambda image, strength, fill: enhancer(image).enhance(1 + strength * MAX_ENHANCEMENT)


def _shear_x(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, strength * MAX_SHEAR, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, strength * MAX_SHEAR, 1, 0), fill)


def _shift_x(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, strength * MAX_SHIFT * image.width, 0, 1, 0), fill)


def _shift_y(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, strength * MAX_SHIFT * image.height), fill)


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Pixel (x, y) is what stood at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


# in timm's order
OPS = (
    Op(_auto_contrast, False),
    Op(_equalize, False),
    Op(_invert, False),
    Op(_rotate, True),
    Op(_posterize, False),
    Op(_solarize, False),
    Op(_solarize_add, False),
    Op(_enhance(ImageEnhance.Color), True),
    Op(_enhance(ImageEnhance.Contrast), True),
    Op(_enhance(ImageEnhance.Brightness), True),
    Op(_enhance(ImageEnhance.Sharpness), True),
    Op(_shear_x, True),
    Op(_shear_y, True),
    Op(_shift_x, True),
    Op(_shift_y, True),
)


def draw_erasures(seed: int, epoch, sample, size: Size, probability: float) -> np.ndarray:
    """Boxes to be erased, by timm's rule: of ten tries at an area and a ratio the first that is smaller than the view.

    Counter 0 says whether, counter k + 1 gives try k: area, ratio, top, left.

    Returns:
        [n, 4] int64: top, left, height, width; the last two 0 where nothing is erased.
    """
    draws = uniform(seed, Purpose.ERASE_BOX, epoch, sample, 4 + 4 * ERASE_TRIES)
    erased, tries = draws[:, 0] < probability, draws[:, 4:].reshape(-1, ERASE_TRIES, 4)
    (least, most), (low, high) = ERASE_AREA, np.log(ERASE_RATIO)
    area = size[0] * size[1] * (least + (most - least) * tries[..., 0])
    ratio = np.exp(low + (high - low) * tries[..., 1])
    # np.rint rounds halves to even, as Python's round
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [n, tries]
    fits = (height < size[0]) & (width < size[1])
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    height, width, draws = height[rows, first], width[rows, first], tries[rows, first]
    top, left = np.floor(draws[:, 2] * (size[0] - height + 1)), np.floor(draws[:, 3] * (size[1] - width + 1))
    erased &= fits[rows, first]
    return (np.stack([top, left, height, width], axis=1) * erased[:, None]).astype(np.int64)


def erase_(images: Tensor, boxes: np.ndarray, seed: int, epoch: np.ndarray, sample: np.ndarray) -> Tensor:
    """Fill boxes with normal noise, each pixel and channel its own, in place; nothing waits for the device.

    Args:
        images: [B, height, width, 3] of any floating type, normalised.
        boxes: [B, 4] of `draw_erasures`.
        epoch, sample: [B] int64, what the boxes were drawn for.

    Returns:
        images.
    """
    rows = np.flatnonzero(boxes[:, 2] * boxes[:, 3])
    top, left, height, width = boxes[rows].T
    areas = height * width
    table = np.stack([rows, top, left, width, np.cumsum(areas) - areas, epoch[rows], sample[rows], areas])
    table = move(torch.from_numpy(table), images.device)
    num_pixels = int(areas.sum())
    # of each erased pixel: its box; that their number is said keeps the device from being asked
    box = table[:-1].repeat_interleave(table[-1], dim=1, output_size=num_pixels)  # [7, num_pixels]
    row, top, left, width, first, epochs, samples = box
    place = torch.arange(num_pixels, device=images.device) - first
    y, x = top + place // width, left + place % width
    purpose = torch.tensor(int(Purpose.ERASE_NOISE))
    words = philox(seed, y * images.shape[2] + x, purpose, epochs, samples)
    images[row, y, x] = torch.stack(_normal(*words)[:3], dim=1).to(images.dtype)
    return images


def _normal(*words: Tensor) -> list[Tensor]:
    """Normal numbers of random words, two of two (Box and Muller), float32; at most 5.8 in size."""
    numbers = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        # 24 bits are what float32 holds; the first never becomes 0
        radius = (-2 * (((first >> 8) + 1) * 2.0**-24).log()).sqrt()
        angle = (second >> 8) * (2 * math.pi * 2.0**-24)
        numbers += [radius * angle.cos(), radius * angle.sin()]
    return numbers
