"""Images in tables: Parquet files, and the Arrow files of Hugging Face `datasets`.

A table has one column of images: a struct of `bytes` and `path`, as `datasets` writes it, or bytes alone under one of
`IMAGE_NAMES`. A column of `LABELS`, when there is one, holds whole numbers or names. Arrow files are laid out in the
file as in memory, so an image has its own place there and is read like any other. Parquet is decoded a row group at a
time; the last few stay in memory.
"""

import json
import math
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastbeit.data.index.members import PLAIN, TABLE, Member, Reason
from fastbeit.data.sampling import WINDOW_BLOCKS
from fastbeit.errors import BadImage, ConfigError, DataError

SUFFIXES = ".parquet", ".arrow"
IMAGE_NAMES = "image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content"
LABELS = "label", "fine_label"  # the first that there is; the other is CIFAR-100's, beside its coarse_label
CACHE_BYTES = 512 << 20  # of decoded row groups, in each process
# an epoch's order goes over WINDOW_BLOCKS row groups at a time, each of which may lie in two blocks
GOOD_GROUP_BYTES = CACHE_BYTES // (2 * WINDOW_BLOCKS)
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
SPLIT = re.compile(r"(.+?)-\d+-of-\d+")  # as the hub names files: train-00000-of-00002.parquet


def find_tables(source: Path) -> list[Path] | None:
    """The table files of a source, in order: itself, or those of a folder that `datasets` or the hub wrote.

    Returns:
        None when the source is something else.

    Raises:
        DataError: it has tables of more than one split, or images beside tables.
    """
    if source.is_file():
        return [source] if source.suffix in SUFFIXES else None
    if not source.is_dir():
        return None
    if splits := _note(source / "dataset_dict.json", "splits"):
        _refuse_splits(source, [source / split for split in splits])
    if files := _note(source / "state.json", "_data_files"):
        return [source / file["filename"] for file in files]
    return _parquet_folder(source)


def _note(path: Path, key: str) -> list | None:
    """What a file that `datasets` writes beside its tables says of a key; None without such a file."""
    try:
        return json.loads(path.read_text()).get(key) if path.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError) as err:
        raise DataError(f"'{path}' cannot be read: {err}; write the dataset again") from None


def _refuse_splits(source: Path, splits: list[Path]) -> NoReturn:
    wanted = ", ".join(f"'{split}'" for split in splits)
    raise DataError(f"'{source}' holds {len(splits)} splits; index one of them: {wanted}")


def _parquet_folder(source: Path) -> list[Path] | None:
    """The Parquet files beside or under `data`, where the hub puts them; of one split."""
    for folder in (source, source / "data"):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        tables = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
        if not tables:
            continue
        images = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp"))]
        if images:
            raise DataError(f"'{folder}' holds tables and images ('{tables[0]}', '{images[0]}'); put them apart")
        splits = {match[1] for name in tables if (match := SPLIT.match(name))}
        if len(splits) > 1:
            _refuse_splits(source, [folder / f"{split}-*.parquet" for split in sorted(splits)])
        return [folder / name for name in tables]
    return None


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """What the numbers of labels stand for, as `datasets` notes it; None where it does not.

    Raises:
        DataError: not the same in all files.
    """
    found = {path: _features(_schema(path)).get(_label_column(_schema(path)) or "") for path in paths}
    names = {path: feature.get("names") if feature else None for path, feature in found.items()}
    for path in paths:
        if names[path] != names[paths[0]]:
            raise DataError(
                f"the classes of '{paths[0]}' and '{path}' have other names ({names[paths[0]]}, {names[path]}); "
                "make an index of each"
            )
    return names[paths[0]]


def read_table(path: Path) -> Iterator[Member | Reason]:
    """The images of a table, in its order, and what is wrong with those that are none.

    A row of an Arrow file is PLAIN, its offset is in bytes; one of a Parquet file is TABLE, its offset is the row.

    Raises:
        DataError: there is no column of images, or several, or the file is compressed Arrow.
    """
    pa = _pyarrow()
    column = _image_column(_schema(path), path)
    try:
        yield from (_read_parquet if path.suffix == ".parquet" else _read_arrow)(path, column)
    except (pa.ArrowException, OSError) as err:
        yield "", f"corrupt, or cut short: {_first_line(err)}"


def _read_arrow(path: Path, column: str) -> Iterator[Member | Reason]:
    pa, first = _pyarrow(), 0
    with pa.memory_map(str(path)) as file:
        start, end = file.read_buffer(1).address, file.size()
        file.seek(end - len(ARROW_END))
        is_whole = file.read() == ARROW_END
        file.seek(0)
        for batch in pa.ipc.open_stream(file):
            images, paths = _bytes_and_paths(batch.column(column))
            offsets, sizes = _extents(images)
            data = images.buffers()[2]
            if data is not None and data.size:
                if not start <= data.address < start + end:
                    raise DataError(
                        f"'{path}' is compressed Arrow, whose images cannot be read one by one; write it without "
                        "compression, as `datasets` does (save_to_disk), or as Parquet (to_parquet)"
                    )
                offsets += data.address - start
            rows = range(first, first + len(batch))
            yield from _members(rows, offsets, sizes, images, paths, _labels(batch, path, first), PLAIN)
            first = rows.stop
    if not is_whole:
        yield "", f"cut short after row {first}"


