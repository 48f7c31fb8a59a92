import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbeit.data.index import tables
from fastbeit.data.index.members import PLAIN, TABLE, Member
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.index.tables import (
    class_names,
    find_tables,
    read_row,
    read_table,
    row_groups,
    slow_row_groups,
)
from fastbeit.errors import BadImage, ConfigError, DataError
from helpers import photos

NAMES = ["cat", "dog", "owl"]
IMAGES = [photos.encoded(photos.small_photo(8 + i, 10), "PNG") for i in range(12)]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def noted(**features) -> dict[bytes, bytes]:
    """What `datasets` writes beside a table's schema."""
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


HF = noted(image={"_type": "Image"}, label={"names": NAMES, "_type": "ClassLabel"})


def rows_of(images, first: int = 0) -> pa.Table:
    """Images as `datasets` keeps them; label 0, 1, 2, 0, ..."""
    numbers = range(first, first + len(images))
    columns = {
        "image": pa.array(
            [{"bytes": image, "path": f"{i}.png"} for i, image in zip(numbers, images, strict=True)], STRUCT
        ),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
    }
    return pa.table(columns).replace_schema_metadata(HF)


def write_arrow(path: Path, table: pa.Table, batch_rows: int = 1000, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table, max_chunksize=batch_rows)
    return path


def write_parquet(path: Path, table: pa.Table, group_rows: int = 1000, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path


def save_to_disk(folder: Path) -> Path:
    """A folder as `Dataset.save_to_disk` of datasets 5.2 writes it, in two files."""
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        write_arrow(folder / name, rows_of(IMAGES[6 * i : 6 * i + 6], 6 * i), batch_rows=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def images_of(path: Path) -> list[bytes]:
    """The images of a table, each read by itself."""
    found = []
    with path.open("rb") as file:
        for member in read_table(path):
            assert isinstance(member, Member), member
            data = (
                os.pread(file.fileno(), member.size, member.offset)
                if member.packed == PLAIN
                else read_row(path, member.offset)
            )
            assert len(data) == member.size
            found.append(data)
    return found


# ---- Arrow


def test_images_of_a_saved_dataset_have_their_own_place_in_the_file(tmp_path):
    paths = find_tables(save_to_disk(tmp_path / "saved"))
    assert paths and [path.name for path in paths] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [image for path in paths for image in images_of(path)] == IMAGES
    first = [member for member in read_table(paths[0]) if isinstance(member, Member)]
    assert [member.name for member in first] == [b"%d.png" % i for i in range(6)]
    assert [member.label for member in first] == [0, 1, 2, 0, 1, 2]
    assert {member.packed for member in first} == {PLAIN}
    assert class_names(paths) == NAMES


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_bytes_without_a_path(tmp_path, kind, write):
    table = pa.table({"jpg": pa.array(IMAGES, kind), "label": ["b", None] * 6, "caption": ["x"] * 12})
    path = write(tmp_path / f"x.{'arrow' if write is write_arrow else 'parquet'}", table, 5)
    assert images_of(path) == IMAGES
    members = [member for member in read_table(path) if isinstance(member, Member)]
    assert [member.name for member in members[:2]] == [b"row 0", b"row 1"] and members[-1].name == b"row 11"
    assert [member.label for member in members[:2]] == ["b", None]
    assert class_names([path]) is None


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_arrow_is_refused(tmp_path, codec):
    path = write_arrow(tmp_path / "x.arrow", rows_of(IMAGES), compression=codec)
    with pytest.raises(DataError, match=r"x.arrow' is compressed Arrow.*save_to_disk"):
        list(read_table(path))


@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_rows_without_an_image_are_said(tmp_path, write):
    images = [
        None,
        {"bytes": None, "path": "/elsewhere/a.jpg"},
        {"bytes": IMAGES[0], "path": None},
        {"bytes": b"", "path": "b.jpg"},
        {"bytes": None, "path": None},
        {"bytes": IMAGES[1], "path": "c.jpg"},
    ]
    # -1 is how `datasets` writes that there is no label
    table = pa.table({"image": pa.array(images, STRUCT), "label": [0, 1, 2, 3, -1, -1]}).replace_schema_metadata(HF)
    path = write(tmp_path / f"x.{'arrow' if write is write_arrow else 'parquet'}", table, 4)
    found = list(read_table(path))
    assert [entry for entry in found if isinstance(entry, tuple)] == [
        ("row 0", "null"),
        ("/elsewhere/a.jpg", "only a path stands in the table, not the image"),
        ("b.jpg", "empty"),
        ("row 4", "null"),
    ]
    members = [entry for entry in found if isinstance(entry, Member)]
    assert [(member.name, member.size, member.label) for member in members] == [
        (b"row 2", len(IMAGES[0]), 2),
        (b"c.jpg", len(IMAGES[1]), None),
    ]


def test_arrow_that_is_cut_short(tmp_path):
    whole = write_arrow(tmp_path / "x.arrow", rows_of(IMAGES), batch_rows=4).read_bytes()
    last = [member for member in read_table(tmp_path / "x.arrow") if isinstance(member, Member)][-1]
    for length, num_images, reason in [
        (len(whole) - 8, 12, "cut short after row 12"),
        (last.offset, 8, "corrupt, or cut short"),
    ]:
        (tmp_path / "x.arrow").write_bytes(whole[:length])
        found = list(read_table(tmp_path / "x.arrow"))
        assert len(found) == num_images + 1
        last = found[-1]
        assert isinstance(last, tuple) and last[0] == "" and last[1].startswith(reason)


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table" * 100])
def test_what_is_no_table(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="is no table that can be read"):
        list(read_table(tmp_path / name))


# ---- Parquet


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_rows_of_parquet_in_any_order(tmp_path, compression):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES), 5, compression=compression)
    assert row_groups(path) == [5, 5, 2]
    assert images_of(path) == IMAGES
    assert [read_row(path, row) for row in (11, 0, 4, 5, 9, 10)] == [IMAGES[row] for row in (11, 0, 4, 5, 9, 10)]
    (*_, last) = read_table(path)
    assert last == Member(b"11.png", 11, len(IMAGES[11]), TABLE, 2)
    assert class_names([path]) == NAMES


