"""Photos to test with, and files that are damaged or odd, made of them."""

import importlib.util
import io
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


def _packaged(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent.joinpath(*parts)


SKIMAGE = _packaged("skimage", "data")
SKLEARN = _packaged("sklearn", "datasets", "images")
CHINA = SKLEARN / "china.jpg"
PHOTOS = [
    CHINA,
    SKLEARN / "flower.jpg",
    *(SKIMAGE / name for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")),
]


def copy_photos(folder: Path) -> Path:
    """A flat folder of `PHOTOS`."""
    folder.mkdir(parents=True)
    for path in PHOTOS:
        shutil.copyfile(path, folder / path.name)
    return folder


def small_photo(height: int = 96, width: int = 128) -> Image.Image:
    with Image.open(CHINA) as image:
        return image.resize((width, height))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that is to be turned for display, by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, quality=95, exif=exif)


def bomb_png(height: int, width: int) -> bytes:
    """A small PNG that decodes to height x width RGB pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + 3 * width)) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb_jpeg() -> bytes:
    """A small JPEG whose header claims 65500 x 65500 pixels."""
    data = bytearray(encoded(small_photo()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


@cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that are no usable image: name -> (content, a word of the reason)."""
    jpeg, png = CHINA.read_bytes(), encoded(small_photo(), "PNG")
    return {
        "zero.jpg": (b"", "empty"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "corrupt"),
        "half.png": (png[: len(png) // 2], "corrupt"),
        "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
        "animation.gif": (encoded(small_photo(), "GIF"), "not an image"),
        "bomb.png": (bomb_png(8_000, 8_000), "too large"),
        "bomb.jpg": (bomb_jpeg(), "too large"),
        "long.png": (bomb_png(1, 20_000), "too large"),
        "header.jpg": (jpeg[:100], "corrupt"),
    }


def mid_corrupt_jpeg() -> bytes:
    """Whole at both ends, overwritten in the middle."""
    data = bytearray(CHINA.read_bytes())
    data[50_000:50_200] = bytes(np.random.default_rng(0).integers(0, 255, 200, np.uint8))
    return bytes(data)


@cache
def odd_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files that are usable: name -> (content, the RGB pixels that it shows)."""
    photo = small_photo()
    rgb, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    alpha = np.tile(np.linspace(0, 255, rgb.shape[1]).astype(np.uint8), (len(rgb), 1))
    share = alpha[..., None] / 255
    palette = photo.quantize(32)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    wide = grey.astype(np.uint16) * 256 + 77
    files = {
        "png_called.jpg": (encoded(photo, "PNG"), rgb),
        "lossless.webp": (encoded(photo, "WEBP", lossless=True), rgb),
        "image.bmp": (encoded(photo, "BMP"), rgb),
        "image.tif": (encoded(photo, "TIFF"), rgb),
        "image.ppm": (encoded(photo, "PPM"), rgb),
        "grey.png": (encoded(Image.fromarray(grey), "PNG"), np.dstack([grey] * 3)),
        "bilevel.png": (encoded(photo.convert("1"), "PNG"), np.asarray(photo.convert("1").convert("RGB"))),
        "rgba.png": (encoded(rgba, "PNG"), rgb * share + 255 * (1 - share)),
        "grey_alpha.png": (encoded(grey_alpha, "PNG"), np.dstack([grey] * 3) * share + 255 * (1 - share)),
        "palette.png": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette_clear.png": (
            encoded(palette, "PNG", transparency=3),
            np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB"))),
        ),
        "grey_16_bits.png": (encoded(Image.fromarray(wide), "PNG"), np.dstack([grey] * 3)),
        "one_pixel.png": (encoded(photo.resize((1, 1)), "PNG"), np.asarray(photo.resize((1, 1)))),
        "thin.png": (encoded(photo.resize((3, 500)), "PNG"), np.asarray(photo.resize((3, 500)))),
    }
    jpegs = {
        "grey.jpg": encoded(photo.convert("L")),
        "progressive.jpg": encoded(photo, progressive=True),
        "full_chroma.jpg": encoded(photo, subsampling=0),
        "rgb.jpg": encoded(photo, keep_rgb=True),
        "cmyk.jpg": encoded(photo.convert("CMYK")),
        "appended.jpg": encoded(photo) + bytes(100_000),
    }
    for name, data in jpegs.items():
        with Image.open(io.BytesIO(data)) as image:
            files[name] = data, np.asarray(image.convert("RGB"))
    for orientation in range(1, 9):
        data = turned(photo, orientation)
        with Image.open(io.BytesIO(data)) as image:
            files[f"exif_{orientation}.jpg"] = data, upright(np.asarray(image), orientation)
    return files


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF says of each orientation: where the stored first row and first column are to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
