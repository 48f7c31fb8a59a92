import io
import json
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from fastbeit.data.index import archives
from fastbeit.data.index.members import Inflated, inflate
from fastbeit.errors import BadImage, DataError
from helpers import photos
from helpers.archived import JPEGS, classes_of, index_of, write_tar, zipped
from helpers.waiting import finished

LONG = "a" * 60 + "/" + "b" * 60 + "/" + "c" * 90 + ".jpg"


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_each_format(tmp_path, kind):
    odd = "ünï.JPEG" if kind != tarfile.PAX_FORMAT else "\udcff.jpg"
    path = write_tar(tmp_path / "a.tar", zip(("000.jpg", LONG, odd, "x/y.webp"), JPEGS, strict=True), kind)
    index, names, skipped = index_of(path, tmp_path)
    assert names == [f"a.tar: {name}" for name in ("000.jpg", LONG, odd, "x/y.webp")] and not skipped
    assert [index.read_bytes(i) for i in range(4)] == JPEGS
    assert index.block_rows == 1024 and {index.file_of(i) for i in range(4)} == {0}
    assert index.path(2) == path


@pytest.mark.parametrize(
    "members, classes",
    [
        # a class of numbers, beside the image, before or behind it
        (
            [("0.cls", b"2\n"), ("0.jpg", JPEGS[0]), ("1.jpg", JPEGS[1]), ("1.cls", b"0"), ("2.jpg", JPEGS[2])],
            {"0.jpg": "2", "1.jpg": "0", "2.jpg": None},
        ),
        (
            [("a.x.jpg", JPEGS[0]), ("a.cls", b"dog"), ("b.png", JPEGS[1]), ("b.cls", b"7")],
            {"a.x.jpg": "dog", "b.png": "7"},
        ),
        (
            [
                ("0.jpg", JPEGS[0]),
                ("0.json", json.dumps({"label": 1}).encode()),
                ("1.jpg", JPEGS[1]),
                ("1.json", b'{"cls": 0, "text": "a"}'),
                ("2.jpg", JPEGS[2]),
                ("2.json", b'{"label": true}'),
                ("3.jpg", JPEGS[3]),
                ("3.json", b'["label"]'),
            ],
            {"0.jpg": "1", "1.jpg": "0", "2.jpg": None, "3.jpg": None},
        ),
        ([("0.json", b'{"label": "cat"}'), ("0.jpg", JPEGS[0])], {"0.jpg": "cat"}),
        # of a folder of the same key, another one
        (
            [("cat/0.jpg", JPEGS[0]), ("dog/0.cls", b"1"), ("dog/0.jpg", JPEGS[1])],
            {"cat/0.jpg": None, "dog/0.jpg": "1"},
        ),
        # folders, where nothing is written; those that all share say nothing
        (
            [("./all/cat/0.jpg", JPEGS[0]), ("./all/dog/deep/1.jpg", JPEGS[1])],
            {"./all/cat/0.jpg": "cat", "./all/dog/deep/1.jpg": "dog"},
        ),
        ([("cat/0.jpg", JPEGS[0]), ("cat/deep/1.jpg", JPEGS[1])], {"cat/0.jpg": "cat", "cat/deep/1.jpg": "cat"}),
        ([("cat/0.jpg", JPEGS[0]), ("1.jpg", JPEGS[1])], {"cat/0.jpg": "cat", "1.jpg": None}),
    ],
)
def test_classes_of_a_tar(tmp_path, members, classes):
    index, names, skipped = index_of(write_tar(tmp_path / "a.tar", members), tmp_path)
    assert classes_of(index, [name.removeprefix("a.tar: ") for name in names]) == classes and not skipped


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("0.json", b"{", "label cannot be read"),
        ("0.json", b"[" * 100_000, "JSON inside"),
        ("0.json", b'{"label": 99999999}', "class 99999999, at most 1048575"),
        ("0.json", b'{"label": 1.5}', "'1.5' is no class"),
        ("0.json", b'{"label": [1, 2]}', "is no class"),
        ("0.cls", b"\xff", "label cannot be read"),
        ("0.cls", b"9" * 5000, "label cannot be read"),
        ("0.cls", bytes(archives.MAX_TEXT_BYTES + 1), "1048577 bytes of text"),
    ],
)
def test_a_label_that_is_none_is_said_and_the_image_is_used(tmp_path, name, text, reason):
    index, names, skipped = index_of(write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), (name, text)]), tmp_path)
    assert names == ["a.tar: 0.jpg"] and index.labels[0] == -1
    assert reason in skipped[f"a.tar: {name}"]


