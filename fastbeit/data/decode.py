"""The bytes of an image file to RGB, by one set of rules for every pipeline.

Read are JPEG, PNG, WebP, BMP, TIFF and PNM, told by their content and not by their names. EXIF orientation is applied.
Grey becomes three equal channels, CMYK and YCCK what Pillow's `convert("RGB")` makes of them, transparent pixels are
laid on white, 16-bit values keep their high byte (Pillow alone would clip them). Colour profiles are ignored, as by the
authors.

Plain JPEGs are decoded by simplejpeg, strictly: what libjpeg would repair with a warning counts as corrupt. Pillow
decodes everything else. Nothing is decoded whose header claims more than `MAX_PIXELS`.
"""

import io
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MAX_SIDE = 16384
FORMATS = "JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"
JPEG_MAGIC, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
TRANSPOSED = range(5, 9)  # EXIF orientations that swap height and width
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LUMA = np.array([0.299, 0.587, 0.114])  # grey of RGB, ITU-R 601, as Pillow's mode L

# Pillow warns of images that are far over our limit, and goes on; an error is caught below
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """The bytes are not an image that can be used; the message is the reason, without the path."""


@dataclass(frozen=True)
class Checked:
    """An image file that a decoder which must not fail can take."""

    encoded: bytes
    mean_grey: float  # of the whole image, in [0, 255]


def decode(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode as fast as a CPU can.

    Args:
        data: the whole file.
        size: height and width, upright, that the index holds.

    Returns:
        [height, width, 3] uint8, read-only.

    Raises:
        BadImage: corrupt, too large, not an image, or not of this size.
    """
    if not _is_plain_jpeg(data):
        return np.asarray(_decode_with_pillow(data, size))
    pixels = _simplejpeg(data, "RGB")
    turn = TRANSPOSES.get(_orientation(data))
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    _expect(pixels.shape[:2], size)
    return pixels


def decode_reference(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Decode with Pillow alone, what `decode` accepts; arguments and errors as there, mode RGB."""
    if data.startswith(JPEG_MAGIC):
        _scan_jpeg(data)
    return _decode_with_pillow(data, size)


def check(data: bytes, size: tuple[int, int]) -> Checked:
    """Make sure of an image before DALI sees it: one bad file ends a DALI pipeline for good.

    A plain, upright JPEG is entropy-decoded whole, at 1/8 of its size, and goes on as it is; anything else is decoded
    here and goes on as PNM, so that every rule of this module holds in DALI too. Not caught: damage that is still a
    valid JPEG. Arguments and errors as in `decode`.
    """
    if _is_plain_jpeg(data) and _orientation(data) not in TRANSPOSES:
        _expect(_jpeg_size(data), size)
        return Checked(data, float(_scan_jpeg(data).mean()))
    pixels = decode(data, size)
    header = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0])
    return Checked(header + pixels.tobytes(), mean_grey(pixels))


def mean_grey(pixels: np.ndarray) -> float:
    """Mean luma of [height, width, 3] uint8 pixels."""
    # whole rows first, in integers: fast, and the same however many threads there are
    sums = pixels.reshape(len(pixels), -1).sum(axis=0, dtype=np.uint32).reshape(-1, 3).sum(axis=0, dtype=np.uint64)
    return float(sums @ LUMA) * 3 / pixels.size


def read_header(file: BinaryIO) -> tuple[int, int]:
    """Upright height and width, from the first bytes of a file; errors as in `decode`."""
    image = _open(file)
    if _exif_orientation(image) in TRANSPOSED:
        return image.width, image.height
    return image.height, image.width


def check_end(data: bytes, tail: bytes) -> bool:
    """Whether a file with these first and last bytes ends as its format wants; True where that cannot be told."""
    if data.startswith(JPEG_MAGIC):
        return JPEG_END in tail
    return not data.startswith(b"\x89PNG") or b"IEND" in tail


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg can make RGB of it; the limit is checked on the way."""
    if not data.startswith(JPEG_MAGIC):
        return False
    try:
        colorspace = simplejpeg.decode_jpeg_header(data)[2]
    except ValueError as err:
        raise BadImage(f"corrupt JPEG: {err}") from None
    _check_limit(*_jpeg_size(data))
    return colorspace in ("YCbCr", "Gray", "RGB")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Stored height and width, before EXIF orientation."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return int(height), int(width)


def _simplejpeg(data: bytes, colorspace: str, min_factor: float = 1) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, colorspace, min_factor=min_factor)
    except ValueError as err:
        raise BadImage(f"corrupt JPEG: {err}") from None


def _scan_jpeg(data: bytes) -> np.ndarray:
    """Decode every coefficient but, of each 8 x 8 block, only its mean: [ceil(height / 8), ceil(width / 8), 1 or 4]."""
    return _simplejpeg(data, "GRAY" if _is_plain_jpeg(data) else "CMYK", min_factor=8)


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8."""
    # reading EXIF costs Pillow 0.1 ms; most photos of most data sets have none
    if b"Exif\0\0" not in data and b"tiff:Orientation" not in data:
        return 1
    return _exif_orientation(_open(io.BytesIO(data)))


def _exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as err:
        # Pillow's readers raise nearly any type on damaged data
        raise BadImage(f"corrupt EXIF: {err}") from err


def _open(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"too large: over {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise BadImage("not an image that is read (JPEG, PNG, WebP, BMP, TIFF, PNM)") from None
    except Exception as err:
        # as in `_exif_orientation`
        raise BadImage(f"corrupt: {err}") from err
    _check_limit(image.height, image.width)
    return image


def _decode_with_pillow(data: bytes, size: tuple[int, int]) -> Image.Image:
    image = _open(io.BytesIO(data))
    try:
        image = _to_rgb(ImageOps.exif_transpose(image))
    except Exception as err:
        # as in `_exif_orientation`
        raise BadImage(f"corrupt {image.format}: {err}") from err
    _expect((image.height, image.width), size)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range; convert them to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _check_limit(height: int, width: int) -> None:
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise BadImage(f"too large: {width} x {height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side")


def _expect(size: tuple[int, ...], indexed: tuple[int, int]) -> None:
    if tuple(size) != tuple(indexed):
        raise BadImage(f"changed since it was indexed: {size[1]} x {size[0]}, was {indexed[1]} x {indexed[0]}")