def _read_parquet(path: Path, column: str) -> Iterator[Member | Reason]:
    layout = _layout(path)
    for group, (first, end) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
        table = layout.read(group, [f"{column}.path", *LABELS])
        paths = table.column(column).to_pylist() if column in table.column_names else []
        images = ROW_GROUPS.get(path, group)
        sizes = np.concatenate([_extents(chunk)[1] for chunk in images.chunks])
        yield from _members(
            range(first, end),
            np.arange(first, end),
            sizes,
            images,
            [path and path["path"] for path in paths] or [None] * (end - first),
            _labels(table, path, first),
            TABLE,
        )


def _members(
    rows: range, offsets: np.ndarray, sizes: np.ndarray, images: Any, paths: list, labels: list, packed: int
) -> Iterator[Member | Reason]:
    nulls = np.asarray(images.is_null())
    for row, offset, size, is_null, path, label in zip(rows, offsets, sizes, nulls, paths, labels, strict=True):
        name = path or f"row {row}"
        if is_null:
            yield name, "only a path stands in the table, not the image" if path else "null"
        elif not size:
            yield name, "empty"
        else:
            yield Member(os.fsencode(name), int(offset), int(size), packed, label)


def _bytes_and_paths(column: Any) -> tuple[Any, list[str | None]]:
    """The encoded images of a column, an array of binary, and their paths."""
    pa = _pyarrow()
    if not pa.types.is_struct(column.type):
        return column, [None] * len(column)
    # flatten, unlike field, makes the bytes of a null struct null
    fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
    return fields["bytes"], fields["path"].to_pylist() if "path" in fields else [None] * len(column)


