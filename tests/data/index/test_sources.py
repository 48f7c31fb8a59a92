import os
import time
from pathlib import Path

import numpy as np
import pytest

from fastbeit.data.index import scan
from fastbeit.errors import DataError
from helpers.archived import JPEGS, classes_of, index_of, write_tar, zipped


def shards(folder, count, per_shard=3):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        members = [(f"{number:03}_{i}.jpg", JPEGS[(number + i) % 4]) for i in range(per_shard)]
        write_tar(folder / f"shard-{number:03}.tar", members)
    return folder


def test_shards_by_folder_glob_and_list(tmp_path):
    folder = shards(tmp_path / "shards", 12)
    (folder / "shard-000.json").write_text("{}")  # what some makers of shards leave beside them
    whole, names, _ = index_of(folder, tmp_path)
    assert names == [f"shard-{n:03}.tar: {n:03}_{i}.jpg" for n in range(12) for i in range(3)]
    for pattern in ("*.tar", "shard-{000..011}.tar", "shard-0{0,1}{0..9}.tar"):
        if "{0,1}" in pattern:
            with pytest.raises(DataError, match=r"shard-012\.tar' does not exist"):
                index_of(folder / pattern, tmp_path)
            continue
        index, found, _ = index_of(folder / pattern, tmp_path)
        assert found == names and index.fingerprint == whole.fingerprint
    _, found, _ = index_of(folder / "shard-{003,001}.tar", tmp_path)
    assert [name[:9] for name in found] == ["shard-003"] * 3 + ["shard-001"] * 3


def test_the_order_is_that_of_the_shards_however_they_are_read(tmp_path, monkeypatch):
    folder = shards(tmp_path / "shards", scan.THREADS + 4)
    (folder / "shard-002.tar").write_bytes((folder / "shard-002.tar").read_bytes()[:2500])
    by_archive, names, skipped = index_of(folder, tmp_path)
    assert len(names) == 3 * (scan.THREADS + 4) - 2 and any("shard-002.tar" in name for name in skipped)
    monkeypatch.setattr(scan, "THREADS", 99)
    by_member, other_names, other_skipped = index_of(folder, tmp_path)
    assert (by_member.fingerprint, other_names, other_skipped) == (by_archive.fingerprint, names, skipped)


def test_sources_that_are_none(tmp_path):
    shards(tmp_path / "shards", 1)
    (tmp_path / "shards" / "a.zip").write_bytes(zipped())
    (tmp_path / "photo.jpg").write_bytes(JPEGS[0])
    for name, words in {
        "nowhere": "'.*nowhere' does not exist; an index is made of a folder of images",
        "no-*.tar": "no-.*' does not exist",
        "shards/*": r"all \.tar, or all \.zip: '.*a.zip' is .zip, '.*shard-000.tar' is .tar",
        "photo.jpg": "is no text",
    }.items():
        with pytest.raises(DataError, match=words):
            index_of(tmp_path / name, tmp_path)


def test_archives_beside_images_are_no_images(tmp_path):
    folder = shards(tmp_path / "mixed", 1)
    (folder / "photo.jpg").write_bytes(JPEGS[0])
    _, names, skipped = index_of(folder, tmp_path)
    assert names == ["photo.jpg"] and list(skipped) == ["shard-000.tar"]


