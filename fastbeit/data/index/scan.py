"""One look at every image of a source, and the index of those that can be used.

Only both ends of an image are read, and a little of its middle: one that is damaged there is found when it is first
used, or by `fastbeit index check`. Images of 16 bits a channel are decoded, to say what values they have. While 10 M
images of 30-letter names are scanned, 1.4 GB of memory are in use: their columns, as they will be written, and the
names of the files that the source lists. An archive wants 100 bytes more for each image in it while it is read, to tell
duplicates.
"""

import io
import itertools
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from fastbeit.data.decode import TAIL_BYTES, check, check_end, read_header, read_range
from fastbeit.data.index import tables
from fastbeit.data.index.hold_out import hold_out
from fastbeit.data.index.members import (
    MAX_BYTES,
    PLAIN,
    TABLE,
    Inflated,
    Member,
    Reason,
    Window,
    content_sample,
    most_bytes,
)
from fastbeit.data.index.sources import Source, open_source
from fastbeit.data.index.summary import Summary, sort_skipped
from fastbeit.data.index.writer import Look, Rows, Table, make_table, write_index
from fastbeit.errors import CANNOT_CREATE, BadImage, DataError, writing
from fastbeit.files import aside, try_to_write
from fastbeit.plural import counted

THREADS = 16  # headers are read one small piece a file: the storage's latency is what is waited for
TOGETHER = 16  # images that a thread takes at a time
SAY_EVERY_S = 10
INFLATED_BUFFER = 1 << 20  # bytes


@dataclass
class Part:
    """What one thread found in one go."""

    rows: Rows = field(default_factory=Rows)
    skipped: list[Reason] = field(default_factory=list)
    done: int = 0  # files, or bytes of a file of several images


@dataclass(frozen=True)
class Division:
    """How images are held out."""

    share: float  # in (0, 1)
    seed: int = 0

    def outputs(self, output: Path) -> list[Path]:
        """`images.train.idx` and `images.val.idx` for `images.idx`."""
        return [output.with_name(f"{output.stem}.{part}{output.suffix}") for part in ("train", "val")]


def build_index(source: Path, output: Path, progress: bool = True, division: Division | None = None) -> Summary:
    """List the images of a source, which `sources` describes, in the order of their paths, and write them to `output`;
    with a division, to two files beside it.

    The class of an image is what is written of it: in a text list, in a table, in a `.cls` or `.json` beside it. Where
    nothing is written of any, it is the first folder of its path; images beside those folders have label -1.

    Raises:
        DataError: `source` is nothing that is read, or holds no image.
        RunError: the index cannot be written.
    """
    opened = open_source(source)
    rows, skipped = Rows(), opened.skipped
    outputs = division.outputs(output) if division else [output]
    with writing(f"'{output}'", exit_code=CANNOT_CREATE):
        # not to find out after hours
        for path in outputs:
            try_to_write(path)
    try:
        for part in _examine_all(opened, progress):
            rows.extend(part.rows)
            skipped += part.skipped
        if not rows:
            reasons = "; ".join(f"{path!r}: {reason}" for path, reason in skipped[:3])
            raise DataError(
                f"no image in '{source}'"
                + (f"; {counted(len(skipped), 'file')} skipped, such as {reasons}" if skipped else "")
            )
        whole = make_table(rows, opened, len(skipped))
        parts = [whole]
        if division:
            held_out = hold_out(whole, division.share, division.seed)
            parts = [whole.select(~held_out), whole.select(held_out)]
        with writing(f"'{output}'", exit_code=CANNOT_CREATE):
            output.parent.mkdir(parents=True, exist_ok=True)
            # a kill between the two leaves one that is missing, not one that overlaps with the other
            for path in outputs[1:]:
                path.unlink(missing_ok=True)
            for table, path in zip(parts, outputs, strict=True):
                write_index(table, path)
    finally:
        for path in outputs:
            aside(path).unlink(missing_ok=True)
    return _summary(whole, skipped, {path: len(table) for table, path in zip(parts, outputs, strict=True)})


def _summary(table: Table, skipped: list[Reason], written: dict[Path, int]) -> Summary:
    low, high = table.columns["low"], table.columns["high"]
    wide = np.flatnonzero(high)
    levels = (int(low[wide].min()), int(high[wide].max())) if len(wide) else (0, 0)
    return Summary(len(table), len(table.class_names), sort_skipped(skipped), len(wide), levels, written)


