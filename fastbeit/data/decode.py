"""The bytes of an image file to RGB, by one set of rules for every pipeline.

Read are JPEG, PNG, WebP, BMP, TIFF and PNM, told by their content and not by their names; of several frames or pages
the first. EXIF orientation is applied. Grey becomes three equal channels, CMYK and YCCK what Pillow's `convert("RGB")`
makes of them, transparent pixels are laid on white, 16-bit values become 8 bits as `data.levels` says (see `pixels`).
Colour profiles are ignored, as by the authors.

Plain JPEGs are decoded by simplejpeg, strictly: what libjpeg would repair with a warning counts as corrupt. Pillow
decodes everything else: also JPEGs that are lossless or subsampled in odd ways, where damage can go unseen. Nothing is
decoded whose header claims more than `MAX_PIXELS`.
"""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from fastbeit.config.sections import Levels
from fastbeit.data.pixels import check_channels, check_meaning, range_of, read_wide, to_rgb
from fastbeit.errors import BadImage

MAX_PIXELS = 50_000_000
MAX_SIDE = 16384
FORMATS = "JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"
JPEG_MAGIC, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
TAIL_BYTES = 64, 1 << 16  # an image's end is looked for in so many last bytes: cameras append data to a JPEG
# baseline, extended and progressive, by Huffman or arithmetic codes; of a lossless JPEG that it is to reduce TurboJPEG
# writes every pixel, past the end of the array
FRAMES = b"\xc0\xc1\xc2\xc9\xca"
NO_SEGMENT = {bytes([marker]) for marker in (0x00, 0x01, *range(0xD0, 0xDB), 0xFF)} | {b""}  # have no length, or scan
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

PNG_MAGIC, TIFF_MAGICS = b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_METADATA = 64 << 20  # bytes of a PNG's profile, or of one of its texts, when inflated

# Pillow warns of images that are far over our limit, and goes on; an error is caught below
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# its own limit is 1 MB, which editors' XMP and printers' profiles exceed
PngImagePlugin.MAX_TEXT_CHUNK = MAX_METADATA
PngImagePlugin.MAX_TEXT_MEMORY = 2 * MAX_METADATA


@dataclass(frozen=True)
class Checked:
    """An image file that DALI can take."""

    encoded: bytes
    mean_grey: float  # of the whole image, in [0, 255]


@dataclass(frozen=True)
class Decoded:
    """An image, or a smaller picture of it: pixel [y, x] shows the image's `reduce` x `reduce` square at that place."""

    pixels: np.ndarray  # [ceil(height / reduce), ceil(width / reduce), 3] uint8
    size: tuple[int, int]  # height and width of the image
    reduce: int  # 1, 2, 4 or 8

    @cached_property
    def mean_grey(self) -> float:
        return mean_grey(self.pixels, self.size, self.reduce)


def decode(data: bytes, size: tuple[int, int], levels: Levels = "high_byte") -> np.ndarray:
    """Decode as fast as a CPU can.

    Args:
        data: the whole file.
        size: height and width, upright, that the index holds.
        levels: as `data.levels`.

    Returns:
        [height, width, 3] uint8, read-only.

    Raises:
        BadImage: corrupt, too large, not an image, or not of this size.
    """
    return decode_reduced(data, size, 1, levels).pixels


def decode_reduced(data: bytes, size: tuple[int, int], reduce: int, levels: Levels = "high_byte") -> Decoded:
    """As `decode`, but smaller by `reduce` (1, 2, 4 or 8) where that is faster: in plain, upright JPEGs."""
    plain = _plain_jpeg_size(data)
    if plain is None:
        return Decoded(np.asarray(decode_reference(data, size, levels)), size, 1)
    turn = TRANSPOSES.get(_orientation(data))
    if turn is None:
        _expect(plain, size)
        return Decoded(_simplejpeg(data, "RGB", plain, reduce), size, reduce)
    pixels = np.asarray(Image.fromarray(_simplejpeg(data, "RGB", plain, 1)).transpose(turn))
    _expect(pixels.shape[:2], size)
    return Decoded(pixels, size, 1)


def decode_reference(data: bytes, size: tuple[int, int], levels: Levels = "high_byte") -> Image.Image:
    """Decode with Pillow alone, what `decode` accepts; arguments and errors as there, mode RGB."""
    if _jpeg_header(data):
        _scan_jpeg(data)
    return _decode_with_pillow(data, size, levels)


def check(data: bytes, size: tuple[int, int], levels: Levels = "high_byte") -> Checked:
    """Make sure of an image before DALI sees it, which garbles most damaged JPEGs and says nothing.

    A plain, upright JPEG is entropy-decoded whole, at 1/8 of its size, and goes on as it is; anything else is decoded
    here and goes on as PNM, so that every rule of this module holds in DALI too. Not caught: damage that is still a
    valid JPEG. Arguments and errors as in `decode`.
    """
    plain = _plain_jpeg_size(data)
    if plain is not None and _orientation(data) not in TRANSPOSES:
        _expect(plain, size)
        return Checked(data, mean_grey(_scan_jpeg(data), size, 8))
    pixels = decode(data, size, levels)
    return Checked(_pnm(pixels), mean_grey(pixels, size))