def _extents(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where each value of an array of binary begins in its buffer, and its length, [n] int64 each."""
    dtype = np.int64 if _pyarrow().types.is_large_binary(images.type) else np.int32
    if not len(images):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ends = np.frombuffer(images.buffers()[1], dtype)[images.offset : images.offset + len(images) + 1].astype(np.int64)
    return ends[:-1].copy(), np.diff(ends)


def _labels(table: Any, path: Path, first: int) -> list[str | int | None]:
    """The class of each row; `first` is the row of the file that the table begins with."""
    column = _label_column(table.schema)
    if column is None:
        return [None] * len(table)
    return [_label(value, column, path, first + row) for row, value in enumerate(table.column(column).to_pylist())]


def _label_column(schema: Any) -> str | None:
    return next((name for name in LABELS if name in schema.names), None)


def _label(value: Any, column: str, path: Path, row: int) -> str | int | None:
    """
    Raises:
        DataError: it is neither a whole number nor a name.
    """
    value = os.fsdecode(value) if isinstance(value, bytes) else value
    # as pandas writes whole numbers of which one is missing
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        return value or None
    if isinstance(value, int):
        # -1 is how `datasets` writes that there is none
        return int(value) if value >= 0 else None
    raise DataError(
        f"'{path}', row {row}: label {value!r} is no class; a column '{column}' wants whole numbers from 0 on, or "
        "names; drop or rename the column to index the images without classes"
    )


def row_groups(path: Path) -> list[int]:
    """Rows of each row group of a Parquet file."""
    return np.diff(_layout(path).starts).tolist()


def slow_row_groups(paths: Iterable[Path]) -> str | None:
    """A warning when row groups are so large that images in random order make one be decoded again and again."""
    largest = max(((_layout(path).largest_bytes, path) for path in paths if path.suffix == ".parquet"), default=None)
    if largest is None or largest[0] <= GOOD_GROUP_BYTES:
        return None
    return (
        f"reading will be slow: a row group of '{largest[1]}' holds {largest[0] / 1e6:.0f} MB of images, more than "
        f"{GOOD_GROUP_BYTES / 1e6:.0f} MB, and is decoded whole for one image; write the table with fewer rows a group "
        "(pyarrow: write_table(row_group_size=100)), or as Arrow (datasets: save_to_disk), which needs no decoding"
    )


def read_row(path: Path, row: int) -> bytes:
    """The encoded image in a row of a Parquet file.

    Raises:
        DataError: the file is gone, or is no table any more.
        BadImage: it cannot be read, or holds no image there.
    """
    pa, starts = _pyarrow(), _layout(path).starts
    group = bisect_right(starts, row) - 1
    if not 0 <= group < len(starts) - 1:
        raise BadImage(f"changed since it was indexed: no row {row}")
    try:
        image = ROW_GROUPS.get(path, group)[row - starts[group]].as_py()
    except FileNotFoundError:
        raise DataError(f"'{path}' is gone, or not mounted") from None
    except (pa.ArrowException, OSError) as err:
        raise BadImage(f"unreadable: {_first_line(err)}") from None
    if image is None:
        raise BadImage("changed since it was indexed: null")
    return image


@dataclass(frozen=True)
class Layout:
    """What the end of a Parquet file says of it."""

    path: Path
    column: str  # of images
    metadata: Any
    starts: list[int]  # first row of each row group, and behind the last
    largest_bytes: int  # of images in a row group, decoded

    def read(self, group: int, columns: list[str]) -> Any:
        # a reader of its own: one is not made for several threads
        with _pyarrow().parquet.ParquetFile(self.path, metadata=self.metadata) as file:
            return file.read_row_group(group, columns=columns, use_threads=False)


@lru_cache(256)
def _layout(path: Path) -> Layout:
    with _telling(path), _pyarrow().parquet.ParquetFile(path) as file:
        column, metadata = _image_column(file.schema_arrow, path), file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    images = [
        sum(chunk.total_uncompressed_size for chunk in group if chunk.path_in_schema.split(".")[0] == column)
        for group in chunks
    ]
    return Layout(path, column, metadata, [0, *accumulate(group.num_rows for group in groups)], max(images, default=0))


class RowGroups:
    """The images of the row groups that were read last, at most `CACHE_BYTES` of them, for all threads of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], Future] = OrderedDict()
        self.num_bytes = 0

    def get(self, path: Path, group: int) -> Any:
        """A chunked array of binary."""
        key, mine = (path, group), Future()
        with self._lock:
            future = self._groups.setdefault(key, mine)
            self._groups.move_to_end(key)
        if future is mine:
            # other threads that want it wait, and none decodes it twice
            self._fill(key, mine)
        return future.result()

    def _fill(self, key: tuple[Path, int], future: Future) -> None:
        path, group = key
        try:
            layout = _layout(path)
            column = layout.read(group, [layout.column]).column(0)
            images = _pyarrow().chunked_array([_bytes_and_paths(chunk)[0] for chunk in column.chunks])
        except BaseException as err:
            with self._lock:
                del self._groups[key]
            future.set_exception(err)
            return
        future.set_result(images)
        with self._lock:
            self.num_bytes += images.nbytes
            while self.num_bytes > CACHE_BYTES and len(self._groups) > 1:
                oldest = next(iter(self._groups))
                if not self._groups[oldest].done():
                    break
                self.num_bytes -= self._groups.pop(oldest).result().nbytes


ROW_GROUPS = RowGroups()
# a lock that another thread held during a fork would stay shut in the child
os.register_at_fork(after_in_child=ROW_GROUPS.__init__)


def _schema(path: Path) -> Any:
    pa = _pyarrow()
    with _telling(path):
        if path.suffix == ".parquet":
            return pa.parquet.read_schema(path)
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).schema


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Errors of a whole file as `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"'{path}' is gone, or not mounted") from None
    except (_pyarrow().ArrowException, OSError) as err:
        raise DataError(
            f"'{path}' is no table that can be read: {_first_line(err)}; get it again, or leave it out"
        ) from None


def _features(schema: Any) -> dict[str, Any]:
    """The columns as `datasets` describes them, where it wrote the table."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(noted).get("info", {}).get("features", {}) if noted else {}
    except (ValueError, AttributeError, RecursionError) as err:
        raise DataError(f"what `datasets` notes of a table cannot be read: {err}; write the dataset again") from None


def _image_column(schema: Any, path: Path) -> str:
    pa = _pyarrow()

    def is_image(field: Any) -> bool:
        if pa.types.is_struct(field.type):
            return any(child.name == "bytes" and _is_binary(child.type) for child in field.type)
        return _is_binary(field.type) and field.name.lower() in IMAGE_NAMES

    found = [field.name for field in schema if is_image(field)]
    # sound is a struct of bytes and path too
    noted = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image" and name in found]
    if len(noted or found) == 1:
        return (noted or found)[0]
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise DataError(
        f"'{path}' has {len(found)} columns of images, wanted one: a struct of bytes and path, or bytes called "
        f"{', '.join(IMAGE_NAMES[:-1])} or {IMAGE_NAMES[-1]}; it has {columns}"
    )


def _is_binary(kind: Any) -> bool:
    types = _pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind)


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0]


def _pyarrow() -> Any:
    # as late as this: few need it, and it takes a tenth of a second
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"Parquet and Arrow files are read by pyarrow ({err}): pip install 'fastbeit[parquet]'"
        ) from None
    return pyarrow
