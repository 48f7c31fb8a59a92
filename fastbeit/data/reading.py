"""Carries a plan out: reads the images of a step, and in place of a bad one the next valid one.

Nothing here changes a plan. `map` is Python's own, or that of an executor, which begins with all images at once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.data.batch import Batch
from fastbeit.data.plans import Drawn, Plans
from fastbeit.data.views import PLAN
from fastbeit.errors import DATA_LIMIT, DATA_MISSING, BadImage, DataError

Bad = list[tuple[int, str]]  # rows of the index, each with its path and what is wrong
Map = Callable[[Callable[[int], Any], range], Iterator[Any]]


class Found(NamedTuple):
    """A valid image, and the bad ones that were met on the way to it."""

    sample: int  # row of the index
    plan: np.void  # its own record of PLAN
    made: Any
    bad: Bad


class Attempt(NamedTuple):
    """An image that nothing takes the place of."""

    place: int  # in the rows that were asked for
    made: Any  # None where it is bad
    bad: Bad


def bad_limit(num_images: int) -> int:
    """How many images of a data set may be bad before a run stops."""
    return max(100, num_images // 100)


def read_step(
    plans: Plans, drawn: Drawn, make: Callable[[int, bytes, Size, np.void], Any], map: Map = map
) -> Iterator[Found]:
    """What `make` makes of each image of a step: of its row, bytes, size and record of PLAN; it raises `BadImage`.

    Raises:
        DataError: while iterating: the folder is gone, no image is valid, or more are bad in a row than a run may have.
    """
    samples, epochs = drawn.sample.tolist(), drawn.epoch.tolist()
    return map(lambda row: _find(plans, samples[row], epochs[row], drawn.plans[row], make), range(len(samples)))


def _find(plans: Plans, wanted: int, epoch: int, plan: np.void, make: Callable) -> Found:
    """The first valid image from `wanted` on; one that takes another's place is augmented as itself."""
    bad, num_images = [], len(plans.index)
    for tried in range(num_images):
        i = (wanted + tried) % num_images
        if tried:
            plan = plans.augment(np.array([i]), np.array([epoch]))[0]
        try:
            return Found(i, plan, _make(plans, i, plan, make), bad)
        except BadImage as err:
            bad.append((i, f"{plans.index.name(i)}: {err}"))
        if tried >= bad_limit(num_images):
            raise DataError(f"{tried + 1} bad images in a row, the last {bad[-1][1]}", DATA_LIMIT)
    raise DataError(f"none of the {num_images} images is valid, such as {bad[-1][1]}", DATA_MISSING)


def read_rows(
    plans: Plans, rows: range, make: Callable[[int, bytes, Size, np.ndarray], Any], map: Map = map
) -> Iterator[Attempt]:
    """What `make` makes of each of some rows of the index, given all K of its plans."""
    augmented = plans.augment_crops(rows)

    def attempt(place: int) -> Attempt:
        i = rows[place]
        try:
            return Attempt(place, _make(plans, i, augmented[place], make), [])
        except BadImage as err:
            return Attempt(place, None, [(i, f"{plans.index.name(i)}: {err}")])

    return map(attempt, range(len(rows)))


def _make(plans: Plans, i: int, plan: Any, make: Callable) -> Any:
    index = plans.index
    return make(i, index.read_bytes(i), (int(index.heights[i]), int(index.widths[i])), plan)


def plans_of(found: Sequence[Found]) -> np.ndarray:
    """[n] records of PLAN."""
    return np.array([one.plan for one in found], PLAN)


def batch_of(drawn: Drawn, found: Sequence[Found], images: Tensor, token_images: Tensor | None) -> Batch:
    """The batch of a step: views, and the images that they show."""
    sample = torch.tensor([one.sample for one in found], dtype=torch.int64)
    bad = [each for one in found for each in one.bad]
    return Batch(images, token_images, sample, torch.from_numpy(drawn.epoch), bad)
