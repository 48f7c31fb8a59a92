"""What images there are: a table of one row an image, memory-mapped.

The file is a safetensors file; its tensors are the table's columns, n images in f files:

    offset       int64  [n]  where in its file the image begins, in bytes: 0 for a plain file; of a TABLE: the row
    size         int64  [n]  its length there, in bytes; of a TABLE: that of the image
    member_ends  int64  [n]  end of each image's name in member_names; [0] for plain files
    file_ends    int64  [f]  end of each file's name in file_names
    file_sizes   int64  [f]  length of each file, in bytes; [0] for plain files, whose lengths are in `size`
    file         int32  [n]  which file holds the image
    label        int32  [n]  into `class_names`, -1: none
    height       uint16 [n]  of the upright image, in pixels
    width        uint16 [n]
    low, high    uint16 [n]  least and largest value of an image of 16 bits a channel; 0 and 0 of any other
    sample       uint32 [n]  checksum of a few KiB of the image's bytes: `members.content_sample`
    packed       uint8  [n]  how the bytes are kept: PLAIN, DEFLATE or TABLE of `members`
    member_names uint8  [.]  names of the images inside their files, in the bytes of the file system
    file_names   uint8  [.]  names of the files, relative to the root or absolute

The metadata hold the format version, the root, the class names (both JSON), how many successive rows lie together, the
numbers of images and of files skipped, the fingerprint, a sha256 of the columns, and checksums: of each MiB of each
column, and of the header. `open_index` compares the header and, of a large index, a sample of the columns; `fastbeit
index check` compares all. 10 M images of 30-letter names take 0.75 GB.
"""

import json
import os
import threading
import zlib
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fastbeit.checksums import Checked, check_blocks
from fastbeit.config.sections import Levels
from fastbeit.data.decode import MAX_SIDE
from fastbeit.data.index.members import DEFLATE, TABLE, content_sample, inflate, most_bytes
from fastbeit.errors import BadImage, ConfigError, DataError

FORMAT = "fastbeit-index-3"
COLUMNS = {
    "offset": np.int64,
    "size": np.int64,
    "member_ends": np.int64,
    "file_ends": np.int64,
    "file_sizes": np.int64,
    "file": np.int32,
    "label": np.int32,
    "height": np.uint16,
    "width": np.uint16,
    "low": np.uint16,
    "high": np.uint16,
    "sample": np.uint32,
    "packed": np.uint8,
    "member_names": np.uint8,
    "file_names": np.uint8,
}
# one value an image
ROW_COLUMNS = "offset", "size", "file", "label", "height", "width", "low", "high", "sample", "packed"
LEVELS_WANTED = 16  # of 256, that 16-bit images have when their high byte is kept
OPEN_SHARDS = 64  # at most, in a process: far below the 1024 files that a process usually may open
assert np.iinfo(np.uint16).max >= MAX_SIDE


