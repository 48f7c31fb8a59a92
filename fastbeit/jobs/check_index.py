"""Decode every image of an index, list those that cannot be used, and remember those that can."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from fastbeit.config.sections import DataConfig
from fastbeit.data.decode import check
from fastbeit.data.index.checked import checked_path, write_checked
from fastbeit.data.index.given import indexed_for_now
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.progress import Progress
from fastbeit.data.workers import load_items
from fastbeit.errors import CANNOT_CREATE, DATA_LIMIT, DONE, BadImage, RunError, WorkerError, writing
from fastbeit.files import aside, put_in_place
from fastbeit.plural import counted
from fastbeit.train.stop import Stop, StopWanted

TOGETHER, TOGETHER_AT_MOST = 32, 256  # images a process decodes before it answers: tenths of a second, or seconds


def check_index(source: Path, num_workers: int) -> int:
    """Decode all images of an index, as for DALI: JPEGs at 1/8 of their size, which finds the same damage.

    The bad ones go, with their reasons, to a file beside it, `images.idx.bad`; what need not be checked again goes to
    `images.idx.checked`. Of a source that is no index nothing is kept: the bad ones are printed.

    Returns:
        The exit code: done when all are good, else that of bad data.

    Raises:
        DataError: there is no index or source, it is damaged, or what it was made of is gone (66).
        RunError: either cannot be written (73), or a file brought its decoder down.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; what an earlier check found then stays.
    """
    with indexed_for_now(DataConfig().model_copy(update={"index": str(source)})) as data:
        index = open_index(Path(data.index))
        index.check_whole()
        if index.location != source:
            return _print_bad(index, num_workers)
        print("the index is the one that was written (sha256)", flush=True)
        return _list_bad(index, num_workers)


def _print_bad(index: Index, num_workers: int) -> int:
    began, num_bad = time.perf_counter(), 0
    for _, found in _look_at_all(index, num_workers):
        for i, reason in found.bad:
            print(f"{index.name(i)!r}: {reason}", flush=True)
        num_bad += len(found.bad)
    return _verdict(index, began, num_bad, "repair or remove them")


def _list_bad(index: Index, num_workers: int) -> int:
    path, began, num_bad = index.location, time.perf_counter(), 0
    listed = path.with_name(path.name + ".bad")
    mean_grey = np.full(len(index), np.nan)
    try:
        with writing(f"what was found, '{listed}',", exit_code=CANNOT_CREATE):
            with aside(listed).open("w", encoding="utf-8", errors="backslashreplace") as file:
                for part, found in _look_at_all(index, num_workers):
                    mean_grey[part.start : part.stop] = found.mean_grey
                    # repr, since a name may hold anything
                    file.writelines(f"{index.name(i)!r}: {reason}\n" for i, reason in found.bad)
                    num_bad += len(found.bad)
            write_checked(index, mean_grey)
            if num_bad:
                put_in_place(listed)
            else:
                listed.unlink(missing_ok=True)
    finally:
        for left in (listed, checked_path(path)):
            aside(left).unlink(missing_ok=True)
    return _verdict(index, began, num_bad, f"listed in '{listed}'; repair or remove them, and make the index again")


def _verdict(index: Index, began: float, num_bad: int, remedy: str) -> int:
    seconds = time.perf_counter() - began
    rate = f"{counted(len(index), 'image')} decoded in {seconds:.1f} s, {len(index) / seconds:.0f} img/s"
    print(f"{rate}: all are good" if not num_bad else f"{rate}: {num_bad:,} are bad, {remedy}")
    return DATA_LIMIT if num_bad else DONE


@dataclass(frozen=True)
class Findings:
    """Of some rows."""

    mean_grey: list[float]  # NaN: bad
    bad: list[tuple[int, str]]  # row and reason


def _look_at_all(index: Index, num_workers: int) -> Iterator[tuple[range, Findings]]:
    """What is found of all rows, in order; says on the way how far it is."""
    # a row group of a table is decoded whole, so it should go to one process
    together = min(max(index.block_rows, TOGETHER), TOGETHER_AT_MOST)
    parts = [range(first, min(first + together, len(index))) for first in range(0, len(index), together)]
    answers = load_items(Looks(index), parts, num_workers)
    with Stop() as stop, contextlib.closing(answers), Progress("decoding", len(index)) as progress:
        for part in parts:
            try:
                with stop.interrupts():
                    found = next(answers)
            except StopWanted:
                raise KeyboardInterrupt from None
            except WorkerError as err:
                raise RunError(f"{err}; or one of the images from '{index.name(part[0])}' on brought it down") from None
            yield part, found
            progress.advance(len(part), len(found.bad))


class Looks(Dataset):
    """What is found of a range of rows."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def __getitem__(self, rows: range) -> Findings:
        mean_grey, bad = [], []
        for i in rows:
            try:
                size = int(self.index.heights[i]), int(self.index.widths[i])
                mean_grey.append(check(self.index.read_bytes(i), size).mean_grey)
            except BadImage as err:
                mean_grey.append(math.nan)
                bad.append((i, str(err)))
        return Findings(mean_grey, bad)