def test_what_is_not_used_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("good.jpg", JPEGS[0])
        tar.addfile(special("hard.jpg", tarfile.LNKTYPE, "good.jpg"))
        tar.addfile(special("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(special("pipe.jpg", tarfile.FIFOTYPE))
        tar.addfile(special("device.jpg", tarfile.BLKTYPE))
        tar.addfile(special("folder", tarfile.DIRTYPE))
        for name in ("../up.jpg", "a/../../up.jpg", "/etc/up.jpg", "good.jpg", "._good.jpg"):
            add(name, JPEGS[1])
        add("empty.jpg", b"")
        add("half.jpg", JPEGS[0][:400])
        add("text.jpg", b"hello")
        add("note.txt", b"beside no image")
        add("good.txt", b"not successive, so no part of the sample")
    index, names, skipped = index_of(tmp_path / "a.tar", tmp_path)
    assert names == ["a.tar: good.jpg"] and index.read_bytes(0) == JPEGS[0]
    assert {name.removeprefix("a.tar: "): reason.split(" (")[0] for name, reason in skipped.items()} == {
        "hard.jpg": "a link: to 'good.jpg'",
        "soft.jpg": "a link: to '/etc/passwd'",
        "pipe.jpg": "not a regular file",
        "device.jpg": "not a regular file",
        "../up.jpg": "points outside the archive",
        "a/../../up.jpg": "points outside the archive",
        "/etc/up.jpg": "points outside the archive",
        "good.jpg": "duplicate key",
        "._good.jpg": "hidden: its name begins with a dot",
        "empty.jpg": "empty file",
        "half.jpg": "truncated: corrupt: Truncated File Read",
        "text.jpg": "not an image that is read",
        "note.txt": "not an image that is read",
        "good.txt": "not an image that is read",
    }
    assert not (tmp_path.parent / "up.jpg").exists()


def header(name, size, kind=tarfile.REGTYPE):
    """The header of a member, whatever its size may be."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


GOOD = header("good.jpg", len(JPEGS[0])) + JPEGS[0] + bytes(-len(JPEGS[0]) % 512)


@pytest.mark.parametrize(
    "data, member, reason",
    [
        (GOOD + header("big.jpg", 10 << 30), "big.jpg", f"too large: {10 << 30} bytes"),
        (
            GOOD + header("cut.jpg", 5000) + JPEGS[1][:100],
            "cut.jpg",
            "truncated: 5000 bytes, of which the archive has 100",
        ),
        (GOOD + header("cut.jpg", 5000)[:300], "", "no end mark"),
        (GOOD, "", "no end mark"),
        (GOOD + bytes(512), None, None),
        (GOOD + b"x" * 512 + bytes(1024), "", f"damaged header: at byte {len(GOOD)}"),
        (GOOD + bytes(1024) + GOOD + bytes(1024), "", "tars put together"),
        (GOOD + header("long", 10 << 30, tarfile.XHDTYPE) + bytes(2048), "", f"a header of {10 << 30} bytes"),
        (GOOD + header("long", 10 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(2048), "", f"a header of {10 << 30} bytes"),
        (GOOD + header("back", -len(GOOD) - 1024) + bytes(1024), "", "cut short"),
    ],
)
def test_of_a_damaged_tar_the_good_members_are_used(tmp_path, data, member, reason):
    (tmp_path / "a.tar").write_bytes(data)
    index, names, skipped = index_of(tmp_path / "a.tar", tmp_path)
    assert names == ["a.tar: good.jpg"] and index.read_bytes(0) == JPEGS[0]
    if reason is None:
        assert not skipped
    else:
        assert reason in skipped["a.tar" + f": {member}" * bool(member)]


def test_reading_a_long_tar_takes_little_memory(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"".join(header(f"{n}.jpg", 1) + bytes(512) for n in range(2000)) + bytes(1024))
    tracemalloc.start()
    assert sum(1 for _ in archives.read_tar(tmp_path / "a.tar")) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a name each to tell duplicates, and what is read behind the end; `tarfile` alone would keep five times as much
    assert peak < archives.MAX_TEXT_BYTES + 2000 * 250


@pytest.mark.parametrize("data, reason", [(b"", "empty file"), (b"hello", "no tar"), (bytes(1024), "no image")])
def test_a_tar_without_images(tmp_path, data, reason):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        index_of(tmp_path / "a.tar", tmp_path)
    assert caught.value.exit_code == 66 and not list(tmp_path.glob("*.idx*"))


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
@pytest.mark.parametrize("called", ["shard.tar", "shard.tar.gz"])
def test_a_compressed_tar_is_refused_by_name(tmp_path, mode, name, called):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / called, mode) as tar:
        tar.add(photos.CHINA, "china.jpg")
    for source in (tmp_path / "shards", tmp_path / "shards" / called, tmp_path / "shards" / "*.tar*"):
        with pytest.raises(DataError, match=rf"shards/{called}' is compressed by {name}.*uncompress it first"):
            index_of(source, tmp_path)


def test_a_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("all/", "")
        for name, data, how in [
            ("all/cat/stored.jpg", JPEGS[0], zipfile.ZIP_STORED),
            ("all/dog/deflated.png", photos.encoded(photos.small_photo(), "BMP"), zipfile.ZIP_DEFLATED),
            ("all/dog/wide.jpg", JPEGS[1], zipfile.ZIP_STORED),
            ("all/dog/lzma.jpg", JPEGS[2], zipfile.ZIP_LZMA),
            ("all/ünï.jpg", JPEGS[3], zipfile.ZIP_DEFLATED),
            ("../up.jpg", JPEGS[3], zipfile.ZIP_STORED),
            ("all/empty.jpg", b"", zipfile.ZIP_STORED),
            ("all/bomb.jpg", bytes(100_001), zipfile.ZIP_DEFLATED),
            ("all/text.txt", b"hello", zipfile.ZIP_DEFLATED),
            ("all/.hidden.jpg", JPEGS[3], zipfile.ZIP_STORED),
        ]:
            info = zipfile.ZipInfo(name)
            info.compress_type = how
            with file.open(info, "w", force_zip64="wide" in name) as member:
                member.write(data)
        link = zipfile.ZipInfo("all/link.jpg")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "cat/stored.jpg")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("all/cat/stored.jpg", JPEGS[3])
    # a program that unpacks itself stands before such archives
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    index, names, skipped = index_of(path, tmp_path)
    good = ["cat/stored.jpg", "dog/deflated.png", "dog/wide.jpg", "ünï.jpg"]
    assert names == [f"a.zip: all/{name}" for name in good]
    assert [index.read_bytes(i) for i in (0, 2, 3)] == [JPEGS[0], JPEGS[1], JPEGS[3]]
    assert {name.removeprefix("a.zip: "): reason.split(";")[0] for name, reason in skipped.items()} == {
        "all/dog/lzma.jpg": "compressed by method 14",
        "../up.jpg": "points outside the archive",
        "all/empty.jpg": "empty file",
        "all/bomb.jpg": "too large: 100001 bytes, at most 100000",
        "all/text.txt": "not an image that is read (JPEG, PNG, WebP, BMP, TIFF, PNM)",
        "all/link.jpg": "a link",
        "all/.hidden.jpg": "hidden: its name begins with a dot",
        "all/cat/stored.jpg": "duplicate key",
    }


def test_a_zip_of_many_gigabytes(tmp_path, monkeypatch):
    # told by limits that are lower: then all numbers of the directory, and its own place, stand in their wide fields
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    (tmp_path / "a.zip").write_bytes(data := zipped())
    entry = data.index(b"PK\1\2")
    assert data[entry + 20 : entry + 28] == b"\xff" * 8 and archives.ZIP64_END in data
    index, names, skipped = index_of(tmp_path / "a.zip", tmp_path)
    assert names == ["a.zip: a.jpg", "a.zip: b.jpg"] and not skipped
    assert [index.read_bytes(i) for i in range(2)] == JPEGS[:2]


def test_an_encrypted_member_of_a_zip(tmp_path):
    data = zipped()
    entry = data.index(b"PK\1\2")
    data[entry + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    _, names, skipped = index_of(tmp_path / "a.zip", tmp_path)
    assert names == ["a.zip: b.jpg"] and skipped == {"a.zip: a.jpg": "encrypted"}


@pytest.mark.parametrize(
    "damage, reason",
    [
        # the sizes of the first entry: of what it unpacks to, and of what it takes
        (lambda data, entry: struct.pack_into("<I", data, entry + 24, 10), None),
        (lambda data, entry: struct.pack_into("<I", data, entry + 20, 40), "corrupt deflate stream: cut short"),
        (lambda data, entry: struct.pack_into("<I", data, entry + 20, 1 << 20), "truncated: 1048576 bytes"),
        (lambda data, entry: struct.pack_into("<I", data, entry + 42, 5), "its place in the directory is wrong"),
        (lambda data, entry: struct.pack_into("<I", data, entry + 42, 1 << 30), "its place in the directory is wrong"),
        (lambda data, entry: data.__setitem__(35, 0xFF), "corrupt deflate stream"),
    ],
)
def test_of_a_damaged_zip_the_good_members_are_used(tmp_path, damage, reason):
    data = zipped()
    damage(data, data.index(b"PK\1\2"))
    (tmp_path / "a.zip").write_bytes(data)
    _, names, skipped = index_of(tmp_path / "a.zip", tmp_path)
    assert names[-1] == "a.zip: b.jpg" and len(names) + len(skipped) == 2
    assert reason is None or reason in skipped["a.zip: a.jpg"]


@pytest.mark.parametrize("cut", [-10, 60, 0])
def test_a_zip_that_is_cut_short(tmp_path, cut):
    (tmp_path / "a.zip").write_bytes(zipped()[:cut])
    with pytest.raises(DataError, match=r"no image in .*'a\.zip': no zip, or a damaged one: it has no directory"):
        index_of(tmp_path / "a.zip", tmp_path)


def test_inflating_stops_at_the_limit():
    stream = zlib.compressobj(wbits=-15)
    packed = stream.compress(bytes(100_000)) + stream.flush()
    with pytest.raises(BadImage, match="too large: over 1000 bytes when inflated"):
        inflate(packed, 1000)
    assert inflate(packed, 100_000) == bytes(100_000)


PADDED = """
import resource, sys, zipfile
from pathlib import Path
from fastbeit.data.index.scan import build_index
from fastbeit.data.index.reader import open_index
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
build_index(Path(sys.argv[1]), Path(sys.argv[3]), progress=False)
before = rss()
print(build_index(Path(sys.argv[2]), Path(sys.argv[3]), progress=False).skipped)
print(len(open_index(Path(sys.argv[3])).read_bytes(0)))
print(rss() - before)
"""


def test_a_member_with_much_padding_takes_little_memory(tmp_path):
    (tmp_path / "good.zip").write_bytes(zipped())
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", JPEGS[0])
        with archive.open("b.jpg", "w") as member:
            member.write(JPEGS[1])
            for _ in range(68):
                member.write(bytes(1 << 20))
    done = finished([sys.executable, "-c", PADDED, *(str(tmp_path / name) for name in ("good.zip", "a.zip", "x.idx"))])
    skipped, length, grown_mb = done.stdout.splitlines()
    assert "a.zip: b.jpg" in skipped and "too large: " in skipped and "for 30 x 21 pixels" in skipped, done.stderr
    # of its 68 MB a few are held at a time
    assert int(length) == len(JPEGS[0]) and float(grown_mb) < 32


def test_an_inflated_member_reads_as_a_file(tmp_path):
    data = np.random.default_rng(0).integers(0, 9, 300_000, np.uint8).tobytes()
    stream = zlib.compressobj(wbits=-15)
    packed = stream.compress(data) + stream.flush()
    (tmp_path / "x").write_bytes(b"before" + packed + b"behind")
    with (tmp_path / "x").open("rb") as file:
        inflated = Inflated(file.fileno(), 6, len(packed))
        assert inflated.length() == len(data) and inflated.seek(0, io.SEEK_END) == len(data)
        with io.BufferedReader(inflated, 1000) as reader:
            for place in (0, 250_000, 17, 299_999, 100):
                assert reader.seek(place) == place and reader.read(5000) == data[place : place + 5000]
        for damaged in (packed[:-9], packed[:500] + b"\xff" * 9 + packed[509:]):
            (tmp_path / "y").write_bytes(damaged)
            with (tmp_path / "y").open("rb") as other, pytest.raises(BadImage, match="corrupt deflate stream"):
                Inflated(other.fileno(), 0, len(damaged)).length()