@pytest.fixture
def reads(monkeypatch):
    """Row groups whose images were decoded, in order; none is left from another test."""
    monkeypatch.setattr(tables, "ROW_GROUPS", tables.RowGroups())
    found, read = [], tables.Layout.read

    def listening(layout, group, columns):
        if columns == [layout.column]:
            found.append(group)
        return read(layout, group, columns)

    monkeypatch.setattr(tables.Layout, "read", listening)
    return found


def test_row_groups_stay_in_bounded_memory(tmp_path, monkeypatch, reads):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES), 3)
    group_bytes = max(sum(map(len, IMAGES[i : i + 3])) for i in range(0, 12, 3))
    monkeypatch.setattr(tables, "CACHE_BYTES", int(2.5 * group_bytes))
    for row in (0, 3, 1, 4, 5, 2):
        read_row(path, row)
    assert reads == [0, 1]
    read_row(path, 6)  # takes the place of the one that was wanted least lately
    read_row(path, 2)
    assert reads == [0, 1, 2] and tables.ROW_GROUPS.num_bytes < tables.CACHE_BYTES
    read_row(path, 3)
    assert reads == [0, 1, 2, 1]
    # one stays, however large
    monkeypatch.setattr(tables, "CACHE_BYTES", 1)
    for row in (9, 10, 11):
        assert read_row(path, row) == IMAGES[row]
    assert reads[4:] == [3]


