"""Archives to test with, and their indexes."""

import io
import tarfile
import zipfile

from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from helpers import photos

JPEGS = [photos.encoded(photos.small_photo(20 + number, 30)) for number in range(4)]


def index_of(source, tmp_path):
    """The index of a source, its images by name, and what was skipped."""
    summary = build_index(source, tmp_path / "images.idx", progress=False)
    index = open_index(tmp_path / "images.idx")
    names = [index.name(i).removeprefix(f"{index.root}/") for i in range(len(index))]
    for i in range(len(index)):
        with io.BytesIO(index.read_bytes(i)) as file, photos.Image.open(file) as image:
            assert image.size == (index.widths[i], index.heights[i])
    return index, names, dict(summary.skipped)


def classes_of(index, names):
    return {
        name: index.class_names[label] if label >= 0 else None
        for name, label in zip(names, index.labels.tolist(), strict=True)
    }


def write_tar(path, members, kind=tarfile.GNU_FORMAT):
    """Members are names and contents, or TarInfo without any."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zipped(how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("a.jpg", JPEGS[0])
        archive.writestr("b.jpg", JPEGS[1])
    return bytearray(file.getvalue())
