# DALI makes its types while it is imported: pyright cannot see them
# pyright: reportAttributeAccessIssue=false
"""Every kind of image file turns to the same RGB by every decoder, or is refused by all of them with a reason."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbeit.data.decode import check, decode, decode_reduced, decode_reference, read_header
from fastbeit.errors import BadImage
from helpers import photos
from helpers.formats import LOSSLESS, files, refused
from helpers.waiting import finished


def shown(encoded: bytes) -> np.ndarray:
    """The pixels of a PNM that `check` made."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", files())
def test_every_decoder_shows_what_the_file_holds(name):
    data, expected, tolerance = files()[name]
    size = read_header(io.BytesIO(data))
    assert size == expected.shape[:2]
    pixels = decode(data, size)
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert np.abs(pixels - expected.astype(float)).mean() <= tolerance
    assert np.array_equal(np.asarray(decode_reference(data, size)), pixels)
    encoded = check(data, size).encoded
    assert encoded == data or np.array_equal(shown(encoded), pixels)
    assert decode_reduced(data, size, 8).pixels.shape[2] == 3


@pytest.mark.parametrize("name", refused())
def test_what_is_refused_is_refused_by_all(name):
    data, reason = refused()[name]
    for decoder in (decode, decode_reference, check):
        with pytest.raises(BadImage, match=reason):
            read_header(io.BytesIO(data))
        with pytest.raises(BadImage):
            decoder(data, (40, 56))