def test_threads_share_a_row_group(tmp_path, monkeypatch, reads):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES * 20), 60)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: read_row(path, row), range(240)))
    assert found == IMAGES * 20
    assert sorted(reads) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_a_thread_reads(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES), 3)
    read_row(path, 0)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with tables.ROW_GROUPS._lock:
            held.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        try:
            os._exit(0 if read_row(path, 5) == IMAGES[5] else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert status == 0


def test_parquet_that_is_gone_or_damaged(tmp_path, reads):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES), 6, compression="none")
    with pytest.raises(BadImage, match="changed since it was indexed"):
        read_row(path, 12)
    start = path.read_bytes().index(IMAGES[0])
    with path.open("r+b") as file:
        # the header of the first page
        file.seek(4)
        file.write(bytes(start - 4))
    with pytest.raises(BadImage, match="unreadable"):
        read_row(path, 0)
    last = list(read_table(path))[-1]
    assert isinstance(last, tuple) and "corrupt" in last[1]
    assert read_row(path, 6) == IMAGES[6]
    path.unlink()
    for gone in (path, tmp_path / "never.parquet"):
        with pytest.raises(DataError, match=rf"{gone.name}' is gone, or not mounted") as caught:
            read_row(gone, 0)
        assert caught.value.exit_code == 66


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch):
    small = write_parquet(tmp_path / "small.parquet", rows_of(IMAGES), 3)
    large = write_parquet(tmp_path / "large.parquet", rows_of(IMAGES), 12)
    monkeypatch.setattr(tables, "GOOD_GROUP_BYTES", sum(map(len, IMAGES)) // 2)
    assert slow_row_groups([small]) is None
    said = slow_row_groups([small, large, tmp_path / "x.arrow"])
    assert said and "large.parquet" in said and "row_group_size" in said and "save_to_disk" in said


# ---- which column, which files


def test_the_column_of_images(tmp_path):
    sound = pa.array([{"bytes": b"RIFF", "path": None}] * 12, STRUCT)
    table = rows_of(IMAGES).append_column("audio", sound)
    features = {"image": {"_type": "Image"}, "audio": {"_type": "Audio"}, "label": {"_type": "Value"}}
    path = write_parquet(tmp_path / "x.parquet", table.replace_schema_metadata(noted(**features)))
    assert images_of(path) == IMAGES and class_names([path]) is None
    write_parquet(path, table.replace_schema_metadata(None))
    with pytest.raises(DataError, match=r"has 2 columns of images, wanted one: .*audio: struct<bytes"):
        list(read_table(path))
    write_parquet(path, table.drop_columns(["image", "audio"]).append_column("blob", pa.array(IMAGES)))
    with pytest.raises(DataError, match=r"has 0 columns of images, .* it has label: int64, blob: binary"):
        list(read_table(path))


def test_files_that_name_their_classes_otherwise(tmp_path):
    one = write_parquet(tmp_path / "one.parquet", rows_of(IMAGES))
    names = noted(label={"names": NAMES[::-1], "_type": "ClassLabel"})
    two = write_arrow(tmp_path / "two.arrow", rows_of(IMAGES).replace_schema_metadata(names))
    assert class_names([one, one]) == NAMES
    with pytest.raises(DataError, match=r"classes of '.*one.parquet' and '.*two.arrow' have other names \(\['cat'"):
        class_names([one, two])


def test_which_files_are_a_table(tmp_path):
    one = write_parquet(tmp_path / "one" / "x.parquet", rows_of(IMAGES))
    assert find_tables(one) == find_tables(one.parent) == [one]
    hub = tmp_path / "hub"
    train = [write_parquet(hub / "data" / f"train-0000{i}-of-00002.parquet", rows_of(IMAGES)) for i in range(2)]
    (hub / "README.md").write_text("a data set")
    assert find_tables(hub) == find_tables(hub / "data") == train
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(IMAGES[0])
    for other in ("photos", "photos/x.png", "nowhere"):
        assert find_tables(tmp_path / other) is None


def test_a_split_must_be_chosen(tmp_path):
    hub, saved = tmp_path / "hub", tmp_path / "saved"
    for split in ("train", "test"):
        write_parquet(hub / "data" / f"{split}-00000-of-00001.parquet", rows_of(IMAGES))
        save_to_disk(saved / split)
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"2 splits; index one of them: '.*data/test-\*.parquet', '.*train-\*.parquet'"):
        find_tables(hub)
    with pytest.raises(DataError, match=r"2 splits; index one of them: '.*saved/train', '.*saved/test'"):
        find_tables(saved)
    assert len(find_tables(saved / "test") or []) == 2


def test_what_is_neither(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES))
    (tmp_path / "y.JPG").write_bytes(IMAGES[0])
    with pytest.raises(DataError, match=r"holds tables and images \('x.parquet', 'y.JPG'\); put them apart"):
        find_tables(path.parent)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json' cannot be read"):
        find_tables(tmp_path)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", rows_of(IMAGES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert find_tables(path) == [path]
    with pytest.raises(ConfigError, match=r"pip install 'fastbeit\[parquet\]'"):
        list(read_table(path))


@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_cifar_100_as_the_hub_has_it(tmp_path, write):
    """Images in `img`, and two columns of labels, of which the hundred classes are wanted."""
    fine, coarse = ["apple", "beaver", "cloud"], ["fruit", "animal"]
    features = noted(
        img={"_type": "Image"},
        fine_label={"names": fine, "_type": "ClassLabel"},
        coarse_label={"names": coarse, "_type": "ClassLabel"},
    )
    numbers = range(len(IMAGES))
    table = pa.table(
        {
            "img": pa.array([{"bytes": one, "path": None} for one in IMAGES], STRUCT),
            "coarse_label": pa.array([i % 2 for i in numbers], pa.int64()),
            "fine_label": pa.array([i % 3 for i in numbers], pa.int64()),
        }
    ).replace_schema_metadata(features)
    path = write(tmp_path / f"train.{'arrow' if write is write_arrow else 'parquet'}", table, 5)
    build_index(path, tmp_path / "images.idx", progress=False)
    index = open_index(tmp_path / "images.idx")
    assert index.class_names == fine and index.labels.tolist() == [i % 3 for i in numbers]


