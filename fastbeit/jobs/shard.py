"""Copy a data set into tar shards of small JPEGs, which read and decode faster: once, for many trainings.

    shards/shard-000000.tar   the images under their names in the source; beside one with a class, NAME.json: its label
    shards/shards.json        `Shards`: what they were made of, and what is in each that is finished
    shards/bad_images.txt     what could not be decoded, and why; not there when all is good
    shards/skipped_files.txt  what is no image, where the source was no index

A shard is written aside and renamed when it is whole, then `shards.json` is. Where each shard begins follows from the
images before it, so that a job that was stopped makes the same shards as one that was not.
"""

import contextlib
import io
import json
import os
import shlex
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from torch.utils.data import Dataset

from fastbeit.config.sections import Levels, Section
from fastbeit.data.index.archives import IMAGE_SUFFIXES, key_of
from fastbeit.data.index.reader import Index, is_index, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.index.summary import write_skipped
from fastbeit.data.progress import Progress
from fastbeit.data.shrink import Shrunk, shrink
from fastbeit.data.workers import load_items
from fastbeit.errors import (
    CANNOT_WRITE,
    DATA_MISSING,
    DONE,
    PREEMPTED,
    USAGE,
    BadImage,
    DataError,
    RunError,
    WorkerError,
    writing,
)
from fastbeit.files import aside, put_in_place, write_whole
from fastbeit.plural import counted
from fastbeit.train.rundir import hold
from fastbeit.train.stop import Stop, StopWanted

FORMAT = "fastbeit-shards-1"
CARD, BAD, SKIPPED, SCANNED = "shards.json", "bad_images.txt", "skipped_files.txt", ".source.idx"
TOGETHER, TOGETHER_AT_MOST = 16, 256  # images that a process answers with


class Settings(Section):
    """What decides what is in the shards."""

    source: str
    max_side: int
    quality: int
    shard_mb: int
    levels: Levels = "high_byte"  # of 16-bit images, as `data.levels`


class Shard(Section):
    """A finished shard."""

    name: str  # empty: none of its rows is valid, and there is no file
    stop: int  # the row of the source's index after its last
    num_bytes: int  # of the file
    images: int
    copied: int
    bytes_before: int
    bytes_after: int
    pixels_before: int
    pixels_after: int
    bad: list[tuple[str, str]]  # name and reason


class Shards(Section):
    """What `shards.json` holds."""

    format: str
    settings: Settings
    index: str  # fingerprint of the source's
    num_images: int  # of it, good and bad
    shards: list[Shard] = []

    @property
    def done(self) -> int:
        """Rows that are in finished shards."""
        return self.shards[-1].stop if self.shards else 0

    def total(self, name: str) -> int:
        return sum(getattr(shard, name) for shard in self.shards)

    def bad(self) -> list[tuple[str, str]]:
        return [one for shard in self.shards for one in shard.bad]


def shard(source: Path, out: Path, settings: Settings, num_workers: int, command: list[str]) -> int:
    """Write the shards of a source, or go on where a job stopped.

    Args:
        source: what `build_index` takes, or an index.
        command: what the user typed, said again where the job stops early.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: `out` holds something else (2), or cannot be written (73, 74); the source cannot be used (66), or an
            image brought its decoder down.
    """
    with hold(out, "-o"):
        card = _read_card(out, settings)
        if card and card.done == card.num_images:
            print(f"{_summary(out, card)} (were finished before)")
            return DONE
        index = _index_of(source, out, settings.levels)
        begun = card or Shards(format=FORMAT, settings=settings, index=index.fingerprint, num_images=len(index))
        if begun.index != index.fingerprint:
            raise RunError(f"'{source}' is not what '{out}' was begun with: other images; choose another -o", USAGE)
        try:
            # before the first shard, so that a kill at any moment leaves a directory that is known as ours
            card = card or _save(out, begun)
            with Stop() as stop:
                card = _make(index, out, card, num_workers, stop)
            if card.done < card.num_images:
                how_far = f"{card.done:,} of {card.num_images:,} images are in finished shards"
                print(f"stopped, saved: {how_far}; to go on: {shlex.join(command)}", file=sys.stderr)
                return PREEMPTED
            _finish(out, card)
        except OSError as err:
            raise RunError(f"shards cannot be written to '{out}': {err.strerror or err}", CANNOT_WRITE) from err
    print(_summary(out, card))
    return DONE