def dali_pixels(encoded: list[bytes], sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """What DALI's decoder on the CPU makes of files, as the pipeline asks it."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def
    def graph():
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        first, size = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("first", "size"))
        return fn.decoders.image_slice(
            images, first, size, axes=(0, 1), device="cpu", output_type=types.RGB, adjust_orientation=False
        )

    pipeline = graph(batch_size=len(encoded), num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    pipeline.feed_input("images", [np.frombuffer(data, np.uint8) for data in encoded])
    pipeline.feed_input("first", np.zeros((len(encoded), 2), np.int32))
    pipeline.feed_input("size", np.array(sizes, np.int32))
    (images,) = pipeline.run()
    return [np.array(images.at(i)) for i in range(len(encoded))]


def assert_dali_agrees(contents: dict[str, bytes]) -> None:
    sizes = [read_header(io.BytesIO(data)) for data in contents.values()]
    checked = [check(data, size).encoded for data, size in zip(contents.values(), sizes, strict=True)]
    ours = [decode(data, size) for data, size in zip(contents.values(), sizes, strict=True)]
    theirs = dali_pixels(checked, sizes)
    # both decode JPEG by libjpeg-turbo
    assert [name for name, a, b in zip(contents, ours, theirs, strict=True) if not np.array_equal(a, b)] == []


def test_dali_shows_the_same():
    pytest.importorskip("nvidia.dali")
    assert_dali_agrees({name: data for name, (data, *_) in files().items()})


def in_a_process(code: str, *args: str) -> subprocess.CompletedProcess:
    return finished([sys.executable, "-c", code, *args])


def hidden_frame(data: bytes, lead: bytes) -> bytes:
    """A JPEG that begins with a marker without a length: who reads one there sees a baseline frame behind the image."""
    data = data[:2] + lead + data[2:]
    return data.ljust(4 + int.from_bytes(data[4:6], "big"), b"\0") + b"\xff\xc0\0\4\0\0"


def test_a_lossless_jpeg_does_not_overrun_memory(tmp_path):
    # 50 times, since what was overwritten does not always hurt
    data = LOSSLESS
    kinds = [data, *(data.replace(b"\xff\xc3", frame) for frame in (b"\xff\xff\xc3", b"\xff\xcb", b"\xff\xc7"))]
    kinds += [hidden_frame(data, lead) for lead in (b"\xff", b"\xff\x01", b"\xff\xd0")]
    for number, kind in enumerate(kinds):
        (tmp_path / f"{number}.jpg").write_bytes(kind)
    done = in_a_process(
        "import sys; from pathlib import Path\n"
        "from fastbeit.data.decode import BadImage, check, decode_reduced, decode_reference\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()) * 50:\n"
        "    for decode in (check, decode_reference, lambda *args: decode_reduced(*args, 8)):\n"
        "        try: decode(path.read_bytes(), (16, 24))\n"
        "        except BadImage: pass\n"
        "print('whole')",
        str(tmp_path),
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_bombs_are_refused_by_their_headers(tmp_path):
    bomb = photos.bomb_png(10_000, 10_000)
    assert len(bomb) < 400_000
    (tmp_path / "a.png").write_bytes(bomb)
    (tmp_path / "b.jpg").write_bytes(photos.bomb_jpeg())
    # these Pillow would decode
    (tmp_path / "c.png").write_bytes(photos.bomb_png(8_000, 8_000))
    (tmp_path / "d.png").write_bytes(photos.bomb_png(1, 20_000))
    done = in_a_process(
        "import io, sys, resource; from pathlib import Path\n"
        "from fastbeit.data.decode import BadImage, check, decode, decode_reference, read_header\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]\n"
        "before = rss()\n"
        "for data in files * 5:\n"
        "    for decoder in (decode, decode_reference, check, lambda data, _: read_header(io.BytesIO(data))):\n"
        "        try: decoder(data, (10_000, 10_000))\n"
        "        except BadImage as err: print(err)\n"
        "print(rss() - before)",
        str(tmp_path),
    )
    *reasons, grown_mb = done.stdout.splitlines()
    assert len(reasons) == 80 and all("too large" in reason for reason in reasons), done.stderr
    # decoded, the first would take 300 MB; Pillow loads a few libraries
    assert float(grown_mb) < 16


def test_damage_ends_in_a_reason():
    """Bytes changed at random, mostly in headers: all decoders agree, and none raises anything but `BadImage`."""
    random, contents = np.random.default_rng(0), [data for data, *_ in files().values()]
    num_bad = 0
    for trial in range(1500):
        data = bytearray(contents[trial % len(contents)])
        for place in random.integers(0, min(len(data), random.choice([200, 800, 1 << 30])), random.integers(1, 5)):
            data[place] = random.integers(256)
        data = bytes(data)
        try:
            size = read_header(io.BytesIO(data))
        except BadImage:
            num_bad += 1
            continue
        answers = []
        for decoder in (decode, decode_reference, check):
            try:
                decoder(data, size)
                answers.append("")
            except BadImage as err:
                answers.append(str(err))
        assert len(set(map(bool, answers))) == 1, answers
        num_bad += bool(answers[0])
    assert 300 < num_bad < 1400


@pytest.fixture(scope="module")
def testdata(tmp_path_factory) -> Path:
    """Debian's libjxl-testdata: in the folder that FASTBEIT_LIBJXL_TESTDATA names, else fetched by apt."""
    if named := os.environ.get("FASTBEIT_LIBJXL_TESTDATA"):
        return Path(named)
    missing = [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {missing[0]} to fetch libjxl-testdata with; set FASTBEIT_LIBJXL_TESTDATA to its folder")
    folder = tmp_path_factory.mktemp("libjxl")
    fetched = subprocess.run(["apt-get", "download", "libjxl-testdata"], cwd=folder, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"apt-get download libjxl-testdata: {fetched.stderr.strip()}; or set FASTBEIT_LIBJXL_TESTDATA")
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


# what of it is no image to us, by suffix; files without one are made to crash decoders of JPEG XL
NO_IMAGE = (
    ".gif",
    ".jxl",
    ".pam",
    ".pfm",
    ".y4m",
    ".txt",
    ".md",
    ".tree",
    ".icc",
    ".gz",
    ".deb",
    ".LICENSE",
    ".README",
    "",
)


def readable(testdata: Path) -> dict[str, bytes]:
    """The content of the files that we read; the others have no suffix of an image."""
    contents, not_read = {}, []
    for path in sorted(path for path in testdata.rglob("*") if path.is_file()):
        data = path.read_bytes()
        try:
            read_header(io.BytesIO(data))
            contents[str(path)] = data
        except BadImage:
            not_read.append(path)
    assert {path for path in not_read if path.suffix not in NO_IMAGE} == set()
    return contents


@pytest.mark.long
def test_all_of_libjxl_testdata(testdata):
    contents = readable(testdata)
    assert len(contents) == 118
    num_as_pillow = 0
    for name, data in contents.items():
        size = read_header(io.BytesIO(data))
        pixels = decode(data, size)
        assert np.array_equal(np.asarray(decode_reference(data, size)), pixels), name
        with Image.open(name) as image:
            if image.mode in ("RGB", "L", "P", "CMYK") and not image.has_transparency_data:
                assert np.array_equal(np.asarray(image.convert("RGB")), pixels), name
                num_as_pillow += 1
    assert num_as_pillow > 80


@pytest.mark.long
def test_dali_shows_the_same_of_libjxl_testdata(testdata):
    pytest.importorskip("nvidia.dali")
    assert_dali_agrees(readable(testdata))