def _examine_all(source: Source, progress: bool) -> Iterator[Part]:
    """Every image of a source, in order, by several threads."""
    stop = threading.Event()
    waiting: deque[Future[Part]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        with Progress(source, progress) as shown:
            for job in itertools.chain(_jobs(source, stop), itertools.repeat(None)):
                if job:
                    waiting.append(pool.submit(job))
                elif not waiting:
                    break
                if not job or len(waiting) > 4 * THREADS:
                    part = waiting.popleft().result()
                    shown.advance(part)
                    yield part
    finally:
        # not to end only when whole archives are done
        stop.set()
        pool.shutdown(cancel_futures=True)


def _jobs(source: Source, stop: threading.Event) -> Iterator[Callable[[], Part]]:
    numbers = range(len(source.names))
    if source.read is None:
        for first in numbers[::TOGETHER]:
            yield partial(_examine_files, source, numbers[first : first + TOGETHER])
        return
    # a thread an archive reads it from its beginning to its end; a row group of a table, decoded, is for all threads
    at_once = len(numbers) < THREADS or source.read is tables.read_table
    for number in numbers:
        members = _members(source, number)
        while at_once and (some := list(itertools.islice(members, TOGETHER))):
            yield partial(_examine_members, source, number, some, stop)
        if not at_once:
            yield partial(_examine_members, source, number, members, stop)


def _members(source: Source, number: int) -> Iterator[Member | Reason]:
    assert source.read
    try:
        yield from source.read(Path(os.fsdecode(source.path(number))))
    except OSError as err:
        yield "", f"unreadable: {err.strerror or err}"


def _examine_files(source: Source, numbers: range) -> Part:
    part = Part(done=len(numbers))
    for number in numbers:
        name = source.names[number]
        try:
            with open(source.path(number), "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("not a regular file")
                member = Member(name, 0, status.st_size, PLAIN, source.label_of(number))
                part.rows.add(number, member, _look(file, status.st_size, file.fileno(), member))
        except BadImage as err:
            part.skipped.append((os.fsdecode(name), str(err)))
        except OSError as err:
            part.skipped.append((os.fsdecode(name), f"unreadable: {err.strerror or err}"))
    return part


def _open_at_once(path: str, flags: int) -> int:
    # else to open a named pipe would wait for ever
    return os.open(path, flags | os.O_NONBLOCK)


def _examine_members(source: Source, number: int, members: Iterable[Member | Reason], stop: threading.Event) -> Part:
    part, path, file_name = Part(), Path(os.fsdecode(source.path(number))), os.fsdecode(source.names[number])
    try:
        with path.open("rb", buffering=0) as file:
            for member in members:
                if stop.is_set():
                    break
                if not isinstance(member, Member):
                    part.skipped.append((f"{file_name}: {member[0]}" if member[0] else file_name, member[1]))
                    continue
                part.done += member.size
                try:
                    part.rows.add(number, member, _look_at_member(file, path, member))
                except BadImage as err:
                    part.skipped.append((f"{file_name}: {os.fsdecode(member.name)}", str(err)))
    except OSError as err:
        part.skipped.append((file_name, f"unreadable: {err.strerror or err}"))
    return part


def _look_at_member(file: io.FileIO, path: Path, member: Member) -> Look:
    """What is seen of an image inside a file."""
    if member.packed == TABLE:
        data = tables.read_row(path, member.offset)
        sample = content_sample(lambda start, length: data[start : start + length], len(data))
        return Look(*_examine(io.BytesIO(data), len(data)), sample)
    if member.packed == PLAIN:
        return _look(
            io.BufferedReader(Window(file.fileno(), member.offset, member.size)), member.size, file.fileno(), member
        )
    inflated = Inflated(file.fileno(), member.offset, member.size)
    # most images fit into the buffer, and are inflated once to be counted and once to be looked at
    return _look(io.BufferedReader(inflated, INFLATED_BUFFER), inflated.length(), file.fileno(), member)


def _look(image: BinaryIO, num_bytes: int, descriptor: int, member: Member) -> Look:
    """What is seen of an image of so many bytes that is kept in an open file."""
    size = _examine(image, num_bytes)
    # of the bytes as they are kept
    sample = content_sample(
        lambda start, length: os.pread(descriptor, min(length, member.size - start), member.offset + start), member.size
    )
    return Look(*size, sample)


def _examine(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Upright height and width of an image file, least and largest value; `BadImage` when it cannot be used."""
    if not size:
        raise BadImage("empty file")
    if size > MAX_BYTES:
        raise BadImage(f"too large: {size} bytes, at most {MAX_BYTES}")
    try:
        height, width = read_header(file)
        most = most_bytes(height, width)
        if size > most:
            raise TooLarge(f"too large: {size} bytes for {width} x {height} pixels, at most {most}")
        if not _has_end(file, size):
            # cut short, or with much appended: only decoding can tell
            file.seek(0)
            check(file.read(), (height, width))
        return height, width, *read_range(file)
    except TooLarge:
        raise
    except BadImage as err:
        raise (err if _has_end(file, size) else BadImage(f"truncated: {err}")) from None


class TooLarge(BadImage):
    """Its end is not even looked for."""


def _has_end(file: BinaryIO, size: int) -> bool:
    file.seek(0)
    start = file.read(4)
    return any(check_end(start, _tail(file, size, num_bytes)) for num_bytes in TAIL_BYTES)


def _tail(file: BinaryIO, size: int, num_bytes: int) -> bytes:
    file.seek(max(0, size - num_bytes))
    return file.read()


class Progress:
    """How far a scan is: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, source: Source, wanted: bool) -> None:
        # of archives nobody knows how many images they hold, but how long they are
        self.total = sum(source.sizes) if source.read else len(source.names)
        self.wanted, self.done, self.images, self.skipped = wanted, 0, 0, 0
        self.said = time.monotonic()
        self.bar = tqdm(
            desc="reading headers",
            total=self.total,
            unit="B" if source.read else " files",
            unit_scale=source.read is not None,
            dynamic_ncols=True,
            disable=not (wanted and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, part: Part) -> None:
        self.done, self.images = self.done + part.done, self.images + len(part.rows)
        self.skipped += len(part.skipped)
        self.bar.set_postfix(images=self.images, skipped=self.skipped, refresh=False)
        self.bar.update(part.done)
        if self.wanted and self.bar.disable and time.monotonic() - self.said > SAY_EVERY_S:
            self.said = time.monotonic()
            share = 100 * self.done / max(1, self.total)
            print(f"reading headers: {share:.0f} %, {self.images} images, {self.skipped} skipped", file=sys.stderr)
