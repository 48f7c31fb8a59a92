"""What the pixels of an image file mean: which of them are clear, and how 16 bits become 8.

By the formats' own specifications, where Pillow decides otherwise:

    PNG   tRNS names one grey or one colour in the depth of the file (11.3.2.1). Pillow compares it with values that it
          has widened to 8 bits before, or narrowed.
    BMP   the fourth byte of a pixel is opacity only where a header of version 3 or later has a mask for it; and where
          it is 0 in all pixels, as old programs leave it, the image is opaque.
    TIFF  ExtraSamples 1 and 2 are opacity, the first with colours that were multiplied by it. 0 is a channel of unknown
          meaning, and so is one that no tag tells of: an image that has one is refused.

Colours of 16 bits are read whole; Pillow keeps their high bytes alone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from fastbeit.config.sections import Levels
from fastbeit.errors import BadImage

BMP_BITFIELDS, BMP_V3 = 3, 56  # compression, and length of the first header that has a mask of opacity
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # channels of a TIFF's photometric interpretation
PALETTE, SEPARATED, CMYK_INKS = 3, 5, 1
PREMULTIPLIED, OPACITY = 1, (1, 2, 999)  # ExtraSamples; 999 is Corel's for opacity
INK_SET = 332
NATIVE = "L" if sys.byteorder == "little" else "B"


@dataclass(frozen=True)
class Wide:
    """An image of more than 8 bits a channel."""

    values: np.ndarray  # [height, width, 1 or 3] uint16, grey or RGB
    opacity: np.ndarray | None  # [height, width] uint8; None: all is opaque
    bits: int  # 16, or 12 where the file says that it has no more


def check_meaning(image: ImageFile.ImageFile) -> None:
    """Refuse pixels that nobody knows how to show, and those that Pillow reads wrongly; `BadImage`."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadImage("pixels of 32 bits, or with a sign, have no known range; convert them to 8 or 16 bits")
    if image.format == "BMP":
        # now, since the file is closed when the image is loaded
        image.info["opacity_mask"] = _opacity_mask(image.fp)
        if image.info["opacity_mask"] and image.mode != "RGBA":
            raise BadImage("BMP with opacity in pixels of 16 bits is not read; convert it to 24 or 32 bits")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image.tag_v2)


def _check_tiff(tags: Any) -> None:
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    if (tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 or photometric == 0) and _bits(tags) > 8:
        raise BadImage("16-bit TIFF in planes, or with 0 for white, is not read; convert it to 8 bits")
    check_channels(tags)


def check_channels(tags: Any) -> None:
    """Refuse a TIFF with channels that are no colours, by its tags."""
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
    colours = COLOURS.get(photometric, 1)
    channels = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, len(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
    kinds = tags.get(TiffImagePlugin.EXTRASAMPLES, ())
    if photometric == SEPARATED and (channels != colours or tags.get(INK_SET, CMYK_INKS) != CMYK_INKS):
        raise BadImage(f"{channels} channels of ink that are not CMYK are not read; convert them to RGB")
    extra = channels - colours
    if extra > 1 or (extra == 1 and (len(kinds) != 1 or kinds[0] not in OPACITY)):
        raise BadImage(
            f"{channels} channels, of which {extra} neither colour nor opacity (TIFF's ExtraSamples "
            f"{list(kinds) or 'not there'}), are not read; keep those of grey or RGB"
        )


def _bits(tags: Any) -> int:
    return max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))


def to_rgb(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile], levels: Levels) -> Image.Image:
    """Mode RGB, transparent pixels laid on white.

    Args:
        image: opened, not loaded; afterwards it is loaded.
        reopen: opens the same file again.
        levels: as `data.levels`, for images of more than 8 bits a channel.
    """
    # Pillow keeps the high byte, as fast as it can, where nothing else is asked for
    by_pillow = levels == "high_byte" and image.mode in ("RGB", "RGBA") and "transparency" not in image.info
    wide = None if by_pillow and image.format != "PPM" else read_wide(image, reopen)
    if wide:
        colours = np.broadcast_to(narrow(wide, levels), (*wide.values.shape[:2], 3))
        return _on_white(colours, wide.opacity)
    if image.mode == "I":
        # a PNM of another range, which its header gives and Pillow has widened to 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    clear = _clear_png(image)
    if clear is not None:
        return _on_white(np.asarray(image.convert("RGB")), clear)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    opaque = image.format == "BMP" and not (image.info["opacity_mask"] and rgba[..., 3].any())
    return _on_white(rgba[..., :3], None if opaque else rgba[..., 3])