class Index:
    """An index file, opened: columns are views of the mapped file, nothing is read before it is asked for.

    `len` is the number of images; `offsets`, `sizes`, `heights`, `widths` and `labels` are [n] and read-only.
    """

    def __init__(self, path: Path) -> None:
        self.location = path
        columns, metadata = _map_columns(path)
        self.root = Path(metadata["root"])
        self.class_names: list[str] = metadata["class_names"]
        self.fingerprint: str = metadata["fingerprint"]
        self.block_rows: int = metadata["block_rows"]  # successive rows that lie together: 1 for plain files
        self.offsets, self.sizes = columns["offset"], columns["size"]
        self.heights, self.widths = columns["height"], columns["width"]
        self.labels = columns["label"]
        self._checksums: dict[str, list[int]] = metadata["checksums"]
        self.checked: Checked | None = None  # how much of it, when `open_index` opened it
        self._columns, self._in_shards = columns, len(columns["file_sizes"]) > 0
        self._root = os.fsencode(self.root)

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self):
        # a worker process maps the file itself
        return Index, (self.location,)

    def check_sample(self) -> Checked:
        """Compare it with its checksums, all of a small index and a sample of a large one.

        Raises:
            DataError: it is damaged.
        """
        checked = check_blocks(self._columns, self._checksums)
        if checked.damaged:
            raise self._damaged(f"column {checked.damaged[0]}, the MiB from byte {checked.damaged[1]} on")
        return checked

    def check_whole(self) -> None:
        """Compare all of it with its fingerprint; errors as in `check_sample`."""
        if fingerprint_of(self._columns) != self.fingerprint:
            raise self._damaged("its columns")

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"index '{self.location}' is damaged: {what}, differ from what was written; copy it again, or make it "
            "again: fastbeit index"
        )

    def levels_seen(self) -> tuple[int, int] | None:
        """Least and largest value of its images of 16 bits a channel; None: it has none."""
        wide = np.flatnonzero(self._columns["high"])
        if not len(wide):
            return None
        return int(self._columns["low"][wide].min()), int(self._columns["high"][wide].max())

    def name(self, i: int) -> str:
        """What to call image i: its path, or its shard's and its name in there."""
        name = os.fsdecode(self._file_path(i))
        return f"{name}: {os.fsdecode(self._name('member', i))}" if self._in_shards else name

    def inner_name(self, i: int) -> bytes:
        """The name of image i in its shard; of one that is a file by itself: its path below the root, or an absolute
        one."""
        return self._name("member", i) if self._in_shards else self._name("file", self.file_of(i))

    def path(self, i: int) -> Path:
        """The file that holds image i, alone or among others."""
        return Path(os.fsdecode(self._file_path(i)))

    def file_of(self, i: int) -> int:
        """The number of that file."""
        return int(self._columns["file"][i])

    def read_bytes(self, i: int) -> bytes:
        """The encoded image i.

        Raises:
            BadImage: this image alone cannot be read, or is not the one that was indexed.
            DataError: the folder is gone, or the shard is, or has changed.
        """
        return self._read_member(i) if self._in_shards else self._read_file(i)

    def _file_path(self, i: int) -> bytes:
        return os.path.join(self._root, self._name("file", self.file_of(i)))

    def _name(self, kind: str, number: int) -> bytes:
        ends = self._columns[f"{kind}_ends"]
        start = int(ends[number - 1]) if number else 0
        return self._columns[f"{kind}_names"][start : int(ends[number])].tobytes()

    def _read_file(self, i: int) -> bytes:
        wanted = int(self.sizes[i])
        try:
            with open(self._file_path(i), "rb", buffering=0, opener=_open_at_once) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(wanted)
        except OSError as err:
            if _is_gone(self._root):
                raise DataError(f"the images' folder '{self.root}' is gone, or not mounted") from None
            raise BadImage(f"unreadable: {err.strerror or err}") from None
        return self._expect(i, data, len(data) if size == wanted else size)

    def _expect(self, i: int, data: bytes, size: int) -> bytes:
        """The bytes of image i as they are kept, when they are those that were indexed."""
        if not size:
            raise BadImage("empty file")
        if size != self.sizes[i]:
            raise BadImage(f"changed since it was indexed: {size} bytes, was {self.sizes[i]}")
        if content_sample(lambda start, length: data[start : start + length], size) != self._columns["sample"][i]:
            raise BadImage("changed since it was indexed: as many bytes, but others")
        return data

    def _read_member(self, i: int) -> bytes:
        wanted = int(self.sizes[i])
        shard = SHARDS.get(self._file_path(i), int(self._columns["file_sizes"][self.file_of(i)]))
        packed, offset = self._columns["packed"][i], int(self.offsets[i])
        if packed == TABLE:
            # as late as this: tables are of few users, and bring pyarrow
            from fastbeit.data.index.tables import read_row

            # it is opened anew, by its name
            shard.check()
            data = read_row(self.path(i), offset)
            return self._expect(i, data, len(data))
        try:
            data = os.pread(shard.descriptor, wanted, offset)
        except OSError as err:
            shard.check()
            raise BadImage(f"unreadable: {err.strerror or err}") from None
        if len(data) < wanted:
            # cut while it is open
            shard.check()
        data = self._expect(i, data, len(data))
        most = most_bytes(int(self.heights[i]), int(self.widths[i]))
        return inflate(data, most) if packed == DEFLATE else data


