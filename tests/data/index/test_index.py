import io
import multiprocessing
import os
import pickle
import resource
import tarfile
import tracemalloc
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL.PngImagePlugin import PngImageFile
from safetensors.numpy import load_file

from fastbeit.data.index import scan
from fastbeit.data.index.archives import read_tar
from fastbeit.data.index.reader import COLUMNS, SHARDS, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.index.sources import Names, Source
from fastbeit.data.index.writer import Rows, make_table, write_index
from fastbeit.errors import BadImage, DataError, RunError
from helpers import photos


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


def test_the_first_folder_is_the_class_even_of_all(tmp_path):
    write(tmp_path / "data" / "pets" / "cat" / "a.jpg")
    write(tmp_path / "data" / "pets" / "dog" / "b.jpg")
    assert build(tmp_path / "data", tmp_path)[1].class_names == ["pets"]


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
    cut = {name for name, reason in summary.skipped if reason.startswith("truncated: ")}
    assert cut == {"half.jpg", "half.png", "header.jpg"}
    said = str(summary).splitlines()
    assert said[0] == "1 image, 9 files skipped:"


def test_odd_files_are_kept_with_their_upright_size(tmp_path):
    for name, (data, _) in photos.odd_files().items():
        write(tmp_path / "data" / name, data)
    summary, index = build(tmp_path / "data", tmp_path)
    assert summary.skipped == []
    for i in range(len(index)):
        _, pixels = photos.odd_files()[index.path(i).name]
        assert (index.heights[i], index.widths[i]) == pixels.shape[:2], index.path(i).name


def test_a_turned_png(tmp_path, monkeypatch):
    exif = photos.Image.Exif()
    exif[0x0112] = 6
    plain, turned = (photos.encoded(photos.small_photo(20, 30), "PNG", exif=e) for e in (None, exif))
    start, end = (turned.index(kind) - 4 for kind in (b"eXIf", b"IDAT"))
    behind = turned[:start] + turned[end:-12] + turned[start:end] + turned[-12:]
    for name, data in {"plain.png": plain, "turned.png": turned, "behind.png": behind}.items():
        write(tmp_path / "data" / name, data)
    loaded, end_of = [], PngImageFile.load_end
    monkeypatch.setattr(PngImageFile, "load_end", lambda self: loaded.append(1) or end_of(self))
    _, index = build(tmp_path / "data", tmp_path)
    assert [index.path(i).name for i in range(3)] == ["behind.png", "plain.png", "turned.png"]
    assert index.heights.tolist() == [30, 20, 30] and index.widths.tolist() == [20, 30, 20]
    # only that one was decoded
    assert len(loaded) == 1


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
        tmp_path / "empty" / "notes.txt": "no image in .*notes.txt.*'hello'.*No such file",
        tmp_path / "empty": "no image in .*notes.txt.*not an image",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            build_index(source, tmp_path / "deep/images.idx", progress=False)
        assert caught.value.exit_code == 66
    assert not (tmp_path / "deep").exists()


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
        ("list.idx", (2).to_bytes(8, "little") + b"[]", "no index"),
        ("deep.idx", (200_000).to_bytes(8, "little") + b"[" * 200_000, "no index"),
        ("nulls.idx", bytes(len(whole)), "no index"),
        ("stub.idx", whole[:40], "no index"),
        ("empty.idx", b"", "cannot be read"),
        ("text.idx", b"not an index at all", "no index"),
        (
            "old.idx",
            whole.replace(b"fastbeit-index-3", b"fastbeit-index-1"),
            "-index-1, wanted fastbeit-index-3; make it",
        ),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words):
            open_index(tmp_path / name)
    with pytest.raises(DataError, match="fastbeit index SOURCE"):
        open_index(tmp_path / "missing.idx")