def test_a_text_list(tmp_path):
    for name in ("data/cat/a.jpg", "data/dog/b.jpg", "else/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEGS[0])
    os.mkfifo(tmp_path / "pipe.jpg")
    path = tmp_path / "data" / "list.txt"
    path.write_text(
        f"# of my own\n\ndog/b.jpg\tdog\r\ncat/a.jpg\t \n../else/c.jpg\tcat\n{tmp_path}/data/cat/a.jpg\tcat\n"
        f"gone.jpg\tcat\ncat\n{tmp_path}/pipe.jpg\ndog/b.jpg\t99999999\n"
    )
    index, names, skipped = index_of(path, tmp_path)
    assert [os.path.relpath(index.path(i), tmp_path / "data") for i in range(4)] == [
        "dog/b.jpg",
        "cat/a.jpg",
        "../else/c.jpg",
        "cat/a.jpg",
    ]
    assert index.class_names == ["cat", "dog"] and index.labels.tolist() == [1, -1, 0, 0]
    assert index.block_rows == 1
    reasons = {os.path.basename(name): reason for name, reason in skipped.items()}
    assert "No such file" in reasons["gone.jpg"] and "Is a directory" in reasons["cat"]
    assert reasons["pipe.jpg"] == "not a regular file" and "class 99999999" in reasons["b.jpg"]


def test_a_list_from_the_root_of_the_file_system_can_move(tmp_path):
    fingerprints = set()
    for root in (tmp_path / "one", tmp_path / "two"):
        for name in ("all/cat/a.jpg", "all/dog/b.jpg"):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(JPEGS[0])
        (root / "list.txt").write_text(f"{root}/all/cat/a.jpg\n{root}/all/dog/b.jpg\n")
        index, names, _ = index_of(root / "list.txt", tmp_path)
        assert index.root == root / "all" and set(classes_of(index, names)) == {"cat/a.jpg", "dog/b.jpg"}
        # no class is written, and its folders are no classes of a list
        assert index.class_names == [] and index.labels.tolist() == [-1, -1]
        fingerprints.add(index.fingerprint)
    assert len(fingerprints) == 1


def test_a_scan_that_is_stopped_ends_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    folder, examined = shards(tmp_path / "shards", 120, 30), []
    examine = scan._examine

    def slow(file, size):
        examined.append(size)
        time.sleep(0.02)
        return examine(file, size)

    def interrupt(progress, part):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "_examine", slow)
    monkeypatch.setattr(scan.Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        index_of(folder, tmp_path)
    # when the first of 120 shards is done, each of 16 threads has done about one; two thirds of all are seconds later
    assert len(examined) < 2400 and not list(tmp_path.glob("*images.idx*"))


def test_tables(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": data, "path": None} for data in JPEGS * 25]
    table = pa.table({"image": images, "label": [i % 3 for i in range(100)]})
    for part in range(2):
        parquet.write_table(table, tmp_path / f"part-{part}.parquet", row_group_size=30)
    index, names, skipped = index_of(tmp_path / "part-{0,1}.parquet", tmp_path)
    assert len(index) == 200 and index.block_rows == 30 and not skipped
    assert names[101] == "part-1.parquet: row 1" and index.read_bytes(101) == JPEGS[1]
    assert index.class_names == ["0", "1", "2"] and np.array_equal(index.labels, np.tile(np.arange(100) % 3, 2))
    parquet.write_table(table[:99], tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet' has \d+ bytes, and had"):
        index.read_bytes(101)


def test_a_class_of_a_table_that_is_no_class(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pa.table({"image": [{"bytes": JPEGS[0]}], "label": [10**12]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="class 1000000000000 of .* at most 1048576 classes"):
        index_of(tmp_path / "a.parquet", tmp_path)


def test_images_by_a_quoted_pattern(tmp_path, monkeypatch):
    for name in ("cat/a.jpg", "cat/b.png", "dog/c.jpg", "dog/deep/d.jpg", "e.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(JPEGS[0])
    monkeypatch.chdir(tmp_path)
    for pattern, found in {
        "photos/*.jpg": {"e.jpg": None},
        "photos/*/*.jpg": {"cat/a.jpg": "cat", "dog/c.jpg": "dog"},
        "photos/**/*.jpg": {"e.jpg": None, "cat/a.jpg": "cat", "dog/c.jpg": "dog", "dog/deep/d.jpg": "dog"},
        "photos/{cat/a,dog/c}.jpg": {"cat/a.jpg": "cat", "dog/c.jpg": "dog"},
        f"{tmp_path}/photos/c*/*": {"cat/a.jpg": "cat", "cat/b.png": "cat"},
    }.items():
        index, names, skipped = index_of(Path(pattern), tmp_path)
        assert index.root == tmp_path / "photos" and classes_of(index, names) == found and not skipped, pattern
    # what the pattern of a whole folder finds beside images is skipped
    index, names, skipped = index_of(Path("photos/*"), tmp_path)
    assert names == ["e.jpg"] and set(skipped) == {"cat", "dog"} and "FOLDER/**/*.jpg" in skipped["cat"]
    with pytest.raises(DataError, match="does not exist"):
        index_of(Path("photos/*.bmp"), tmp_path)


@pytest.mark.parametrize(
    "separator, called", [(",", "a comma"), (";", "a semicolon"), ("|", "a bar"), (" ", "a space")]
)
def test_other_separators_than_tab_are_named(tmp_path, separator, called):
    for name in ("a.jpg", "b, c.jpg"):
        (tmp_path / name).write_bytes(JPEGS[0])
    (tmp_path / "list.txt").write_text(f"file{separator}class\na.jpg{separator}dog\n")
    with pytest.raises(DataError, match=rf"list.txt' parts paths and classes by {called} .*wanted a TAB"):
        index_of(tmp_path / "list.txt", tmp_path)
    # a name may have them
    (tmp_path / "list.txt").write_text("b, c.jpg\nb, c.jpg\tdog, brown\ngone, c.jpg\n")
    index, _, skipped = index_of(tmp_path / "list.txt", tmp_path)
    assert index.class_names == ["dog, brown"] and index.labels.tolist() == [-1, 0] and list(skipped) == ["gone, c.jpg"]


def test_signs_of_an_encoding(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    (tmp_path / "list.txt").write_text("a.jpg\tdog\n", "utf-8-sig")
    index, names, skipped = index_of(tmp_path / "list.txt", tmp_path)
    assert names == ["a.jpg"] and index.class_names == ["dog"] and not skipped
    (tmp_path / "list.txt").write_text("a.jpg\tdog\n", "utf-16")
    with pytest.raises(DataError, match="text in UTF-16; save it as UTF-8"):
        index_of(tmp_path / "list.txt", tmp_path)