class Shard:
    """An open file of several images; closed when the last thread lets go of it.

    Raises:
        DataError: it is gone, or has not `size` bytes.
    """

    def __init__(self, path: bytes, size: int) -> None:
        self._path, self._size, self.descriptor = path, size, -1
        try:
            self.descriptor = _open_at_once(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise _lost(path, err) from None
        self.check()

    def __del__(self, close=os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)

    def check(self) -> None:
        try:
            size = os.stat(self._path).st_size
        except OSError as err:
            raise _lost(self._path, err) from None
        if size != self._size:
            raise DataError(
                f"'{os.fsdecode(self._path)}' has {size} bytes, and had {self._size} when it was indexed, so none "
                "of its images can be trusted; put the old file back, or make the index again"
            )


class OpenShards:
    """The shards that were read last, for all threads of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shards: OrderedDict[tuple[bytes, int], Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, path: bytes, size: int) -> Shard:
        with self._lock:
            shard = self._shards.get((path, size)) or Shard(path, size)
            self._shards[path, size] = shard
            self._shards.move_to_end((path, size))
            while len(self._shards) > OPEN_SHARDS:
                # who still reads it holds it open
                self._shards.popitem(last=False)
        return shard


SHARDS = OpenShards()
# a lock that another thread held during a fork would stay shut in the child
os.register_at_fork(after_in_child=SHARDS.__init__)


def open_index(path: Path, levels: Levels | None = None) -> Index:
    """Open an index that `build_index` wrote.

    Args:
        levels: by which its images will be decoded; None: they will not be.

    Raises:
        DataError: there is no such file, it is none of ours, cut short or damaged.
        ConfigError: these levels would leave next to nothing of its 16-bit images.
    """
    index = Index(path)
    index.checked = index.check_sample()
    seen = index.levels_seen()
    if levels == "high_byte" and seen and seen[1] - seen[0] < LEVELS_WANTED << 8:
        low, high = seen
        # those of a camera or a scanner of so many bits, where values begin near 0
        fitting = [0, (1 << high.bit_length()) - 1] if high < LEVELS_WANTED << 8 else [low, high]
        raise ConfigError(
            f"index '{path}' holds 16-bit images with values from {low} to {high} alone, of which "
            f"data.levels=high_byte keeps {(high >> 8) - (low >> 8) + 1} of 256 grey levels; set "
            f"data.levels=[{fitting[0]},{fitting[1]}], or data.levels=image for each image's own range (fastbeit "
            f"shard: --levels {fitting[0]},{fitting[1]}, or --levels image)"
        )
    return index


def fingerprint_of(columns: dict[str, np.ndarray]) -> str:
    """Of the columns, not of the file: the same images moved to another root are the same data."""
    digest = sha256()
    for name in COLUMNS:
        digest.update(columns[name].data)
    return digest.hexdigest()


def header_sum(header: dict[str, Any]) -> int:
    """Checksum of all that a header says but of itself."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "header_sum"}
    return zlib.crc32(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())


def is_index(path: Path) -> bool:
    """Whether a file is an index, of any version."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"format": "fastbeit-index' in file.read(256)


def _open_at_once(path: Any, flags: int) -> int:
    """A pipe that took a file's place is not waited for: it is empty."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_gone(root: bytes) -> bool:
    try:
        with os.scandir(root) as entries:
            # where a disk was mounted an empty folder stays
            return next(entries, None) is None
    except OSError:
        return True


def _lost(path: bytes, err: OSError) -> DataError:
    return DataError(
        f"'{os.fsdecode(path)}', which holds images of the index, cannot be read: {err.strerror or err}; put it back, "
        "mount its disk, or make the index again"
    )


def _map_columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns of an index file as views of the mapped file, and its metadata."""
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise DataError(f"no index '{path}'; make one: fastbeit index SOURCE -o {path}") from None
    except (OSError, ValueError) as err:
        raise DataError(f"index '{path}' cannot be read: {err}") from None
    try:
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise DataError(
                f"index '{path}' has format {metadata['format']}, wanted {FORMAT}; make it again: fastbeit index "
                "(a run that was begun with it is finished by the fastbeit that began it)"
            )
        if int(metadata["header_sum"]) != header_sum(header):
            raise ValueError("its header is damaged")
        columns = {}
        for name, dtype in COLUMNS.items():
            first, last = header[name]["data_offsets"]
            columns[name] = np.ndarray(header[name]["shape"], dtype, mapped.data, start + first)
            if columns[name].nbytes != last - first:
                raise ValueError(f"column {name} has {last - first} bytes")
        numbers = {name: int(metadata[name]) for name in ("num_images", "num_skipped", "block_rows")}
        if {len(columns[name]) for name in ROW_COLUMNS} != {numbers["num_images"]}:
            raise ValueError("its columns differ in length")
        texts = {name: json.loads(metadata[name]) for name in ("root", "class_names", "checksums")}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
        raise DataError(
            f"'{path}' is no index, or is damaged or cut short ({err}); make it again: fastbeit index"
        ) from None
    return columns, {**metadata, **numbers, **texts}