def unpack(checked: Checked, size: tuple[int, int]) -> Checked:
    """The same image as PNM, decoded here; to the pixels of DALI on a CPU, where libjpeg-turbo decodes for both."""
    return Checked(_pnm(decode(checked.encoded, size)), checked.mean_grey)


def _pnm(pixels: np.ndarray) -> bytes:
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def check_ends(data: bytes, size: tuple[int, int], mean_grey: float, levels: Levels = "high_byte") -> Checked:
    """As `check`, of an image that has passed it before: of a plain, upright JPEG header and end alone are looked at.

    Its bytes are then decoded once, by DALI. Only of an image that has passed: of most damage in the middle DALI makes
    grey or garbled pixels without a word.
    """
    plain = _plain_jpeg_size(data)
    if plain is None or _orientation(data) in TRANSPOSES or not has_end(data):
        return check(data, size, levels)
    _expect(plain, size)
    return Checked(data, mean_grey)


def mean_grey(pixels: np.ndarray, size: tuple[int, int], reduce: int = 1) -> float:
    """Mean luma of an image of this size, in [0, 255], from a picture of it as in `Decoded`, in RGB or in grey."""
    height, width = size[0] / reduce, size[1] / reduce
    # of the last row and column a part may hang over the image
    below, beyond = len(pixels) - height, pixels.shape[1] - width
    sums = _sums(pixels) - below * _sums(pixels[-1:]) - beyond * _sums(pixels[:, -1:])
    sums += below * beyond * pixels[-1, -1]
    return float(sums @ (LUMA if len(sums) == 3 else [1.0])) / (height * width)


def _sums(pixels: np.ndarray) -> np.ndarray:
    """[C] float64, exact, of [height, width, C] uint8."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    # in the smallest integers, which 257 rows fit: twice as fast as in the next
    parts = [rows[start : start + 257].sum(axis=0, dtype=np.uint16) for start in range(0, height, 257)]
    return np.concatenate(parts).reshape(-1, channels).sum(axis=0, dtype=np.float64)


def read_header(file: BinaryIO) -> tuple[int, int]:
    """Upright height and width, from the first bytes of a file; errors as in `decode`."""
    image = _open(file)
    # a TIFF is turned by Pillow itself, and opened with the size that it then has
    if image.format != "TIFF" and _exif_orientation(image, _in_header(image, file)) in TRANSPOSED:
        return image.width, image.height
    return image.height, image.width


def read_range(file: BinaryIO) -> tuple[int, int]:
    """Least and largest value of an image of 16 bits a channel, which is decoded; (0, 0) of any other.

    Errors as in `decode`. Grey and colours are looked at, opacity and CMYK are not.
    """
    file.seek(0)
    start = file.read(25)
    # nothing else has 16 bits; most PNGs have not, and need no second look
    if not start.startswith((*TIFF_MAGICS, b"P")) and not (start.startswith(PNG_MAGIC) and start[24:] == b"\x10"):
        return 0, 0
    file.seek(0)
    # a copy, since libtiff reads by the descriptor, behind the back of a buffer
    data = file.read()
    image = _open(io.BytesIO(data))
    try:
        wide = read_wide(image, lambda: _open(io.BytesIO(data)))
    except Exception as err:
        # as in `_exif_orientation`
        raise BadImage(f"corrupt {image.format}: {err}") from err
    return range_of(wide) if wide and wide.bits == 16 else (0, 0)


def _in_header(image: Image.Image, file: BinaryIO) -> bool:
    """Whether nothing stands behind the pixels of a PNG: else Pillow decodes them all, to look for EXIF there."""
    if image.format != "PNG":
        return True
    place, seen = 8, b""
    while seen != b"IEND":
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or (seen == b"IDAT" and head[4:] not in (b"IDAT", b"IEND")):
            return False
        place, seen = place + 12 + int.from_bytes(head[:4], "big"), head[4:]
    return True


def has_end(data: bytes) -> bool:
    """`check_end` of a whole file."""
    return any(check_end(data, data[-num_bytes:]) for num_bytes in TAIL_BYTES)


def check_end(data: bytes, tail: bytes) -> bool:
    """Whether a file with these first and last bytes ends as its format wants; True where that cannot be told."""
    if data.startswith(JPEG_MAGIC):
        return JPEG_END in tail
    return not data.startswith(b"\x89PNG") or b"IEND" in tail


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width, before EXIF orientation, of a JPEG that simplejpeg can make RGB of; None: another file."""
    header = _jpeg_header(data)
    return header[1] if header and header[0] in ("YCbCr", "Gray", "RGB") else None


