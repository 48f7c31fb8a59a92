"""What images there are: a table of one row an image, memory-mapped (design D1).

The file is a safetensors file; its tensors are the table's columns, n images in f files:

    file         int32  [n]  which file holds the image
    offset       int64  [n]  where in that file it begins, in bytes: 0 for a plain file
    size         int64  [n]  its length in bytes
    height       uint16 [n]  of the upright image, in pixels
    width        uint16 [n]
    label        int32  [n]  into `class_names`, -1: none
    file_ends    int64  [f]  end of each file's name in file_names
    file_names   uint8  [.]  the names, relative to the root, in the bytes of the file system

The metadata hold the format version, the root, the class names (both JSON), the number of images skipped and the
fingerprint, a sha256 of the columns. 10 M images of 30-letter names take 0.66 GB.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from fastbeit.data.decode import MAX_SIDE, BadImage, check, check_end, read_header
from fastbeit.errors import DATA_MISSING, RunError
from fastbeit.files import aside, put_in_place

FORMAT = "fastbeit-index-1"
COLUMNS = {
    "file": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "height": np.uint16,
    "width": np.uint16,
    "label": np.int32,
    "file_ends": np.int64,
    "file_names": np.uint8,
}
THREADS = 16  # headers are read one small piece a file: the storage's latency is what is waited for
TAIL_BYTES = 1 << 16  # cameras append data to a JPEG; its end is looked for in this many last bytes
assert np.iinfo(np.uint16).max >= MAX_SIDE


class DataError(RunError):
    """The data cannot be used: missing (exit code 66) or too much of it bad (65)."""

    def __init__(self, message: str, exit_code: int = DATA_MISSING) -> None:
        super().__init__(message, exit_code)


@dataclass(frozen=True)
class Summary:
    """What `build_index` found."""

    num_images: int
    num_classes: int
    skipped: list[tuple[str, str]]  # path relative to the source, reason

    def __str__(self) -> str:
        found = (
            f"{self.num_images} images in {self.num_classes} classes"
            if self.num_classes
            else f"{self.num_images} images"
        )
        listed = [f"  {path!r}: {reason}" for path, reason in self.skipped[:20]]
        more = [f"  and {len(self.skipped) - 20} more"] if len(self.skipped) > 20 else []
        return "\n".join([f"{found}, {len(self.skipped)} files skipped" + ":" * bool(listed), *listed, *more])


class Index:
    """An index file, opened: columns are views of the mapped file, nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        columns, metadata = _map_columns(path)
        self.root = Path(json.loads(metadata["root"]))
        self.class_names: list[str] = json.loads(metadata["class_names"])
        self.fingerprint = metadata["fingerprint"]
        self.block_rows = 1  # plain files
        self.offsets, self.sizes = columns["offset"], columns["size"]
        self.heights, self.widths = columns["height"], columns["width"]
        self.labels = columns["label"]
        self._file, self._file_ends, self._file_names = columns["file"], columns["file_ends"], columns["file_names"]

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self):
        # a worker process maps the file itself
        return Index, (self._path,)

    def path(self, i: int) -> Path:
        """The file that holds image i."""
        file = int(self._file[i])
        start = int(self._file_ends[file - 1]) if file else 0
        return self.root / os.fsdecode(self._file_names[start : self._file_ends[file]].tobytes())

    def read_bytes(self, i: int) -> bytes:
        """The encoded image i; `OSError` when its file cannot be read."""
        with self.path(i).open("rb", buffering=0) as file:
            file.seek(int(self.offsets[i]))
            return file.read(int(self.sizes[i]))


def open_index(path: Path) -> Index:
    """Open an index that `build_index` wrote.

    Raises:
        DataError: there is no such file, it is none of ours, or it is cut short.
    """
    return Index(path)