# ---- and from there on


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_an_index_of_a_table(tmp_path, kind):
    if kind == "arrow":
        source = save_to_disk(tmp_path / "source")
    else:
        source = write_parquet(tmp_path / "source" / "x.parquet", rows_of(IMAGES), 5).parent
    bad = pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}, {"bytes": b"GIF89a", "path": None}], STRUCT)})
    bad = bad.append_column("label", pa.array([0, 1])).replace_schema_metadata(HF)
    if kind == "arrow":
        write_arrow(source / "data-00001-of-00002.arrow", pa.concat_tables([rows_of(IMAGES[6:], 6), bad]))
    else:
        write_parquet(source / "y.parquet", bad)
    summary = build_index(source, tmp_path / "images.idx", progress=False)
    index = open_index(tmp_path / "images.idx")
    assert [index.read_bytes(i) for i in range(len(index))] == IMAGES
    assert index.class_names == NAMES and index.labels.tolist() == [0, 1, 2] * 4
    assert index.heights.tolist() == list(range(8, 20)) and set(index.widths.tolist()) == {10}
    assert index.block_rows == (1024 if kind == "arrow" else 5)
    file = "data-00001-of-00002.arrow" if kind == "arrow" else "x.parquet"
    assert index.name(7) == f"{source / file}: 7.png"
    assert [reason.partition(" (")[0] for _, reason in summary.skipped] == [
        "only a path stands in the table, not the image",
        "not an image that is read",
    ]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_table_that_went_away(tmp_path, kind):
    write = write_arrow if kind == "arrow" else write_parquet
    path = write(tmp_path / "source" / f"x.{kind}", rows_of(IMAGES))
    build_index(path, tmp_path / "images.idx", progress=False)
    write(path, rows_of(IMAGES[1:]))
    with pytest.raises(DataError, match=rf"x.{kind}' has \d+ bytes"):
        open_index(tmp_path / "images.idx").read_bytes(0)
    path.unlink()
    with pytest.raises(DataError, match=rf"x.{kind}'"):
        open_index(tmp_path / "images.idx").read_bytes(0)


@pytest.mark.parametrize("write", [write_arrow, write_parquet], ids=["arrow", "parquet"])
@pytest.mark.parametrize(
    "labels, wanted",
    [
        (pa.array([0.0, 2.0, float("nan"), None]), [0, 2, None, None]),
        (pa.array([True, False, None, True]), [1, 0, None, 1]),
        (pa.array(["cat", "", None, "3"]), ["cat", None, None, "3"]),
        (pa.array([b"cat", b"dog", None, b"cat"]), ["cat", "dog", None, "cat"]),
        (pa.array(["cat", "dog", "cat", None]).dictionary_encode(), ["cat", "dog", "cat", None]),
        (pa.array([3, 0, 255, 1], pa.uint8()), [3, 0, 255, 1]),
        (pa.array([0, 1.5, 2, 3]), "row 1: label 1.5 is no class"),
        (pa.array([[0], [1], [2], []]), r"row 0: label \[0\] is no class"),
        (pa.array([{"a": 1}] * 4), "row 0: label {'a': 1} is no class"),
        (pa.array([0.0, float("inf"), 1, 2]), "row 1: label inf is no class"),
    ],
    ids=["float", "bool", "names", "bytes", "dictionary", "unsigned", "fractions", "lists", "structs", "inf"],
)
def test_labels_of_all_types_are_read_or_refused(tmp_path, write, labels, wanted):
    images = pa.array([{"bytes": image, "path": None} for image in IMAGES[:4]], STRUCT)
    path = tmp_path / ("a.arrow" if write is write_arrow else "a.parquet")
    write(path, pa.table({"image": images, "label": labels}))
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=rf"{path.name}', {wanted}; a column 'label' wants whole numbers"):
            list(read_table(path))
    else:
        assert [member.label for member in read_table(path) if isinstance(member, Member)] == wanted
