"""One image file of each kind, with what it shows, or with why it is refused."""

import base64
import io
import struct
import zlib
from functools import cache

import numpy as np
import tifffile
from PIL import Image, ImageChops

from helpers import photos

PHOTO = photos.small_photo(40, 56)
RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
GREY3 = np.dstack([GREY] * 3)
SHARE = GREY[..., None] / 255  # of opacity, where the grey picture is the alpha channel
WIDE = RGB.astype(np.uint16) * 256 + 77  # 16 bits whose high byte is the picture

# 24 x 16 pixels of the same photo by libjpeg-turbo's cjpeg; simplejpeg cannot encode these, nor Pillow
SMALL_RGB = np.asarray(photos.small_photo(16, 24))
CJPEG = {
    "4:4:1": """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1x
eXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAAR
CAAQABgDARQAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAAAAYFB//EACEQAAIBBAICAwAAAAAAAAAAAAECAwAEBRESEzFhBiFR/8QAFgEB
AQEAAAAAAAAAAAAAAAAAAgED/8QAGBEAAwEBAAAAAAAAAAAAAAAAAAECERP/2gAMAwEAAhEDEQA/ANHM5kWCRJEqyGdTxYNrXvxUvec5riN4
wqog0A2yAf2lKx600VStLfA5M5G3ZpFRXQ6PE737qXsMiMdE5kPcxP0qjQpSlN0WpReT3cNpD2zPpQQK5vmfkLXdqsQRU0wOh5FKUtbDh//Z""",
    "every channel by another rule": """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1x
eXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAAR
CAAQABgDARIAAiEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAABgUH/8QAIhAAAQMDAwUAAAAAAAAAAAAAAQIEEQADBRIxMhMhIlFh/8QAFgEB
AQEAAAAAAAAAAAAAAAAAAAEC/8QAGxEAAgEFAAAAAAAAAAAAAAAAAAERAgMSEzH/2gAMAwEAAhEDEQA/ALDTLa88piEp6YTy1bmJ9UYaOC1f
rdKjRJIQNz2gCaztldKrkjBQPnGVaNLgtXrkKidqzDLZdTt6bvDxAhPyq6gD/9k=""",
    "RGB, green subsampled": """
/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAQCwwODAoQDg0OEhEQExgoGhgWFhgxIyUdKDozPTw5Mzg3QEhcTkBEV0U3OFBtUVdfYmdoZz5NcXlw
ZHhcZWdj/8AAEQgAEAAYA1IiAEcRAEIiAP/EABoAAAIDAQEAAAAAAAAAAAAAAAAHBAUGAgP/xAAnEAACAQQBAwMFAQAAAAAAAAABAgMABAUR
EgYhMRNhkRQVMkGhUf/aAAwDUgBHAEIAAD8AnZXJrYekkaiQzKdMG1r+VPwd6b6FmcIrIddjvf8AKx1zzkuo3jIVEHblsgH/AGrG2yK2MDGV
2nffZQABXra5+dcw0kz8bQDXHQ14+fNW2d6i+hgiW1CSG4U8X5fj7ip/T2aOTtWMqoskZAPEk79/alvdTiVoTHGI0RdaJLDf7NWWKy325JGI
9Ut2Cr2Fbaa5gtIfVmcBQQO1FLjMZ83VosQVU0wOh5FFd3/XIhueFqkbx8R3bfmmRdX0FpAZpn4oCB80UsM11HJfWqxFEQBgdDyKK//Z""",
    "arithmetic codes, progressive": """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1x
eXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/ygAR
CAAQABgDASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAc7hzCw2Hn8qUP/MAAQQBf/aAAgBAQABBQI1Rm0GuMnll8KA3NfCNThEgP/M
AAQRBf/aAAgBAwEBPwGY/8wABBEF/9oACAECAQE/AY0g/8wABBAF/9oACAEBAAY/Agx1Sb/8W0YI/8wABBAF/9oACAEBAAE/IXWk002woNbc
ZVgn3OGFpDXQQuUor86A/9oADAMBAAIAAwAAABDCKP/MAAQRBf/aAAgBAwEBPxBDQP/MAAQRBf/aAAgBAgEBPxDsy4D/zAAEEAX/2gAIAQEA
AT8Q/wCtS75ER8Ae0Q8KPsJbuhq/GF6tIt3rD8SASX4P2Lj/2Q==""",
}
# of a ramp, by imagecodecs
TWELVE_BITS = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggL
DAsKDAkKCgr/wQALDAAQABgBAREA/8QAFQABAQAAAAAAAAAAAAAAAAAACQ3/xAAbEAAABwEAAAAAAAAAAAAAAAAACA0pNEdR4//aAAgBAQAA
PwCbVlJTuqKxrld8goBSU7qisa5XfIKAUlO6orGuV3yFuAKSndUVjXK75BQCkp3VFY1yu+QUApKd1RWNcrvkP//Z""")
LOSSLESS = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/wwALCAAQABgBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAABAgF/9oACAEBAAEAAJ/UpSlKUpSlKUpSlKUp
SlXgqCVKUpSlKUpSlKUpSlKVnqUqCVKUpSlKUpSlKUpSlZ6lKVBKlKUpSlKUpSlKUpWepSlKVBKlKUpSlKUpSlKVnqUpSlKglSlKUpSlKUpS
lZ6lKUpSlKglSlKUpSlKUpWepSlKUpSlKglSlKUpSlKVnqUpSlKUpSlQSpSlKUpSlZ6lKUpSlKUpSlQSpSlKUpWepSlKUpSlKUpSoJUpSlKV
nqUpSlKUpSlKUpSoJUpSlZ6lKUpSlKUpSlKUpSoJUpWepSlKUpSlKUpSlKUpUEqVnqUpSlKUpSlKUpSlKUpUE56lKUpSlKUpSlKUpSlKUr//
2Q==""")
RAMP = np.arange(16 * 24).reshape(16, 24) * 10 % 4096


def png(values: np.ndarray, bits: int, colour: int, transparent: bytes = b"") -> bytes:
    """A PNG with the values as they are; colour 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def untold(data: bytes) -> bytes:
    """A TIFF whose ExtraSamples are under a tag that says nothing."""
    return data.replace(struct.pack("<HH", 338, 3), struct.pack("<HH", 60338, 3))