def _read_card(out: Path, settings: Settings) -> Shards | None:
    path = out / CARD
    if not path.exists():
        ours = {".lock", SKIPPED, SCANNED, aside(out / SCANNED).name}
        others = [one.name for one in out.iterdir() if one.name not in ours and one.suffix != ".part"]
        if others:
            raise RunError(f"-o '{out}' is not empty and holds no shards, but {others[0]}; choose another", USAGE)
        return None
    try:
        text = path.read_bytes()
        found = json.loads(text).get("format")
        if found != FORMAT:
            raise RunError(f"'{path}' has format {found}, wanted {FORMAT}; choose another -o", USAGE)
        card = Shards.model_validate_json(text)
    except (ValidationError, ValueError, AttributeError, RecursionError) as err:
        raise RunError(f"'{path}' is damaged ({str(err).splitlines()[0]}); delete the directory", USAGE) from None
    there, here = card.settings.model_dump(), settings.model_dump()
    changes = [f"{name} was {there[name]}, now {value}" for name, value in here.items() if there[name] != value]
    if changes:
        raise RunError(f"-o '{out}' holds other shards: {'; '.join(changes)}. Choose another -o", USAGE)
    for one in card.shards:
        if one.name and (not (out / one.name).exists() or (out / one.name).stat().st_size != one.num_bytes):
            raise RunError(f"'{out / one.name}' is gone or has changed; delete the directory and begin again", USAGE)
    return card


def _index_of(source: Path, out: Path, levels: Levels) -> Index:
    """Made once: what came to the source since the job began is not looked for."""
    if is_index(source):
        return open_index(source, levels)
    if (out / SCANNED).exists():
        return open_index(out / SCANNED, levels)
    summary = build_index(source, out / SCANNED)
    print(summary)
    try:
        index = open_index(out / SCANNED, levels)
    except RunError:
        # a start that is refused leaves nothing
        (out / SCANNED).unlink()
        raise
    with writing(f"'{out / SKIPPED}'"):
        write_skipped(out / SKIPPED, summary.skipped)
    return index


def _make(index: Index, out: Path, card: Shards, num_workers: int, stop: Stop) -> Shards:
    """The shards that are missing, but for what a stop leaves undone."""
    settings, first = card.settings, card.done
    together = min(max(index.block_rows, TOGETHER), TOGETHER_AT_MOST)
    parts = [range(start, min(start + together, len(index))) for start in range(first, len(index), together)]
    answers = load_items(Shrinks(index, settings), parts, num_workers)
    with contextlib.closing(answers), Progress("encoding", len(index), first) as progress:
        writing = Writing(out, index, len(card.shards))
        try:
            for part in parts:
                try:
                    with stop.interrupts():
                        made = _next(answers, index, part)
                except StopWanted:
                    return card
                for one in made:
                    if writing.is_full(one, settings.shard_mb * 1_000_000):
                        card = _save(out, card, writing.finish())
                        writing = Writing(out, index, len(card.shards))
                    writing.add(one)
                progress.advance(len(made), sum(one.shrunk is None for one in made))
            return _save(out, card, writing.finish())
        finally:
            writing.drop()


def _next(answers: Iterator[list["Answer"]], index: Index, part: range) -> list["Answer"]:
    try:
        return next(answers)
    except WorkerError as err:
        raise RunError(f"{err}; or one of the images from '{index.name(part[0])}' on brought it down") from None


@dataclass(frozen=True)
class Answer:
    """What became of an image."""

    row: int  # of the source's index
    num_bytes: int  # of the source's file
    shrunk: Shrunk | None  # None: it is bad
    reason: str = ""


class Shrinks(Dataset):
    """What becomes of a range of rows."""

    def __init__(self, index: Index, settings: Settings) -> None:
        self.index, self.settings = index, settings

    def __getitem__(self, rows: range) -> list[Answer]:
        return [self._answer(row) for row in rows]

    def _answer(self, row: int) -> Answer:
        index, settings = self.index, self.settings
        size = int(index.heights[row]), int(index.widths[row])
        try:
            data = index.read_bytes(row)
            return Answer(row, len(data), shrink(data, size, settings.max_side, settings.quality, settings.levels))
        except BadImage as err:
            return Answer(row, 0, None, str(err))