def build_index(source: Path, output: Path, progress: bool = True) -> Summary:
    """List the images below a folder, in the order of their paths, and write them to `output`.

    The first folder of an image's path is its class; images beside those folders have label -1. Links are followed,
    every folder is read once, names that begin with a dot are passed over. Only the ends of a file are read here: one
    that is damaged in its middle is found when it is first used.

    Raises:
        DataError: `source` is no folder, or holds no image.
    """
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise DataError(f"'{source}' {what}; an index is made of a folder of images (tar shards are not read yet)")
    skipped: list[tuple[str, str]] = []
    paths = list(_walk(source, skipped))
    rows: list[tuple[bytes, int, int, int]] = []  # path, bytes, height, width
    for path, found in _report(_examine_all(source, paths), len(paths), progress):
        if isinstance(found, str):
            skipped.append((os.fsdecode(path), found))
        else:
            rows.append((path, *found))
    if not rows:
        reasons = "; ".join(f"{path!r}: {reason}" for path, reason in skipped[:3])
        raise DataError(
            f"no image in '{source}'" + (f"; {len(skipped)} files skipped, such as {reasons}" if skipped else "")
        )
    class_names = sorted({path.split(b"/")[0] for path, *_ in rows if b"/" in path})
    columns = _make_columns(rows, class_names)
    metadata = {
        "format": FORMAT,
        # JSON, since it can write names that are not UTF-8
        "root": json.dumps(os.path.abspath(source)),
        "class_names": json.dumps([os.fsdecode(name) for name in class_names]),
        "num_images": str(len(rows)),
        "num_skipped": str(len(skipped)),
        "fingerprint": _fingerprint(columns),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(columns, aside(output), metadata)
    put_in_place(output)
    return Summary(len(rows), len(class_names), skipped)


def _walk(source: Path, skipped: list[tuple[str, str]]) -> Iterator[bytes]:
    """Paths of the regular files, relative to `source`, folder by folder, each in the order of its names."""
    root = os.fsencode(source)
    seen: set[tuple[int, int]] = set()
    pending = [b""]
    while pending:
        relative = pending.pop()
        try:
            folder = os.path.join(root, relative)
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                # a link to a folder above or beside: to follow it again might never end
                skipped.append((os.fsdecode(relative), "folder was read under another name"))
                continue
            seen.add(identity)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as err:
            skipped.append((os.fsdecode(relative), f"unreadable folder: {err.strerror}"))
            continue
        folders = []
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if entry.name.startswith(b"."):
                continue
            kind = _kind(entry)
            if kind == "folder":
                folders.append(path)
            elif kind == "file":
                yield path
            else:
                skipped.append((os.fsdecode(path), kind))
        pending.extend(reversed(folders))


def _kind(entry: os.DirEntry) -> str:
    """ "folder", "file", or why it is neither; a link is what it leads to."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:
        # a link that leads to itself
        return "broken link"
    # to open a named pipe would wait for ever
    return "broken link" if entry.is_symlink() else "not a regular file"


def _examine_all(source: Path, paths: Sequence[bytes]) -> Iterator[tuple[bytes, tuple[int, int, int] | str]]:
    """`_examine` of each path, in order, by several threads."""
    root = os.fsencode(source)
    waiting: deque[tuple[bytes, Future]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for path in paths:
            waiting.append((path, pool.submit(_examine, os.path.join(root, path))))
            if len(waiting) > 8 * THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        for path, future in waiting:
            yield path, future.result()


def _examine(path: bytes) -> tuple[int, int, int] | str:
    """Bytes, height and width of an image file, or why it is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return "empty file"
            height, width = read_header(file)
            file.seek(0)
            start = file.read(4)
            file.seek(max(0, size - TAIL_BYTES))
            if not check_end(start, file.read()):
                # cut short, or with much appended: only decoding can tell
                file.seek(0)
                check(file.read(), (height, width))
            return size, height, width
    except BadImage as err:
        return str(err)
    except OSError as err:
        return f"unreadable: {err.strerror or err}"


def _report(items: Iterator, total: int, progress: bool) -> Iterator:
    """Pass items on: with a bar on a terminal, with a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, "reading headers", total, unit=" files", disable=not progress)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if progress and time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"reading headers: {done} of {total} files", file=sys.stderr)
        yield item


def _make_columns(rows: list[tuple[bytes, int, int, int]], class_names: list[bytes]) -> dict[str, np.ndarray]:
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = (label_of[path.split(b"/")[0]] if b"/" in path else -1 for path, *_ in rows)
    values = {
        "file": range(len(rows)),
        "offset": np.zeros(len(rows)),
        "size": [row[1] for row in rows],
        "height": [row[2] for row in rows],
        "width": [row[3] for row in rows],
        "label": list(labels),
        "file_ends": np.cumsum([len(row[0]) for row in rows]),
        "file_names": np.frombuffer(b"".join(row[0] for row in rows), np.uint8),
    }
    return {name: np.asarray(values[name]).astype(dtype) for name, dtype in COLUMNS.items()}


def _fingerprint(columns: dict[str, np.ndarray]) -> str:
    # of the columns, not of the file: the same images moved to another root are the same data
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(columns[name].data)
    return digest.hexdigest()


def _map_columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The columns of an index file as views of the mapped file, and its metadata."""
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise DataError(f"no index '{path}'; make one: fastbeit index DIR -o {path}") from None
    except (OSError, ValueError) as err:
        raise DataError(f"index '{path}' cannot be read: {err}") from None
    try:
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise DataError(f"index '{path}' has format {metadata['format']}, wanted {FORMAT}; make it again")
        columns = {}
        for name, dtype in COLUMNS.items():
            first, last = header[name]["data_offsets"]
            columns[name] = np.ndarray(header[name]["shape"], dtype, mapped.data, start + first)
            if columns[name].nbytes != last - first:
                raise ValueError(f"column {name} has {last - first} bytes")
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"'{path}' is no index, or is cut short ({err}); make it again: fastbeit index") from None
    return columns, metadata