def test_columns_are_mapped_not_read(tmp_path):
    write(tmp_path / "data" / "x.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        index.heights[0] = 1
    assert not index.heights.flags.owndata


def test_it_is_a_safetensors_file(tmp_path):
    _, index = build(in_shards(tmp_path / "data", 2), tmp_path)
    columns = load_file(tmp_path / "images.idx")
    assert {name: column.dtype for name, column in columns.items()} == COLUMNS
    assert np.array_equal(columns["offset"], index.offsets) and columns["file_sizes"].tolist() == [10240, 10240]
    assert bytes(columns["file_names"]) == b"0.tar1.tar" and bytes(columns["member_names"]) == b"a.jpgb.jpga.jpgb.jpg"


@pytest.mark.parametrize("data, reason", [(b"", "empty file"), (b"x" * 12, "12 bytes, was"), (None, "No such file")])
def test_a_file_that_changed_is_a_bad_image(tmp_path, data, reason):
    write(tmp_path / "data" / "x.jpg")
    write(tmp_path / "data" / "y.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    (tmp_path / "data" / "x.jpg").unlink()
    if data is not None:
        write(tmp_path / "data" / "x.jpg", data)
    with pytest.raises(BadImage, match=reason) as caught:
        index.read_bytes(0)
    assert "x.jpg" not in str(caught.value) and index.name(0) == str(tmp_path / "data" / "x.jpg")
    assert index.read_bytes(1)


def test_a_pipe_that_took_a_file_s_place_is_not_waited_for(tmp_path):
    write(tmp_path / "data" / "x.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    (tmp_path / "data" / "x.jpg").unlink()
    os.mkfifo(tmp_path / "data" / "x.jpg")
    with pytest.raises(BadImage, match="empty file"):
        index.read_bytes(0)


@pytest.mark.parametrize("leave_mount_point", [False, True])
def test_a_folder_that_is_gone(tmp_path, leave_mount_point):
    write(tmp_path / "data" / "x.jpg")
    _, index = build(tmp_path / "data", tmp_path)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    if leave_mount_point:
        (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="folder '.*data' is gone, or not mounted") as caught:
        index.read_bytes(0)
    assert caught.value.exit_code == 66


def in_shards(folder, count):
    """Two images a shard."""
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, width in (("a.jpg", 30), ("b.jpg", 40)):
                data = photos.encoded(photos.small_photo(20, width))
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_a_shard_that_is_gone_or_has_changed(tmp_path):
    _, index = build(in_shards(tmp_path / "data", 3), tmp_path)
    index.read_bytes(0)
    (tmp_path / "data" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"data/1\.tar'.* cannot be read: No such file.*mount its disk") as gone:
        index.read_bytes(2)
    with (tmp_path / "data" / "2.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"data/2\.tar' has 10752 bytes, and had 10240 when it was indexed") as changed:
        index.read_bytes(4)
    assert gone.value.exit_code == changed.value.exit_code == 66
    # one that is open is not asked again, but what is no longer there is missed
    assert index.read_bytes(1)
    os.truncate(tmp_path / "data" / "0.tar", 600)
    with pytest.raises(DataError, match=r"data/0\.tar' has 600 bytes"):
        index.read_bytes(1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_shards_are_kept_open_but_not_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbeit.data.index.reader.OPEN_SHARDS", 3)
    _, index = build(in_shards(tmp_path / "data", 9), tmp_path)
    before = open_files(tmp_path)
    images = [index.read_bytes(i) for i in range(len(index))]
    assert open_files(tmp_path) - before == {f"{n}.tar" for n in (6, 7, 8)} and len(SHARDS) == 3
    index.read_bytes(12)
    index.read_bytes(0)
    assert open_files(tmp_path) - before == {f"{n}.tar" for n in (0, 6, 8)}
    # from many threads, each of which drives out the others' shards, and in a child that was forked off meanwhile
    rows = np.random.default_rng(0).integers(0, len(index), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(index.read_bytes, rows)
        child = multiprocessing.get_context("fork").Process(target=read_all, args=(index, images))
        child.start()
        assert all(data == images[i] for i, data in zip(rows, read, strict=True))
        child.join(20)
    assert child.exitcode == 0 and len(open_files(tmp_path) - before) == 3


def open_files(folder):
    names = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if path.startswith(f"{folder}/") and path.endswith(".tar"):
            names.add(os.path.basename(path))
    return names


def read_all(index, images):
    assert len(SHARDS) == 0
    assert [index.read_bytes(i) for i in range(len(index))] == images


def test_in_a_worker_process(tmp_path):
    _, index = build(in_shards(tmp_path / "data", 1), tmp_path)
    index.read_bytes(0)
    copied = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 500 and copied.read_bytes(1) == index.read_bytes(1)


def test_an_index_that_cannot_be_written(tmp_path):
    write(tmp_path / "data" / "x.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/images.idx' cannot be written") as caught:
        build_index(tmp_path / "data", tmp_path / "file" / "images.idx", progress=False)
    assert caught.value.exit_code == 73


def test_progress_is_said_where_no_terminal_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan, "SAY_EVERY_S", 0)
    build_index(in_shards(tmp_path / "data", 2), tmp_path / "images.idx")
    said = capsys.readouterr().err
    assert said.startswith("reading headers: ") and "4 images, 0 skipped" in said.splitlines()[-1]
    build_index(tmp_path / "data", tmp_path / "images.idx", progress=False)
    assert capsys.readouterr().err == ""


def made_up(num_images, in_archives):
    """The rows of a large source, without its files."""
    rows = Rows()
    rows.labels = {b"": 0}
    for name, column in rows.columns.items():
        values = np.arange(num_images) if name == "file" and not in_archives else np.ones(num_images)
        column.frombytes(values.astype(COLUMNS[name]).tobytes())
    rows.columns["label"] = array("i", bytes(4 * num_images))
    rows.names.letters += b"n01440764/n01440764_10026.JPEG" * num_images
    rows.names.ends.frombytes((30 * np.arange(1, num_images + 1)).tobytes())
    if not in_archives:
        return rows, Source(Path("/data"), rows.names)
    files = Names(b"shard-%06d.tar" % number for number in range(2000))
    return rows, Source(Path("/data"), files, [1 << 30] * 2000, read_tar)


@pytest.mark.long
@pytest.mark.parametrize("in_archives", [False, True])
def test_ten_million_images(tmp_path, in_archives):
    rows, source = made_up(10_000_000, in_archives)
    tracemalloc.start()
    write_index(make_table(rows, source, 0), tmp_path / "images.idx")
    # a few columns are turned to their final values, none is copied beside
    assert tracemalloc.get_traced_memory()[1] < 250e6
    tracemalloc.stop()
    assert (tmp_path / "images.idx").stat().st_size < 0.76e9
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    index = open_index(tmp_path / "images.idx")
    assert len(index) == 10_000_000 and index.name(9_999_999).endswith("n01440764/n01440764_10026.JPEG")
    # it is mapped, not read: to read it would take a page fault for each 64 KiB, 10,000 of them
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 1000


@pytest.mark.long
def test_memory_of_a_scan(tmp_path):
    # links to an image a folder, as a file can have 65,000 names: 100,000 of 30 letters
    for folder in (tmp_path / "data" / f"n{number:08}" for number in range(20)):
        write(folder / f"{folder.name}_00000.JPEG")
        for number in range(1, 5_000):
            os.link(folder / f"{folder.name}_00000.JPEG", folder / f"{folder.name}_{number:05}.JPEG")
    tracemalloc.start()
    build_index(tmp_path / "data", tmp_path / "images.idx", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / 100_000 < 160