def bmp(values: np.ndarray, header_size: int, masks: tuple[int, ...] = ()) -> bytes:
    """A BMP with pixels [h, w] of 16 or 32 bits as they are; a header of 40 bytes has its masks behind it."""
    values = values[::-1]
    header = struct.pack(
        "<IiiHHIIiiII", header_size, *values.shape[::-1], 1, 8 * values.itemsize, 3 * bool(masks), *[0] * 5
    )
    header = (header + struct.pack(f"<{len(masks)}I", *masks)).ljust(header_size, b"\0")
    start = 14 + len(header)
    return struct.pack("<2sIHHI", b"BM", start + values.nbytes, 0, 0, start) + header + values.tobytes()


def turned(orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return photos.encoded(PHOTO, kind, exif=exif, **options)


def ycck() -> bytes:
    cyan, magenta, yellow, black = PHOTO.convert("CMYK").split()
    inks = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    # Pillow stores the inverse of what it is given
    data = bytearray(photos.encoded(Image.merge("CMYK", [*map(ImageChops.invert, inks), black]), quality=95))
    data[data.index(b"Adobe") + 11] = 2  # the marker's word for YCCK
    return bytes(data)


def on_white(colour: np.ndarray, share: np.ndarray = SHARE) -> np.ndarray:
    return colour * share + 255 * (1 - share)


def animated(kind: str, **options) -> bytes:
    return photos.encoded(PHOTO, kind, save_all=True, append_images=[PHOTO.rotate(180)], **options)


@cache
def files() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name -> content, what it shows, how far from that a pixel may be on average."""
    return {**jpegs(), **pngs(), **webps(), **bmps(), **tiffs()}


def jpegs():
    exact = {"quality": 95, "subsampling": 0}
    # chroma at half the size: this photo has small things of many colours
    found = {
        "grey.jpg": (photos.encoded(PHOTO.convert("L"), quality=95), GREY3, 2),
        "progressive.jpg": (photos.encoded(PHOTO, "JPEG", progressive=True, **exact), RGB, 4),
        "rgb.jpg": (photos.encoded(PHOTO, keep_rgb=True, quality=95), RGB, 4),
        "cmyk.jpg": (photos.encoded(PHOTO.convert("CMYK"), quality=95), RGB, 4),
        "ycck.jpg": (ycck(), RGB, 8),
        "two pictures.jpg": (animated("MPO", **exact), RGB, 4),
        "restarts.jpg": (photos.encoded(PHOTO, "JPEG", restart_marker_blocks=2, **exact), RGB, 4),
        "appended.jpg": (photos.encoded(PHOTO, "JPEG", **exact) + bytes(100_000), RGB, 4),
        "lossless.jpg": (LOSSLESS, np.dstack([RAMP.astype(np.uint8)] * 3), 0),
    }
    for name, text in CJPEG.items():
        found[f"{name}.jpg"] = base64.b64decode(text), SMALL_RGB, 16
    for subsampling in ("4:2:0", "4:2:2", "4:4:4", "4:1:1"):
        found[f"{subsampling}.jpg"] = photos.encoded(PHOTO, quality=95, subsampling=subsampling), RGB, 10
    for k in range(1, 9):
        found[f"exif {k}.jpg"] = turned(k, "JPEG", **exact), photos.upright(RGB, k), 4
    return found


def pngs():
    palette = PHOTO.quantize(32)
    shown = np.asarray(palette.convert("RGB"))
    bilevel = PHOTO.convert("1")
    clear = np.where((np.asarray(palette) == 3)[..., None], 255, shown)
    half = np.where((np.asarray(palette) == 3)[..., None], on_white(shown, np.array(100 / 255)), shown)
    with_alpha = np.dstack([RGB, GREY])
    found = {
        "rgb.png": (photos.encoded(PHOTO, "PNG"), RGB, 0),
        "grey.png": (photos.encoded(Image.fromarray(GREY), "PNG"), GREY3, 0),
        "bilevel.png": (photos.encoded(bilevel, "PNG"), np.asarray(bilevel.convert("RGB")), 0),
        "palette.png": (photos.encoded(palette, "PNG"), shown, 0),
        "palette, one clear.png": (photos.encoded(palette, "PNG", transparency=3), clear, 0),
        "palette, alpha.png": (
            photos.encoded(palette, "PNG", transparency=bytes([255] * 3 + [100] + [255] * 28)),
            half,
            0.5,
        ),
        "rgba.png": (png(with_alpha, 8, 6), on_white(RGB), 0.5),
        "grey and alpha.png": (png(np.dstack([GREY, GREY]), 8, 4), on_white(GREY3), 0.5),
        "rgb, one clear.png": (
            png(RGB, 8, 2, struct.pack(">HHH", *map(int, RGB[5, 5]))),
            np.where((RGB == RGB[5, 5]).all(axis=2, keepdims=True), 255, RGB),
            0,
        ),
        "grey, one clear.png": (
            png(GREY, 8, 0, struct.pack(">H", GREY[5, 5])),
            np.where(GREY3 == GREY[5, 5], 255, GREY3),
            0,
        ),
        "16-bit grey.png": (png(WIDE[..., 0], 16, 0), RGB[..., [0] * 3], 0),
        "16-bit rgb.png": (png(WIDE, 16, 2), RGB, 0),
        "16-bit rgba.png": (png(with_alpha.astype(np.uint16) * 256 + 77, 16, 6), on_white(RGB), 0.5),
        "16-bit grey and alpha.png": (
            png(np.dstack([GREY, GREY]).astype(np.uint16) * 256 + 77, 16, 4),
            on_white(GREY3),
            0.5,
        ),
        "frames.png": (animated("PNG"), RGB, 0),
    }
    for k in range(1, 9):
        found[f"exif {k}.png"] = turned(k, "PNG"), photos.upright(RGB, k), 0
    return found


def webps():
    rgba = Image.fromarray(np.dstack([RGB, GREY]))
    found = {
        "lossless.webp": (photos.encoded(PHOTO, "WEBP", lossless=True), RGB, 0),
        "lossy.webp": (photos.encoded(PHOTO, "WEBP", quality=95), RGB, 8),
        "alpha.webp": (photos.encoded(rgba, "WEBP", lossless=True, exact=True), on_white(RGB), 0.5),
        "frames.webp": (animated("WEBP", lossless=True), RGB, 0),
    }
    for k in range(1, 9):
        found[f"exif {k}.webp"] = turned(k, "WEBP", lossless=True), photos.upright(RGB, k), 0
    return found


def bmps():
    palette, bilevel = PHOTO.quantize(16), PHOTO.convert("1")
    return {
        "rgb.bmp": (photos.encoded(PHOTO, "BMP"), RGB, 0),
        "grey.bmp": (photos.encoded(PHOTO.convert("L"), "BMP"), GREY3, 0),
        "palette.bmp": (photos.encoded(palette, "BMP"), np.asarray(palette.convert("RGB")), 0),
        "bilevel.bmp": (photos.encoded(bilevel, "BMP"), np.asarray(bilevel.convert("RGB")), 0),
        # the fourth byte of a pixel of a plain BMP means nothing
        "rgbx.bmp": (photos.encoded(Image.fromarray(np.dstack([RGB, GREY])), "BMP"), RGB, 0),
    }


def tiffs():
    bilevel, palette = PHOTO.convert("1"), PHOTO.quantize(16)
    cmyk = PHOTO.convert("CMYK")
    found = {
        "jpeg.tif": (photos.encoded(PHOTO, "TIFF", compression="jpeg", quality=95), RGB, 10),
        "fax.tif": (photos.encoded(bilevel, "TIFF", compression="group4"), np.asarray(bilevel.convert("RGB")), 0),
        "palette.tif": (photos.encoded(palette, "TIFF"), np.asarray(palette.convert("RGB")), 0),
        "grey.tif": (photos.encoded(PHOTO.convert("L"), "TIFF"), GREY3, 0),
        "0 for white.tif": (tiff(255 - GREY, photometric="miniswhite"), GREY3, 0),
        "pages.tif": (animated("TIFF"), RGB, 0),
        "tiles.tif": (tiff(RGB, photometric="rgb", tile=(16, 16)), RGB, 0),
        "planes.tif": (tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB, 0),
        "big.tif": (tiff(RGB, photometric="rgb", bigtiff=True), RGB, 0),
        "rgba.tif": (photos.encoded(Image.fromarray(np.dstack([RGB, GREY])), "TIFF"), on_white(RGB), 0.5),
        "cmyk.tif": (photos.encoded(cmyk, "TIFF", compression="tiff_lzw"), RGB, 0),
        "16-bit cmyk.tif": (tiff(np.asarray(cmyk).astype(np.uint16) * 256 + 77, photometric="separated"), RGB, 0),
        "lab.tif": (photos.encoded(PHOTO.convert("LAB"), "TIFF"), RGB, 1),
    }
    for order in "<>":
        found[f"16-bit grey {order}.tif"] = (
            tiff(WIDE[..., 0], photometric="minisblack", byteorder=order),
            RGB[..., [0] * 3],
            0,
        )
        found[f"16-bit rgb {order}.tif"] = tiff(WIDE, photometric="rgb", byteorder=order), RGB, 0
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"):
        found[f"{compression}.tif"] = photos.encoded(PHOTO, "TIFF", compression=compression), RGB, 0
    for k in range(1, 9):
        found[f"exif {k}.tif"] = photos.encoded(PHOTO, "TIFF", tiffinfo={0x0112: k}), photos.upright(RGB, k), 0
    return found


@cache
def refused() -> dict[str, tuple[bytes, str]]:
    """Name -> content, a word of the reason."""
    wide_grey, no_range = WIDE[..., 0], "no known range"
    return {
        "gif": (photos.encoded(PHOTO, "GIF"), "not an image that is read"),
        "avif": (photos.encoded(PHOTO, "AVIF"), "not an image that is read"),
        "jpeg 2000": (photos.encoded(PHOTO, "JPEG2000"), "not an image that is read"),
        "12-bit jpeg": (TWELVE_BITS, "a kind that is not read"),
        "float tiff": (tiff(GREY.astype(np.float32), photometric="minisblack"), no_range),
        "float rgb tiff": (tiff(RGB.astype(np.float32), photometric="rgb"), "a kind that is not read"),
        "32-bit tiff": (tiff(GREY.astype(np.uint32) << 24, photometric="minisblack"), no_range),
        "signed tiff": (tiff(wide_grey.astype(np.int16), photometric="minisblack"), no_range),
        "16-bit tiff, 0 for white": (tiff(wide_grey, photometric="miniswhite"), "0 for white"),
        "16-bit tiff in planes": (tiff(WIDE.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), "planes"),
        "four bands": (tiff(np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unspecified"]), "4 channels, of"),
        "four bands, untold": (untold(tiff(np.dstack([RGB, GREY]), photometric="rgb", extrasamples=[0])), "not there"),
        "five bands": (tiff(np.dstack([RGB, GREY, GREY]), photometric="rgb", extrasamples=[2, 0]), "5 channels, of"),
        "four greys": (tiff(np.dstack([RGB, GREY]), photometric="minisblack", planarconfig="contig"), "4 channels, of"),
        "16-bit bands": (tiff(np.dstack([WIDE, WIDE]), photometric="minisblack", planarconfig="contig"), "6 channels"),
        "big bands": (
            tiff(np.dstack([RGB, RGB]), photometric="rgb", extrasamples=[0, 0, 0], bigtiff=True),
            "6 channels",
        ),
        "bands in planes": (
            tiff(
                np.stack([*RGB.transpose(2, 0, 1), GREY]), photometric="rgb", planarconfig="separate", extrasamples=[0]
            ),
            "4 channels, of",
        ),
        "grey and another": (
            tiff(np.dstack([GREY, GREY]), photometric="minisblack", extrasamples=[0]),
            "2 channels, of",
        ),
        "cmyk and another": (
            tiff(np.dstack([RGB, GREY, GREY]), photometric="separated", extrasamples=[0]),
            "5 channels of ink",
        ),
        "inks": (
            tiff(np.dstack([RGB, GREY]), photometric="separated", extratags=[(332, "H", 1, 2, True)]),
            "4 channels of ink",
        ),
        "16-bit bmp with opacity": (bmp(GREY.astype("<u2"), 124, (0x7C00, 0x3E0, 0x1F, 0x8000)), "opacity in pixels"),
        "pfm": (b"Pf\n4 4\n-1.0\n" + bytes(64), no_range),
    }
