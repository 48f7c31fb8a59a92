"""An image as it goes into a shard: as small as training has use for, JPEG, upright."""

from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from fastbeit.config.sections import Levels, Size
from fastbeit.data.decode import JPEG_MAGIC, check, decode


@dataclass(frozen=True)
class Shrunk:
    """A JPEG file."""

    data: bytes
    size: Size  # upright height and width
    is_copy: bool  # byte for byte


def shrink(data: bytes, size: Size, max_side: int, quality: int, levels: Levels = "high_byte") -> Shrunk:
    """Re-encode an image file so that its shorter side has at most `max_side` pixels; the aspect ratio is kept.

    A JPEG that is so small already is copied, with its EXIF orientation. What is re-encoded is decoded as training
    decodes it: it is turned upright, and says nothing of orientation any more; transparent pixels are white.

    Raises:
        BadImage: as `decode`.
    """
    if min(size) <= max_side and data.startswith(JPEG_MAGIC):
        check(data, size)
        return Shrunk(data, size, is_copy=True)
    pixels = decode(data, size, levels)
    if min(size) > max_side:
        height, width = (max(1, round(side * max_side / min(size))) for side in size)
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    # half the chroma along each side, as nearly all photos have it
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    return Shrunk(encoded, (pixels.shape[0], pixels.shape[1]), is_copy=False)
