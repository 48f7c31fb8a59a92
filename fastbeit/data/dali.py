"""The same batches by NVIDIA DALI, and what is done when it fails.

Threads read and check a batch while DALI works on the one before and the run trains on the one before that. An image
that `fastbeit index check` has passed is decoded once, by DALI; any other is scanned before. When DALI fails at a
batch, all of its images are read and scanned again: those that are bad now are replaced as ever. What DALI does not
take although it is valid is decoded here, on a CPU to the same pixels. DALI's pipeline is built again, and the run goes
on with the images that it would have had.
"""

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.sections import Levels, Size
from fastbeit.data.batch import Batch, TokenViews
from fastbeit.data.dali_graph import DaliError, Given, Views
from fastbeit.data.decode import Checked, check, check_ends, unpack
from fastbeit.data.index.checked import read_checked
from fastbeit.data.index.reader import Index
from fastbeit.data.plans import Drawn, Plans
from fastbeit.data.reading import Attempt, Bad, Found, Map, batch_of, plans_of, read_rows, read_step
from fastbeit.data.to_device import one_ahead
from fastbeit.data.views import Rule
from fastbeit.errors import RunError

Check = Callable[[int, bytes, Size, Any], Checked]


@dataclass(frozen=True)
class Work:
    """Batches of one kind: how the images of a job are read, and what of them DALI is given."""

    read: Callable[[Any, Check, Map], Iterator[Any]]
    given: Callable[[Any, list[Any]], Given]


def dali_batches(plans: Plans, rule: Rule, steps: range) -> Generator[Batch, None, None]:
    """Batches as `make_loader` gives them; images lie on the GPU when there is one."""

    def read(drawn: Drawn, check: Check, map: Map) -> Iterator[Found]:
        return read_step(plans, drawn, check, map)

    def given(drawn: Drawn, found: list[Found]) -> Given:
        return Given([one.sample for one in found], [one.made for one in found], plans_of(found))

    work, batch_size = Work(read, given), plans.batch_size // plans.world_size
    for drawn, found, (images, *token_images) in _carry_out(plans, rule, batch_size, map(plans.draw, steps), work):
        yield batch_of(drawn, found, images, *(token_images or [None]))


def dali_token_views(
    plans: Plans, rule: Rule, items: Iterable[range], together: int
) -> Generator[TokenViews, None, None]:
    """Token views as `make_token_loader` gives them; images lie on the GPU when there is one."""
    num_crops, ((token_size, _),) = plans.data.num_crops, rule.views()

    def read(rows: range, check: Check, map: Map) -> Iterator[Attempt]:
        return read_rows(plans, rows, check, map)

    def given(rows: range, attempts: list[Attempt]) -> Given:
        good = [one for one in attempts if not one.bad for _ in range(num_crops)]
        places = [one.place for one in attempts if not one.bad]
        return Given([rows[one.place] for one in good], [one.made for one in good], _crops(plans, rows, places))

    for rows, attempts, views in _carry_out(plans, rule, together * num_crops, items, Work(read, given)):
        good = [one.place for one in attempts if not one.bad]
        images = torch.zeros(len(rows), num_crops, *token_size, 3, dtype=torch.uint8)
        if views:
            images = images.to(views[0].device)
            images[good] = views[0].unflatten(0, (len(good), num_crops))
        yield TokenViews(rows, images, _bad_of(attempts))


def _crops(plans: Plans, rows: range, places: list[int]) -> np.ndarray:
    return plans.augment_crops(rows)[places].reshape(-1)


def _bad_of(read: Iterable[Found | Attempt]) -> Bad:
    return [each for one in read for each in one.bad]


class Checks:
    """What is made sure of an image before DALI sees it."""

    def __init__(self, index: Index, levels: Levels) -> None:
        self._mean_grey = read_checked(index)
        self._levels: Levels = levels
        self.refused: set[int] = set()  # rows of valid images that DALI does not take

    def quick(self, row: int, data: bytes, size: Size, plan: Any) -> Checked:
        """As little as is safe: header and end of an image that was checked before.

        Of one that was not, all of it, although a failure of DALI's would be survived: it makes wrong pixels of most
        damaged JPEGs and says nothing, and contrast wants the mean grey of the whole image anyway.
        """
        grey = math.nan if self._mean_grey is None else float(self._mean_grey[row])
        if math.isnan(grey) or row in self.refused:
            return self.full(row, data, size, plan)
        return check_ends(data, size, grey, self._levels)

    def full(self, row: int, data: bytes, size: Size, plan: Any) -> Checked:
        checked = check(data, size, self._levels)
        return unpack(checked, size) if row in self.refused else checked


def _carry_out(
    plans: Plans, rule: Rule, batch_size: int, jobs: Iterable[Any], work: Work
) -> Iterator[tuple[Any, list[Any], list[Tensor]]]:
    """Each job, what was read for it, and its views."""
    checks = Checks(plans.index, rule.levels)
    with _threads(plans) as threads:
        views = Views(plans, rule, batch_size)
        loads = ((job, work.read(job, checks.quick, threads.map)) for job in jobs)

        def begun() -> Iterator[tuple[Any, list[Any]]]:
            for job, reading in one_ahead(loads):
                read = list(reading)
                views.begin(work.given(job, read))
                yield job, read

        for job, read in one_ahead(begun()):
            try:
                made = views.end()
            except DaliError as err:
                try:
                    read, made = _recover(plans.index, views, checks, work, job, read, threads.map, err)
                except DaliError as again:
                    raise RunError(
                        f"DALI gave up on images that had been checked; take data.pipeline=torch: {again}"
                    ) from err
            yield job, read, made


def _recover(
    index: Index, views: Views, checks: Checks, work: Work, job: Any, before: list[Any], map: Map, err: DaliError
) -> tuple[list[Any], list[Tensor]]:
    """What was read for a job at which DALI failed, and its views.

    Raises:
        DaliError: DALI fails again, and not because of single images.
    """
    # the failed one, and perhaps the next
    _, *waiting = views.restart()
    read = list(work.read(job, checks.full, map))
    found = [reason for _, reason in _bad_of(read) if reason not in {known for _, known in _bad_of(before)}]
    told = f"DALI failed ({err}); " + (f"bad: {'; '.join(found)}" if found else "every file of this batch is valid")
    try:
        made = views.make(work.given(job, read))
    except DaliError:
        refused = _refused(views, work.given(job, read))
        checks.refused |= refused
        views.restart()
        read = list(work.read(job, checks.full, map))
        made = views.make(work.given(job, read))
        told += "; from now on decoded without it: " + ", ".join(index.name(row) for row in sorted(refused))
    print(f"{told}; its pipeline was built again", file=sys.stderr, flush=True)
    for given in waiting:
        views.begin(given)
    return read, made


def _refused(views: Views, given: Given) -> set[int]:
    """The rows that DALI does not take, each tried alone."""
    refused = set()
    for place, row in enumerate(given.rows):
        views.restart()
        one = slice(place, place + 1)
        try:
            views.make(Given(given.rows[one], given.checked[one], given.plans[one]))
        except DaliError:
            refused.add(row)
    return refused


@contextmanager
def _threads(plans: Plans) -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(max(1, plans.data.num_workers), "check")
    try:
        yield threads
    finally:
        # not waited for: one of them may read from a disk that does not answer
        threads.shutdown(wait=False, cancel_futures=True)