def _jpeg_header(data: bytes) -> tuple[str, tuple[int, int]] | None:
    """Colour space, and height and width, of a JPEG that may be given to simplejpeg; None: another file."""
    if not data.startswith(JPEG_MAGIC) or not any(marker in FRAMES for marker, _ in _jpeg_segments(data)):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except KeyError:
        # a subsampling that simplejpeg has no name for: 4:4:1
        return None
    except ValueError as err:
        # another that TurboJPEG cannot decode
        if "subsampling" in str(err):
            return None
        raise BadImage(f"corrupt JPEG: {err}") from None
    _check_limit(int(height), int(width))
    return colorspace, (int(height), int(width))


def _simplejpeg(data: bytes, colorspace: str, size: tuple[int, int], reduce: int) -> np.ndarray:
    # with a least size of 0 simplejpeg never reduces, whatever else it is told
    height, width = (-(-side // reduce) if reduce > 1 else 0 for side in size)
    try:
        return simplejpeg.decode_jpeg(data, colorspace, min_height=height, min_width=width)
    except ValueError as err:
        raise BadImage(f"corrupt JPEG: {err}") from None


def _scan_jpeg(data: bytes) -> np.ndarray:
    """Decode every coefficient but, of each 8 x 8 block, only its mean: [ceil(height / 8), ceil(width / 8), 1 or 4]."""
    size = _plain_jpeg_size(data)
    # of CMYK only whether it can be decoded matters
    return _simplejpeg(data, "GRAY", size, 8) if size else _simplejpeg(data, "CMYK", (1, 1), 8)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and end of each segment of a JPEG, up to its first scan or to whatever is out of the ordinary."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in NO_SEGMENT:
        marker = data[place + 1]
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        yield marker, place


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8."""
    # reading EXIF costs Pillow 0.1 ms, and so does searching the whole file; most photos of most data sets have none
    head = data[: max(end for _, end in _jpeg_segments(data))]
    if b"Exif\0\0" not in head and b"tiff:Orientation" not in head:
        return 1
    return _exif_orientation(_open(io.BytesIO(data)))


def _exif_orientation(image: Image.Image, in_header: bool = False) -> int:
    try:
        exif = Image.Image.getexif(image) if in_header else image.getexif()
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception as err:
        # Pillow's readers raise nearly any type on damaged data
        raise BadImage(f"corrupt EXIF: {err}") from err


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        image = Image.open(file, formats=FORMATS)
        _check_limit(image.height, image.width)
        check_meaning(image)
        return image
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"too large: over {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise BadImage(_why_unknown(file)) from None
    except Exception as err:
        # as in `_exif_orientation`
        if "MAX_TEXT_CHUNK" in str(err) or "text chunks" in str(err):
            raise BadImage(f"too large: over {MAX_METADATA >> 20} MiB of metadata") from None
        raise BadImage(f"corrupt: {err}") from err


def _why_unknown(file: BinaryIO) -> str:
    """Why Pillow does not know a file."""
    file.seek(0)
    start = file.read(16)
    if start.startswith(TIFF_MAGICS):
        try:
            # of a BigTIFF, whose third byte is a 43, the header is twice as long
            tags = TiffImagePlugin.ImageFileDirectory_v2(start[: 16 if b"+" in start[:4] else 8])
            file.seek(tags.next)
            tags.load(file)
            check_channels(tags)
        except BadImage as err:
            return str(err)
        except Exception as err:
            # as in `_exif_orientation`
            return f"corrupt: {err}"
    if start.startswith((JPEG_MAGIC, *TIFF_MAGICS)):
        return "JPEG or TIFF of a kind that is not read, such as 12-bit or floating-point"
    return "not an image that is read (JPEG, PNG, WebP, BMP, TIFF, PNM)"


def _decode_with_pillow(data: bytes, size: tuple[int, int], levels: Levels) -> Image.Image:
    image = _open(io.BytesIO(data))
    try:
        pixels = to_rgb(image, lambda: _open(io.BytesIO(data)), levels)
    except BadImage:
        raise
    except Exception as err:
        # as in `_exif_orientation`
        raise BadImage(f"corrupt {image.format}: {err}") from err
    # of a TIFF, Pillow has turned the pixels and forgotten the orientation
    turn = TRANSPOSES.get(_exif_orientation(image))
    pixels = pixels.transpose(turn) if turn is not None else pixels
    _expect((pixels.height, pixels.width), size)
    return pixels


def _check_limit(height: int, width: int) -> None:
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise BadImage(f"too large: {width} x {height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side")


def _expect(size: tuple[int, ...], indexed: tuple[int, int]) -> None:
    if tuple(size) != tuple(indexed):
        raise BadImage(f"changed since it was indexed: {size[1]} x {size[0]}, was {indexed[1]} x {indexed[0]}")
