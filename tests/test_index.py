import os
import re

import numpy as np
import pytest

import photos
from fastbeit.data.index import COLUMNS, DataError, build_index, open_index


def build(folder, tmp_path, name="images.idx"):
    summary = build_index(folder, tmp_path / name, progress=False)
    return summary, open_index(tmp_path / name)


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photos.encoded(photos.small_photo(20, 30)) if data is None else data)


def test_a_flat_folder(tmp_path):
    folder = photos.copy_photos(tmp_path / "photos")
    summary, index = build(folder, tmp_path)
    assert summary.num_images == len(index) == len(photos.PHOTOS) and summary.skipped == []
    names = sorted(path.name for path in photos.PHOTOS)
    assert [index.path(i).name for i in range(len(index))] == names
    china = names.index("china.jpg")
    assert (index.heights[china], index.widths[china], index.labels[china]) == (427, 640, -1)
    assert index.offsets[china] == 0 and index.sizes[china] == photos.CHINA.stat().st_size
    assert index.read_bytes(china) == photos.CHINA.read_bytes()
    assert index.class_names == []


def test_class_folders_at_any_depth(tmp_path):
    for name in ("dog/b.jpg", "dog/deep/er/a.jpg", "cat/c.jpg", "loose.jpg", "empty_class/.hidden.jpg"):
        write(tmp_path / "data" / name)
    summary, index = build(tmp_path / "data", tmp_path)
    assert index.class_names == ["cat", "dog"] and summary.num_classes == 2
    found = {str(index.path(i).relative_to(index.root)): int(index.labels[i]) for i in range(len(index))}
    assert list(found.items()) == [("loose.jpg", -1), ("cat/c.jpg", 0), ("dog/b.jpg", 1), ("dog/deep/er/a.jpg", 1)]


def test_bad_files_are_skipped_with_their_reasons(tmp_path):
    for name, (data, _) in photos.bad_files().items():
        write(tmp_path / "data" / name, data)
    write(tmp_path / "data" / "good.jpg")
    summary, index = build(tmp_path / "data", tmp_path)
    assert len(index) == 1
    skipped = dict(summary.skipped)
    for name, (_, reason) in photos.bad_files().items():
        assert reason in skipped.pop(name), name
    assert not skipped
    assert re.fullmatch(r"1 images, 9 files skipped:\n(  '.*: .*\n?){9}", str(summary))


def test_odd_files_are_kept_with_their_upright_size(tmp_path):
    for name, (data, _) in photos.odd_files().items():
        write(tmp_path / "data" / name, data)
    summary, index = build(tmp_path / "data", tmp_path)
    assert summary.skipped == []
    for i in range(len(index)):
        _, pixels = photos.odd_files()[index.path(i).name]
        assert (index.heights[i], index.widths[i]) == pixels.shape[:2], index.path(i).name


def test_links_and_odd_names(tmp_path):
    data = tmp_path / "data"
    odd = ["a\nb.jpg", "ünï.jpg", os.fsdecode(b"\xff\xfe.jpg"), "no suffix", "space .JPEG"]
    for name in odd:
        write(data / "names" / name)
    (data / "above").symlink_to(data)
    (data / "names" / "loop").symlink_to(data / "names")
    (data / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (data / "linked.jpg").symlink_to(data / "names" / "ünï.jpg")
    (data / "ring.jpg").symlink_to(data / "ring.jpg")
    os.mkfifo(data / "pipe.jpg")
    summary, index = build(data, tmp_path)
    assert {index.path(i).name for i in range(len(index))} == {*odd, "linked.jpg"}
    assert all(index.read_bytes(i) for i in range(len(index)))
    assert dict(summary.skipped) == {
        "above": "folder was read under another name",
        "names/loop": "folder was read under another name",
        "broken.jpg": "broken link",
        "ring.jpg": "broken link",
        "pipe.jpg": "not a regular file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_skipped(tmp_path):
    write(tmp_path / "data" / "good.jpg")
    write(tmp_path / "data" / "secret.jpg")
    write(tmp_path / "data" / "closed" / "x.jpg")
    (tmp_path / "data" / "secret.jpg").chmod(0)
    (tmp_path / "data" / "closed").chmod(0)
    summary, index = build(tmp_path / "data", tmp_path)
    assert len(index) == 1 and all("Permission denied" in reason for _, reason in summary.skipped)


def test_no_image(tmp_path):
    write(tmp_path / "empty" / "notes.txt", b"hello")
    for source, words in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty" / "notes.txt": "tar shards are not read yet",
        tmp_path / "empty": "no image in .*notes.txt.*not an image",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            build_index(source, tmp_path / "images.idx", progress=False)
        assert caught.value.exit_code == 66
    assert not (tmp_path / "images.idx").exists()


def test_the_index_is_a_function_of_the_folder(tmp_path):
    for root in ("one", "two"):
        for name in ("b/x.jpg", "a/y.jpg") if root == "one" else ("a/y.jpg", "b/x.jpg"):
            write(tmp_path / root / name)
    _, one = build(tmp_path / "one", tmp_path, "one.idx")
    _, two = build(tmp_path / "two", tmp_path, "two.idx")
    assert one.fingerprint == two.fingerprint and len(one.fingerprint) == 64
    write(tmp_path / "two" / "a" / "y.jpg", photos.encoded(photos.small_photo(30, 20)))
    _, changed = build(tmp_path / "two", tmp_path, "two.idx")
    assert changed.fingerprint != one.fingerprint


def test_opening_what_is_no_index(tmp_path):
    write(tmp_path / "data" / "x.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    whole = (tmp_path / "images.idx").read_bytes()
    for name, data, words in [
        ("cut.idx", whole[:-9], "cut short"),
        ("stub.idx", whole[:40], "no index"),
        ("empty.idx", b"", "cannot be read"),
        ("text.idx", b"not an index at all", "no index"),
        ("old.idx", whole.replace(b"fastbeit-index-1", b"fastbeit-index-0"), "format fastbeit-index-0"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words):
            open_index(tmp_path / name)
    with pytest.raises(DataError, match="fastbeit index DIR"):
        open_index(tmp_path / "missing.idx")


def test_a_row_takes_less_than_100_bytes(tmp_path):
    # 10 M images of 30-letter names in 1 GB; what remains is the header, once
    write(tmp_path / "data" / "n01440764" / "n01440764_10026.JPEG")
    _, index = build(tmp_path / "data", tmp_path)
    row = sum(np.dtype(dtype).itemsize for name, dtype in COLUMNS.items() if name != "file_names")
    assert row + len("n01440764/n01440764_10026.JPEG") < 100
    assert (tmp_path / "images.idx").stat().st_size < 2048


def test_columns_are_mapped_not_read(tmp_path):
    write(tmp_path / "data" / "x.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        index.heights[0] = 1
    assert not index.heights.flags.owndata
