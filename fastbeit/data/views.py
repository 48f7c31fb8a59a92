"""From an image and its drawn augmentation to the two views: patch view (bicubic) and token view (Lanczos).

Jitter, crop, flip and resize, on one box for both views (authors' code; they flip the whole image before they draw the
box, which gives the same distribution). `pillow_views` is the definition. `torch_views` and DALI resize first and then
jitter the views: equal but for rounding, and clipping beside saturated regions. `torch_views` begins with a smaller
picture of the image where the box is large.

Contrast moves pixels towards the mean grey of the whole image, as the authors have it (jitter_on=full_image), or of the
crop (jitter_on=crop), which `torch_views` and DALI measure in each view, as they find it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from fastbeit.config.sections import Levels, Size
from fastbeit.data.decode import LUMA, Decoded

# one sample's augmentation; fields as `sampling.draw_crops`, `draw_flips` and `draw_jitters` give them
PLAN = np.dtype([("crop_box", np.int64, 4), ("flip", np.bool_), ("order", np.int64, 3), ("factors", np.float64, 3)])
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # numbered as in `sampling.JITTER_OPS`
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}  # torch's name: Pillow's
# pixels that a smaller picture keeps for each of a view, along a side. From 1.5 on every view of 66 is 39 dB or more
# from Pillow's (43 and 45 on average, 98.2 % of tokens are equal); at 1.25 the least is 36 dB, at 1 it is 32
SPARE = 1.5
# those that torch has: Lanczos came with 2.13, and Pillow does it before
TORCH_FILTERS = FILTERS if TorchVersion(torch.__version__) >= TorchVersion("2.13") else {"bicubic"}
LUMA32 = LUMA.astype(np.float32)


@dataclass(frozen=True)
class Rule:
    """What a run's plans are carried out by; sizes are height and width."""

    image_size: Size  # of the patch view
    token_size: Size | None  # None: no token view is made
    jitter_on: str  # full_image or crop
    patch_view: bool = True  # whether it is made
    levels: Levels = "high_byte"  # of 16-bit images, as `data.levels`

    def views(self) -> Iterator[tuple[Size, str]]:
        """Size and filter of each view that is made, in the order of the results."""
        if self.patch_view:
            yield self.image_size, "bicubic"
        if self.token_size:
            yield self.token_size, "lanczos"


def pillow_views(image: Image.Image, plan: np.void, rule: Rule) -> list[np.ndarray]:
    """The views as the authors make them; with jitter_on=crop only what contrast sees is another.

    Args:
        image: the whole image, RGB.
        plan: one record of `PLAN`.

    Returns:
        [height, width, 3] uint8 each.
    """
    top, left, height, width = (int(value) for value in plan["crop_box"])
    box = left, top, left + width, top + height
    # cropped before the resize, as torchvision does: resize(box=...) would look beyond the box
    image = _enhance(image.crop(box), plan) if rule.jitter_on == "crop" else _enhance(image, plan).crop(box)
    if plan["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [np.asarray(image.resize((size[1], size[0]), FILTERS[name])) for size, name in rule.views()]


def _enhance(image: Image.Image, plan: np.void) -> Image.Image:
    for op in plan["order"]:
        factor = float(plan["factors"][op])
        image = ENHANCERS[op](image).enhance(factor) if factor != 1 else image
    return image


def torch_views(decode_to: Callable[[int], Decoded], plan: np.void, rule: Rule) -> list[np.ndarray]:
    """As `pillow_views`, faster; `decode_to(reduce)` is the whole image, smaller if it can be."""
    crop_box, flip, jitters = plan["crop_box"].tolist(), bool(plan["flip"]), bool((plan["factors"] != 1).any())
    views = []
    for size, name in rule.views():
        # by the larger of both sizes, so that a view is the same whether or not the other one is made
        image = decode_to(reduction(crop_box, (max(size[0], rule.image_size[0]), max(size[1], rule.image_size[1]))))
        by_torch = image.reduce == 1 and name in TORCH_FILTERS
        view = (_resize_by_torch if by_torch else _resize_by_pillow)(image, crop_box, size, name)
        if jitters:
            view = jitter(view, plan, image.mean_grey if rule.jitter_on == "full_image" else None)
        views.append(np.stack(list(view[:, :, ::-1] if flip else view), axis=2))
    return views


def reduction(crop_box: Sequence[int], size: Size) -> int:
    """How much smaller than it is an image may be decoded for a view of this size of this box: 1, 2, 4 or 8."""
    spare = min(crop_box[2] / size[0], crop_box[3] / size[1]) / SPARE
    return next((reduce for reduce in (8, 4, 2) if spare >= reduce), 1)


def _resize_by_torch(image: Decoded, crop_box: Sequence[int], size: Size, name: str) -> np.ndarray:
    """[3, height, width] uint8: by planes, where jitter takes a third of the time."""
    top, left, height, width = crop_box
    # a copy, since torch wants memory that may be written
    crop = torch.from_numpy(image.pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
    return F.interpolate(crop, size, mode=name, antialias=True)[0].numpy()


def _resize_by_pillow(image: Decoded, crop_box: Sequence[int], size: Size, name: str) -> np.ndarray:
    """As `_resize_by_torch`; torch cannot begin between two pixels, as a box in a smaller picture may."""
    top, left, height, width = (side / image.reduce for side in crop_box)
    rows = slice(int(top), math.ceil(top + height))
    columns = slice(int(left), math.ceil(left + width))
    crop = Image.fromarray(np.ascontiguousarray(image.pixels[rows, columns]))
    top, left = top % 1, left % 1
    view = crop.resize((size[1], size[0]), FILTERS[name], box=(left, top, left + width, top + height))
    return np.asarray(view).transpose(2, 0, 1)


def jitter(view: np.ndarray, plan: np.void, grey: float | None) -> np.ndarray:
    """Carry out a plan's colour jitter on a view, [3, h, w] uint8; rounds down after each operation, as Pillow does.

    Args:
        grey: mean luma of the whole image, in [0, 255]; None: contrast takes that of the view, as it finds it.
    """
    # by NumPy: of arrays so small torch takes longer to find what to do than to do it
    pixels = view.reshape(3, -1).astype(np.float32)
    for op, factor in zip(plan["order"].tolist(), plan["factors"][plan["order"]].tolist(), strict=True):
        shift = None
        if op == BRIGHTNESS and grey is not None:
            grey *= factor
        elif op == CONTRAST:
            shift = (1 - factor) * int((_mean_luma(pixels.reshape(view.shape)) if grey is None else grey) + 0.5)
        elif op == SATURATION:
            shift = (1 - factor) * LUMA32 @ pixels  # [h w]
        pixels *= factor
        if shift is not None:
            pixels += shift
        if factor > 1:
            np.clip(pixels, 0, 255, out=pixels)
        np.floor(pixels, out=pixels)
    return pixels.astype(np.uint8).reshape(view.shape)


def _mean_luma(pixels: np.ndarray) -> float:
    """Of [3, h, w] whole numbers in float32: the sum of a row is exact, and so is that of the rows."""
    return float(pixels.sum(axis=2).sum(axis=1, dtype=np.float64) @ LUMA) / pixels[0].size