def _on_white(colours: np.ndarray, opacity: np.ndarray | None) -> Image.Image:
    colours = np.ascontiguousarray(colours)
    if opacity is None:
        return Image.fromarray(colours)
    image = Image.fromarray(np.dstack([colours, opacity]))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def narrow(wide: Wide, levels: Levels) -> np.ndarray:
    """[height, width, 1 or 3] uint8: the high byte, or what lies between two levels spread over all of 0 to 255."""
    if levels == "high_byte":
        return (wide.values >> (wide.bits - 8)).astype(np.uint8)
    low, high = range_of(wide) if levels == "image" else levels
    # an image of one value has no range: it becomes black
    shares = (np.arange(1 << 16).clip(low, max(high, low + 1)) - low) / max(1, high - low)
    return (255 * shares + 0.5).astype(np.uint8)[wide.values]


def range_of(wide: Wide) -> tuple[int, int]:
    """Least and largest value."""
    return int(wide.values.min()), int(wide.values.max())


def read_wide(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile]) -> Wide | None:
    """The values of an image as they are; None, and nothing is read, where they have 8 bits. Arguments as `to_rgb`."""
    rawmode = _rawmode(image)
    layout, _, order = rawmode.partition(";16")
    if image.mode.startswith("I"):
        if image.tile[0].codec_name.startswith("ppm") and image.tile[0].args != ("L", 0xFFFF):
            return None
        values = np.asarray(image).astype(np.uint16)[..., None]
        return Wide(values, _clear(values, image.info), 12 if rawmode == "I;12" else 16)
    if image.format == "PPM" and image.tile[0].codec_name == "ppm" and image.tile[0].args == ("RGB", 0xFFFF):
        return Wide(_whole(image, reopen, "RGB", "B", "raw"), None, 16)
    if not order or layout not in ("RGB", "RGBA", "RGBa", "LA"):
        return None
    if layout == "LA":
        # there is no low byte of LA, but its four bytes have the size of RGBA
        both = _read(image, "RGBA", "RGBA").astype(np.uint16)
        return Wide(both[..., :1] << 8 | both[..., 1:2], both[..., 2].astype(np.uint8), 16)
    whole = _whole(image, reopen, layout.upper(), NATIVE if order == "N" else order, image.tile[0].codec_name)
    values, opacity = whole[..., :3], whole[..., 3:]
    if layout == "RGBa":
        values = (values * np.float32(0xFFFF) / np.maximum(opacity, 1)).clip(0, 0xFFFF).round().astype(np.uint16)
    if layout == "RGB":
        return Wide(values, _clear(values, image.info), 16)
    return Wide(values, (opacity[..., 0] >> 8).astype(np.uint8), 16)


def _whole(image: ImageFile.ImageFile, reopen: Callable, layout: str, order: str, codec: str) -> np.ndarray:
    """16-bit values [height, width, 3 or 4] of two readings: Pillow gives the high bytes, and those of the other order
    of bytes, which are the low ones."""
    other = {"L": "B", "B": "L"}[order]
    high = _read(image, layout, f"{layout};16{order}", codec).astype(np.uint16)
    return high << 8 | _read(reopen(), layout, f"{layout};16{other}", codec)


def _read(image: ImageFile.ImageFile, mode: str, rawmode: str, codec: str = "zip") -> np.ndarray:
    # there is no public way to say how the bytes of a file are to be taken
    image._mode = mode

    def args(old: Any) -> Any:
        if codec == "zip":
            return rawmode
        return (rawmode, 0, 1) if image.format == "PPM" else (rawmode, *old[1:])

    image.tile = [tile._replace(codec_name=codec, args=args(tile.args)) for tile in image.tile]
    return np.asarray(image)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How Pillow takes the bytes of a file; "" where nothing is left to read."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _clear_png(image: ImageFile.ImageFile) -> np.ndarray | None:
    """Opacity [height, width] uint8 of an 8-bit PNG of which one grey or colour is clear; None: no such PNG."""
    if image.format != "PNG" or image.mode not in ("L", "RGB") or "transparency" not in image.info:
        return None
    # before it is loaded, which forgets how many bits a value has in the file
    bits = {"L;2": 2, "L;4": 4}.get(_rawmode(image), 8)
    top = (1 << bits) - 1
    wanted = np.atleast_1d(image.info["transparency"])
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    # of a value the bits that the file has count (11.3.2.1), widened as Pillow widens them
    return _opaque_but(pixels, (wanted & top) * (255 // top))


def _clear(values: np.ndarray, info: dict) -> np.ndarray | None:
    """The same of 16-bit values."""
    return _opaque_but(values, np.atleast_1d(info["transparency"])) if "transparency" in info else None


def _opaque_but(pixels: np.ndarray, clear: np.ndarray) -> np.ndarray:
    return np.where((pixels == clear).all(axis=2), 0, 255).astype(np.uint8)


def _opacity_mask(file: Any) -> int:
    """The bits of a BMP's pixel that are opacity, as its header says; 0: none."""
    place = file.tell()
    file.seek(14)
    header = file.read(BMP_V3)
    file.seek(place)
    numbers = np.frombuffer(header[: len(header) // 4 * 4], "<u4")
    has_mask = len(numbers) == BMP_V3 // 4 and numbers[0] >= BMP_V3 and numbers[4] == BMP_BITFIELDS
    return int(numbers[13]) if has_mask else 0