@dataclass
class Writing:
    """A shard that is being written: absent until `finish`."""

    out: Path
    index: Index
    number: int
    tar: tarfile.TarFile | None = None
    keys: set[bytes] = field(default_factory=set)
    names: set[bytes] = field(default_factory=set)
    last: tuple[bytes, int] | None = None  # key and label of the last image
    answers: list[Answer] = field(default_factory=list)  # without data

    @property
    def path(self) -> Path:
        return self.out / f"shard-{self.number:06}.tar"

    def is_full(self, more: Answer, max_bytes: int) -> bool:
        return bool(self.tar and more.shrunk and self.tar.offset + len(more.shrunk.data) > max_bytes)

    def add(self, one: Answer) -> None:
        if one.shrunk:
            self._write(one.row, one.shrunk)
            one = Answer(one.row, one.num_bytes, Shrunk(b"", one.shrunk.size, one.shrunk.is_copy))
        self.answers.append(one)

    def _write(self, row: int, shrunk: Shrunk) -> None:
        if not self.tar:
            # of the formats of names that are no UTF-8 or long the one that all tools read
            self.tar = tarfile.open(aside(self.path), "w", format=tarfile.GNU_FORMAT, errors="surrogateescape")
        name, label = member_name(self.index, row), int(self.index.labels[row])
        key = key_of(name)
        # images of one key are one sample, with one label
        goes_on = self.last == (key, label) and name not in self.names
        while key in self.keys and not goes_on:
            name = b"%d/" % row + name
            key = key_of(name)
        self.keys.add(key)
        self.names.add(name)
        self.last = key, label
        self._put(name, shrunk.data)
        if label >= 0 and not goes_on:
            self._put(key + b".json", json.dumps({"label": label_name(self.index, label)}).encode())

    def _put(self, name: bytes, data: bytes) -> None:
        assert self.tar
        info = tarfile.TarInfo(os.fsdecode(name))
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def finish(self) -> Shard:
        if self.tar:
            self.tar.close()
            put_in_place(self.path)
        index, good = self.index, [one for one in self.answers if one.shrunk]
        found = Shard(
            name=self.path.name if self.tar else "",
            stop=self.answers[-1].row + 1,
            num_bytes=self.path.stat().st_size if self.tar else 0,
            images=len(good),
            copied=sum(one.shrunk.is_copy for one in good if one.shrunk),
            bytes_before=sum(one.num_bytes for one in good),
            bytes_after=self.path.stat().st_size if self.tar else 0,
            pixels_before=sum(int(index.heights[one.row]) * int(index.widths[one.row]) for one in good),
            pixels_after=sum(one.shrunk.size[0] * one.shrunk.size[1] for one in good if one.shrunk),
            bad=[(index.name(one.row), one.reason) for one in self.answers if not one.shrunk],
        )
        self.tar = None
        return found

    def drop(self) -> None:
        """Leave nothing of what is not finished."""
        if self.tar:
            self.tar.close()
            aside(self.path).unlink(missing_ok=True)


def member_name(index: Index, row: int) -> bytes:
    """The name of an image in its source, as one that a tar may hold; what names no image gets a `.jpg`."""
    *folders, last = [part for part in index.inner_name(row).split(b"/") if part not in (b"", b".", b"..")]
    # names that begin with a dot are passed over
    name = b"/".join([*folders, last.lstrip(b".") or b"image"])
    return name if name.lower().endswith(IMAGE_SUFFIXES) else name + b".jpg"


def label_name(index: Index, label: int) -> str | int:
    """What a class is written as, so that an index of the shards has the same classes."""
    names = index.class_names
    are_numbers = names == [str(number) for number in range(len(names))]
    return label if are_numbers else names[label]


def _save(out: Path, card: Shards, *made: Shard) -> Shards:
    card = card.model_copy(update={"shards": [*card.shards, *made]})
    write_whole(out / CARD, card.model_dump_json(indent=1) + "\n")
    return card


def _finish(out: Path, card: Shards) -> None:
    bad = card.bad()
    if len(bad) == card.num_images:
        raise DataError(f"none of the {len(bad)} images is valid, such as {bad[0][0]}: {bad[0][1]}", DATA_MISSING)
    if bad:
        write_skipped(out / BAD, bad)
    (out / SCANNED).unlink(missing_ok=True)


def _summary(out: Path, card: Shards) -> str:
    """What was saved."""
    images, copied, num_bad = card.total("images"), card.total("copied"), len(card.bad())
    bytes_before, bytes_after = (card.total(f"bytes_{when}") / 1e6 for when in ("before", "after"))
    pixels_before, pixels_after = (card.total(f"pixels_{when}") / 1e6 for when in ("before", "after"))
    num_shards = sum(bool(one.name) for one in card.shards)
    return (
        f"{counted(images, 'image')} in {counted(num_shards, 'shard')} in '{out}', {copied:,} of them copied as "
        f"they were: {bytes_before:,.1f} MB became {bytes_after:,.1f}, {pixels_before:,.1f} megapixels became "
        f"{pixels_after:,.1f}" + (f"; {num_bad:,} bad images are left out, listed in '{out / BAD}'" if num_bad else "")
    )
