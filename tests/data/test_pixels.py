"""Transparency and levels by the formats' own specifications, on files written byte by byte."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastbeit.config.sections import Levels
from fastbeit.data.decode import check, decode, decode_reduced, decode_reference, read_header, read_range
from fastbeit.errors import BadImage
from helpers import photos
from helpers.formats import GREY, GREY3, RGB, WIDE, bmp, on_white, png, tiff

MASKS = 0xFF0000, 0xFF00, 0xFF, 0xFF000000
LOW = WIDE >> 4  # 12 bits in 16
PACKED = (GREY.astype(np.uint32) << 24) | (RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32))


def shown(data: bytes, levels: Levels = "high_byte") -> np.ndarray:
    """What every decoder makes of a file."""
    size = read_header(io.BytesIO(data))
    pixels = decode(data, size, levels)
    assert np.array_equal(np.asarray(decode_reference(data, size, levels)), pixels)
    assert np.array_equal(decode_reduced(data, size, 8, levels).pixels, pixels)
    with Image.open(io.BytesIO(check(data, size, levels).encoded)) as image:
        assert np.array_equal(np.asarray(image), pixels)
    return pixels


def small_png(values: np.ndarray, bits: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey or palette PNG of 1 to 8 bits a pixel, with chunks before its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1)
    packed = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=1))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_one_clear_grey_of_a_png(bits):
    top = (1 << bits) - 1
    values = GREY >> (8 - bits)
    clear = int(np.median(values))
    expected = np.where(values == clear, 255, values * (255 // top))[..., None].repeat(3, axis=2)
    # of the two bytes only the bits of a pixel count
    for key in (clear, clear | (0x700 if bits > 1 else 0)):
        pixels = shown(small_png(values, bits, 0, (b"tRNS", struct.pack(">H", key))))
        assert np.array_equal(pixels, expected), key
    assert (values == clear).any() and not (values == clear).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_of_a_png(bits):
    # of fewer entries than the palette the rest is opaque
    count = 1 << bits
    values = GREY >> (8 - bits)
    palette = np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8)
    opacity = np.full(count, 255)
    opacity[: max(1, count // 2)] = np.arange(max(1, count // 2)) * 2
    chunks = (b"PLTE", palette.tobytes()), (b"tRNS", bytes(opacity[: max(1, count // 2)].astype(np.uint8)))
    wanted = on_white(palette[values], opacity[values][..., None] / 255)
    assert np.abs(shown(small_png(values, bits, 3, *chunks)) - wanted).max() <= 1


def test_one_clear_colour_of_a_png():
    data = png(RGB, 8, 2, struct.pack(">HHH", *(RGB[5, 7].astype(int) + 0x300)))
    assert np.array_equal(shown(data), np.where((RGB == RGB[5, 7]).all(2)[..., None], 255, RGB))
    # of 16 bits all count: another with the same high bytes is opaque
    wide = WIDE.copy()
    wide[5, 8] = wide[5, 7] ^ 1
    expected = (wide >> 8).astype(np.uint8)
    expected[(wide == wide[5, 7]).all(2)] = 255
    assert np.array_equal(shown(png(wide, 16, 2, struct.pack(">HHH", *wide[5, 7]))), expected)
    expected = (wide[..., [0] * 3] >> 8).astype(np.uint8)
    expected[wide[..., 0] == wide[5, 7, 0]] = 255
    assert np.array_equal(shown(png(wide[..., 0], 16, 0, struct.pack(">H", wide[5, 7, 0]))), expected)


def test_a_png_that_is_clear_everywhere_is_white():
    # unlike in a BMP, that is what it says
    assert (shown(png(np.dstack([RGB, 0 * GREY]), 8, 6)) == 255).all()


@pytest.mark.parametrize(
    "header, masks, has_opacity",
    [(40, (), False), (40, MASKS[:3], False), (52, MASKS[:3], False), (108, (), False), (124, (), False)]
    + [(size, (*MASKS[:3], 0), False) for size in (56, 108, 124)]
    + [(size, MASKS, True) for size in (56, 108, 124)],
)
def test_the_fourth_byte_of_a_bmp(header, masks, has_opacity):
    expected = on_white(RGB) if has_opacity else RGB
    assert np.abs(shown(bmp(PACKED, header, masks)) - expected).max() <= 1
    # where all of it is 0 it was never set
    assert np.array_equal(shown(bmp(PACKED & 0xFFFFFF, header, masks)), RGB)


def test_opacity_of_a_bmp_in_other_places():
    turned = (PACKED << np.uint32(8)) | (PACKED >> np.uint32(24))
    data = bmp(turned, 124, (0xFF000000, 0xFF0000, 0xFF00, 0xFF))
    assert np.abs(shown(data) - on_white(RGB)).max() <= 1
    # header of version 4 whose masks are all 0, which some write for the usual places
    assert np.array_equal(shown(bmp(PACKED, 108, (0, 0, 0, 0))), RGB)


@pytest.mark.parametrize("wide", [False, True])
def test_opacity_of_a_tiff(wide):
    scale = 257 if wide else 1
    rgb, grey = (
        RGB.astype(np.uint16 if wide else np.uint8) * scale,
        GREY.astype(np.uint16 if wide else np.uint8) * scale,
    )
    # multiplied by its opacity, no colour is larger than that
    inked = (rgb * (grey[..., None] / (255 * scale))).round().astype(rgb.dtype)
    for kind, colours in {"unassalpha": rgb, "assocalpha": inked}.items():
        data = tiff(np.dstack([colours, grey]), photometric="rgb", extrasamples=[kind])
        # 8-bit colours that were multiplied by little say little
        assert np.abs(shown(data) - on_white(RGB)).max() <= 2, kind
    if not wide:
        for kind, values in {"unassalpha": GREY, "assocalpha": inked[..., 1]}.items():
            data = tiff(np.dstack([values, GREY]), photometric="minisblack", extrasamples=[kind])
            expected = on_white(GREY3) if kind == "unassalpha" else on_white(RGB)[..., [1] * 3]
            assert np.abs(shown(data) - expected).max() <= 2, kind
    assert (shown(tiff(np.dstack([rgb, 0 * grey]), photometric="rgb", extrasamples=["unassalpha"])) == 255).all()


def pnm(values: np.ndarray, top: int) -> bytes:
    kind = "P6" if values.ndim == 3 else "P5"
    return f"{kind} {values.shape[1]} {values.shape[0]} {top}\n".encode() + values.astype(">u2").tobytes()


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a pixel, two in three bytes."""
    left, right = values[:, ::2].astype(np.uint32), values[:, 1::2].astype(np.uint32)
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=2).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, height)]
    tags.append((279, len(packed)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + packed


OPAQUE = np.full_like(GREY, 255)[..., None].astype(np.uint16) * 257
KINDS = {
    "grey png": lambda v: png(v[..., 0], 16, 0),
    "rgb png": lambda v: png(v, 16, 2),
    "grey png with opacity": lambda v: png(np.dstack([v[..., :1], OPAQUE]), 16, 4),
    "rgb png with opacity": lambda v: png(np.dstack([v, OPAQUE]), 16, 6),
    "grey tiff": lambda v: tiff(v[..., 0], photometric="minisblack"),
    "grey tiff, other order": lambda v: tiff(v[..., 0], photometric="minisblack", byteorder=">"),
    "rgb tiff": lambda v: tiff(v, photometric="rgb"),
    "rgb tiff, other order": lambda v: tiff(v, photometric="rgb", byteorder=">"),
    "rgb tiff, packed": lambda v: tiff(v, photometric="rgb", compression="zlib", predictor=True),
    "rgb tiff, tiles": lambda v: tiff(v, photometric="rgb", tile=(16, 16)),
    "rgb tiff with opacity": lambda v: tiff(np.dstack([v, OPAQUE]), photometric="rgb", extrasamples=[2]),
    "rgb tiff, multiplied": lambda v: tiff(np.dstack([v, OPAQUE]), photometric="rgb", extrasamples=[1]),
    "pgm": lambda v: pnm(v[..., 0], 65535),
    "ppm": lambda v: pnm(v, 65535),
}


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_bits_in_sixteen(kind):
    data = KINDS[kind](LOW)
    values = LOW[..., [0] * 3] if "grey" in kind or kind == "pgm" else LOW
    low, high = int(values.min()), int(values.max())
    assert read_range(io.BytesIO(data)) == (low, high) and high < 4096
    assert np.array_equal(shown(data), values >> 8) and len(np.unique(shown(data))) <= 16
    for levels, (first, last) in {(0, 4095): (0, 4095), "image": (low, high), (100, 2000): (100, 2000)}.items():
        spread = (values.clip(first, last) - float(first)) * 255 / (last - first)
        assert np.abs(shown(data, levels) - spread).max() <= 0.51, levels
    assert len(np.unique(shown(data, (0, 4095)))) > 200


def test_files_that_say_how_many_bits_they_have():
    grey = LOW[..., 0]
    # no guess is needed
    for data in (pnm(grey, 4095), pnm(LOW, 4095), twelve_bits(grey)):
        assert read_range(io.BytesIO(data)) == (0, 0)
        expected = LOW if data.startswith(b"P6") else grey[..., None].repeat(3, axis=2)
        assert np.abs(shown(data).astype(int) - (expected >> 4)).max() <= 1
    assert np.array_equal(shown(twelve_bits(grey), (0, 1000)), shown(png(grey, 16, 0), (0, 1000)))


def test_an_image_of_one_value_is_black_by_its_own_levels():
    assert (shown(png(np.full((8, 8), 3000), 16, 0), "image") == 0).all()


def test_levels_are_of_16_bits_alone():
    for data in (png(RGB, 8, 2), png(GREY, 8, 0), photos.encoded(photos.small_photo(), "BMP")):
        assert read_range(io.BytesIO(data)) == (0, 0)
        assert np.array_equal(shown(data, (0, 100)), shown(data))


def test_a_turned_one_is_turned_once():
    for k in range(1, 9):
        data = tiff(LOW, photometric="rgb", extratags=[(274, "H", 1, k, True)])
        assert np.array_equal(shown(data, (0, 4095)), photos.upright(shown(tiff(LOW, photometric="rgb"), (0, 4095)), k))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_much_metadata_is_no_damage(kind):
    random = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8).tobytes()
    # of a JPEG one segment
    packet = b"<x:xmpmeta>" + random.hex().encode()[: 60_000 if kind == "JPEG" else 3 << 20]
    data = photos.encoded(photos.small_photo(), kind, icc_profile=random, xmp=packet, quality=90)
    assert len(data) > 2 << 20
    size = read_header(io.BytesIO(data))
    plain = photos.encoded(photos.small_photo(), kind, quality=90)
    assert np.array_equal(decode(data, size), decode(plain, size))
    assert np.array_equal(np.asarray(decode_reference(data, size)), np.asarray(decode_reference(plain, size)))


def test_packed_texts_of_a_png(monkeypatch):
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * (2 << 20))
    data = small_png(GREY, 8, 0, (b"iTXt", text), (b"zTXt", b"Raw\0\0" + zlib.compress(b"y" * (2 << 20))))
    assert np.array_equal(shown(data), GREY3)
    monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 2 << 20)
    bomb = b"icc\0\0" + zlib.compress(bytes(3 << 20))
    with pytest.raises(BadImage, match="metadata"):
        read_header(io.BytesIO(small_png(GREY, 8, 0, (b"iCCP", bomb))))
