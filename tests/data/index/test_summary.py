"""What is said of files that were skipped, and of 16-bit images."""

import os
import tarfile

import numpy as np

from fastbeit.data.index.summary import Summary, kind_of, write_skipped
from fastbeit.jobs.index import index
from helpers import photos
from helpers.archived import index_of
from helpers.formats import WIDE, png, tiff


def test_skipped_files_are_grouped_and_likely_images_come_first(tmp_path, capsys):
    data = tmp_path / "data"
    (data / ".git").mkdir(parents=True)
    (data / ".git/config.jpg").write_bytes(photos.encoded(photos.small_photo()))
    (data / "good.jpg").write_bytes(photos.encoded(photos.small_photo()))
    for number in range(30):
        (data / f"{number:02}.xml").write_text("<a/>")
        (data / f"{number:02}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for name in ("cut.jpg", "short.jpg"):
        (data / name).write_bytes(photos.encoded(photos.small_photo())[:500])
    (data / "no suffix").write_bytes(photos.bomb_jpeg())
    (data / ".DS_Store").write_bytes(b"x")
    assert index(data, tmp_path / "images.idx") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 image, 65 files skipped:"
    assert said[1:9] == [
        "  likely images:",
        "    30 x .heic: not an image that is read, such as '00.HEIC'",
        "    2 x .jpg: truncated, such as 'cut.jpg'",
        said[4],
        "  other files:",
        "    30 x .xml: not an image that is read, such as '00.xml'",
        "    2 x no suffix: hidden, such as '.DS_Store'",
        f"skipped files are listed in {tmp_path}/images.idx.skipped",
    ]
    assert said[4].startswith("    'no suffix': too large: ")
    listed = (tmp_path / "images.idx.skipped").read_text().splitlines()
    assert len(listed) == 65 and all("no suffix" in line or ".HEIC" in line or ".jpg" in line for line in listed[:33])
    # one line for a hidden folder, whatever lies in it
    assert [line for line in listed if "hidden" in line] == [
        "'.DS_Store': hidden: its name begins with a dot",
        "'.git': hidden: its name begins with a dot",
    ]


def test_links_in_a_tar_are_one_reason(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        path = tmp_path / "a.jpg"
        path.write_bytes(photos.encoded(photos.small_photo()))
        tar.add(path, "a.jpg")
        for number in range(40):
            info = tarfile.TarInfo(f"{number:02}.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, f"elsewhere/{number}.jpg"
            tar.addfile(info)
    _, _, skipped = index_of(tmp_path / "a.tar", tmp_path)
    assert len(skipped) == 40 and {kind_of(reason) for reason in skipped.values()} == {"a link"}
    lines = str(Summary(1, 0, list(skipped.items()))).splitlines()
    assert lines[2:] == ["    40 x .jpg: a link, such as 'a.tar: 00.jpg'"]


def test_the_range_of_16_bit_images_is_said(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(png(WIDE >> 4, 16, 2))
    (tmp_path / "data/b.jpg").write_bytes(photos.encoded(photos.small_photo()))
    # which libtiff reads by itself, beyond what is buffered of the file
    large = np.tile(WIDE >> 4, (4, 4, 1))
    (tmp_path / "data/c.tif").write_bytes(tiff(large, photometric="rgb", compression="zlib"))
    (tmp_path / "data/d.tif").write_bytes(tiff(large[..., 0], photometric="minisblack", compression="zlib"))
    index(tmp_path / "data", tmp_path / "images.idx")
    low, high = int((WIDE >> 4).min()), int((WIDE >> 4).max())
    assert f"3 images of 16 bits: values from {low} to {high}" in capsys.readouterr().out


def test_names_of_all_kinds_are_listed_whole_or_not_at_all(tmp_path, monkeypatch):
    names = ["a\nb", os.fsdecode(b"\xff\xfe"), "ünï", "\ud800"]
    write_skipped(tmp_path / "x.skipped", [(name, f"corrupt: {name}") for name in names])
    assert len((tmp_path / "x.skipped").read_text("utf-8").splitlines()) >= 4
    assert os.listdir(tmp_path) == ["x.skipped"]
