"""One look at every image of a source, and the index of those that can be used.

Only both ends of an image are read: one that is damaged in its middle is found when it is first used, or by `fastbeit
index check`. While 10 M images of 30-letter names are scanned, 1.3 GB of memory are in use: their columns, as they will
be written, and the names of the files that the source lists. An archive wants 100 bytes more for each image in it while
it is read, to tell duplicates.
"""

import io
import itertools
import os
import stat
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from fastbeit.data.decode import TAIL_BYTES, check, check_end, read_header
from fastbeit.data.index import tables
from fastbeit.data.index.members import MAX_BYTES, PLAIN, TABLE, Member, Reason, Window, inflate
from fastbeit.data.index.sources import Source, open_source
from fastbeit.data.index.writer import Rows, write_index
from fastbeit.errors import CANNOT_CREATE, BadImage, DataError, RunError
from fastbeit.files import aside
from fastbeit.plural import counted

THREADS = 16  # headers are read one small piece a file: the storage's latency is what is waited for
TOGETHER = 16  # images that a thread takes at a time
SAY_EVERY_S = 10
SHOWN = 20  # skipped files that are printed


@dataclass(frozen=True)
class Summary:
    """What `build_index` found."""

    num_images: int
    num_classes: int
    skipped: list[Reason]  # path relative to the source, and why

    def __str__(self) -> str:
        found = counted(self.num_images, "image") + f" in {counted(self.num_classes, 'class')}" * bool(self.num_classes)
        kinds = Counter(reason.partition(":")[0] for _, reason in self.skipped).most_common()
        counts = "".join(f"\n  {number} x {kind}" for kind, number in kinds) if len(kinds) > 1 else ""
        listed = [f"  {path!r}: {reason}" for path, reason in self.skipped[:SHOWN]]
        more = [f"  and {len(self.skipped) - SHOWN} more"] if len(self.skipped) > SHOWN else []
        return "\n".join(
            [f"{found}, {counted(len(self.skipped), 'file')} skipped" + ":" * bool(listed) + counts, *listed, *more]
        )


@dataclass
class Part:
    """What one thread found in one go."""

    rows: Rows = field(default_factory=Rows)
    skipped: list[Reason] = field(default_factory=list)
    done: int = 0  # files, or bytes of a file of several images


def build_index(source: Path, output: Path, progress: bool = True) -> Summary:
    """List the images of a source, which `sources` describes, in the order of their paths, and write them to `output`.

    The class of an image is what is written of it: in a text list, in a table, in a `.cls` or `.json` beside it. Where
    nothing is written of any, it is the first folder of its path; images beside those folders have label -1.

    Raises:
        DataError: `source` is nothing that is read, or holds no image.
        RunError: the index cannot be written.
    """
    opened = open_source(source)
    rows, skipped = Rows(), opened.skipped
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # not to find out after hours
        aside(output).touch()
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
        with _writing(output):
            num_classes = write_index(rows, opened, len(skipped), output)
    finally:
        aside(output).unlink(missing_ok=True)
    return Summary(len(rows), num_classes, skipped)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise RunError(f"'{output}' cannot be written: {err.strerror or err}", CANNOT_CREATE) from None


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
                part.rows.add(number, member, _examine(file, status.st_size))
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
                    part.rows.add(number, member, _examine(*_open_member(file, path, member)))
                except BadImage as err:
                    part.skipped.append((f"{file_name}: {os.fsdecode(member.name)}", str(err)))
    except OSError as err:
        part.skipped.append((file_name, f"unreadable: {err.strerror or err}"))
    return part


def _open_member(file: io.FileIO, path: Path, member: Member) -> tuple[BinaryIO, int]:
    """An image inside a file, as a file, and its length."""
    if member.packed == PLAIN:
        window = Window(file.fileno(), member.offset, member.size)
        return io.BufferedReader(window), member.size
    if member.packed == TABLE:
        data = tables.read_row(path, member.offset)
    else:
        data = inflate(os.pread(file.fileno(), member.size, member.offset))
    return io.BytesIO(data), len(data)


def _examine(file: BinaryIO, size: int) -> tuple[int, int]:
    """Upright height and width of an image file; `BadImage` when it cannot be used."""
    if not size:
        raise BadImage("empty file")
    if size > MAX_BYTES:
        raise BadImage(f"too large: {size} bytes, at most {MAX_BYTES}")
    start = file.read(4)
    has_end = any(check_end(start, _tail(file, size, num_bytes)) for num_bytes in TAIL_BYTES)
    file.seek(0)
    try:
        height, width = read_header(file)
        if not has_end:
            # cut short, or with much appended: only decoding can tell
            file.seek(0)
            check(file.read(), (height, width))
    except BadImage as err:
        raise (err if has_end else BadImage(f"truncated: {err}")) from None
    return height, width


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
