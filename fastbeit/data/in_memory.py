"""Images that a program hands over, as an evaluation sees them: decoded by the same rules, and the middle cut out."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from fastbeit.config.sections import DataConfig, Levels
from fastbeit.data.decode import decode, read_header
from fastbeit.data.labelled import centre_crop
from fastbeit.errors import BadImage, DataError

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor


def one_by_one(images: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """Of one image, of several in an array [B, ...], or of any iterable."""
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        yield images
    else:
        yield from images


def view_of(image: Picture, data: DataConfig) -> np.ndarray:
    """[height, width, 3] uint8 of `data.image_size`.

    Args:
        image: a path; a PIL image; uint8 [height, width, 3], of a tensor [3, height, width] too.

    Raises:
        DataError: there is no such file (66), or it is no image that can be used.
        ValueError: an array of another shape or dtype.
    """
    return centre_crop(_opened(image, data.levels), data.image_size)


def _opened(image: Picture, levels: Levels) -> Image.Image:
    if isinstance(image, str | Path):
        return _read(Path(os.path.expanduser(image)), levels)
    if isinstance(image, Image.Image):
        return _of_pillow(image, levels)
    values = image.numpy(force=True) if isinstance(image, Tensor) else image
    if isinstance(image, Tensor) and values.ndim == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        found = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"an image wants a path, a PIL image, or uint8 [height, width, 3] from 0 to 255; got {found}")
    return Image.fromarray(np.ascontiguousarray(values))


def _read(path: Path, levels: Levels) -> Image.Image:
    try:
        data = path.read_bytes()
        return _decoded(data, levels)
    except OSError as err:
        raise DataError(f"'{path}' cannot be read: {err.strerror or err}") from None
    except BadImage as err:
        raise DataError(f"'{path}': {err}") from None


def _decoded(data: bytes, levels: Levels) -> Image.Image:
    return Image.fromarray(decode(data, read_header(io.BytesIO(data)), levels))


def _of_pillow(image: Image.Image, levels: Levels) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L", "CMYK", "YCbCr") and not image.has_transparency_data:
        return image.convert("RGB")
    # what is transparent or has 16 bits is left to the decoder's rules
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG", compress_level=1)
        return _decoded(buffer.getvalue(), levels)
    except (OSError, BadImage) as err:
        raise DataError(f"a PIL image of mode {image.mode} cannot be used ({err}); convert it to RGB") from None
