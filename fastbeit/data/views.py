"""From an RGB image and its drawn augmentation to the two views: patch view (bicubic) and token view (Lanczos).

Jitter, crop, flip and resize, on one box for both views (authors' code; they flip the whole image before they draw the
box, which gives the same distribution). `pillow_views` is the definition. `torch_views` and DALI resize first and then
jitter the views, with the mean grey of the whole image: equal but for rounding, and clipping beside saturated regions.
"""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F

from fastbeit.data.decode import LUMA, mean_grey

# one sample's augmentation; fields as `sampling.draw_crops`, `draw_flips` and `draw_jitters` give them
PLAN = np.dtype([("box", np.int64, 4), ("flip", np.bool_), ("order", np.int64, 3), ("factors", np.float64, 3)])
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # numbered as in `sampling.JITTER_OPS`
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
Size = tuple[int, int]


def pillow_views(
    image: Image.Image, plan: np.void, patch_size: Size | None, token_size: Size | None
) -> list[np.ndarray]:
    """The patch view and the token view, those that are wanted, as the authors make them.

    Args:
        image: the whole image, RGB.
        plan: one record of `PLAN`.
        patch_size, token_size: height and width of the views; None: not wanted.

    Returns:
        [height, width, 3] uint8 each.
    """
    for op in plan["order"]:
        factor = float(plan["factors"][op])
        image = ENHANCERS[op](image).enhance(factor) if factor != 1 else image
    top, left, height, width = (int(value) for value in plan["box"])
    # cropped first, as torchvision does: resize(box=...) would look beyond the box
    crop = image.crop((left, top, left + width, top + height))
    if plan["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    filters = (patch_size, Image.Resampling.BICUBIC), (token_size, Image.Resampling.LANCZOS)
    return [_resize(crop, size, resample) for size, resample in filters if size]


def _resize(image: Image.Image, size: Size, resample: Image.Resampling) -> np.ndarray:
    height, width = size
    return np.asarray(image.resize((width, height), resample))


def torch_views(pixels: np.ndarray, plan: np.void, patch_size: Size | None, token_size: Size | None) -> list[Tensor]:
    """As `pillow_views`, faster; `pixels` is the whole image, [H, W, 3] uint8."""
    top, left, height, width = plan["box"]
    # a copy, since torch wants memory that may be written
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
    filters = (patch_size, "bicubic"), (token_size, "lanczos")
    views = [F.interpolate(crop, size, mode=mode, antialias=True) for size, mode in filters if size]
    if np.any(plan["factors"] != 1):
        rounds = jitter_rounds(np.array([plan]), np.array([mean_grey(pixels)]))
        views = [jitter(view, rounds) for view in views]
    return [(view.flip(3) if plan["flip"] else view)[0].permute(1, 2, 0) for view in views]


def jitter_rounds(plans: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """The drawn operations as numbers: in round r, pixel <- scale * pixel + luma * its grey + shift.

    Args:
        plans: [n] records of `PLAN`.
        grey: [n] mean luma of the whole images, in [0, 255].

    Returns:
        [n, 3 rounds, (scale, luma, shift)] float64.
    """
    rounds = np.zeros((len(plans), 3, 3))
    for row, (plan, mean) in enumerate(zip(plans, grey, strict=True)):
        for number, op in enumerate(plan["order"]):
            factor = plan["factors"][op]
            rounds[row, number, 0] = factor
            if op == BRIGHTNESS:
                mean = mean * factor
            elif op == CONTRAST:
                rounds[row, number, 2] = (1 - factor) * int(mean + 0.5)
            else:
                rounds[row, number, 1] = 1 - factor
    return rounds


def jitter(images: Tensor, rounds: np.ndarray) -> Tensor:
    """Apply `jitter_rounds` to [n, 3, h, w] uint8 images on any device; rounds down after each, as Pillow does."""
    pixels = images.flatten(2).float()  # [n, 3, h w]
    for number in range(3):
        scale, luma, shift = (
            torch.tensor(rounds[:, number, :, None, None], dtype=torch.float32).to(images.device).unbind(1)
        )
        # sums of products, one operation at a time: the same bits on any number of threads
        if rounds[:, number, 1].any():
            red, green, blue = pixels.split(1, dim=1)
            grey = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]  # [n, 1, h w]
            shift = grey * luma + shift
        pixels.mul_(scale).add_(shift).clamp_(0, 255).floor_()
    return pixels.to(torch.uint8).view(images.shape)
