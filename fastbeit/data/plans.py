"""Which images make up a step and how each is augmented: a pure function of (seed, step) (design D1).

A step's batch is the same on any number of ranks and workers, and after a resume: who starts at step k gets what an
uninterrupted run gets from step k on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.sections import DataConfig, Size
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index
from fastbeit.data.sampling import draw_crops, draw_flips, draw_jitters, rows_at, view_of
from fastbeit.data.views import PLAN
from fastbeit.errors import DATA_LIMIT, DATA_MISSING, BadImage, ConfigError, DataError

T = TypeVar("T")


def steps_per_epoch(num_images: int, batch_size: int, tail: str) -> int:
    """Steps that make an epoch; with tail=wrap rounded up, since epochs flow into one another there.

    Raises:
        ConfigError: tail=drop would drop every image.
    """
    if tail == "wrap":
        return -(-num_images // batch_size)
    if num_images < batch_size:
        raise ConfigError(
            f"optim.batch_size {batch_size} is more than the {num_images} images of the index, and data.tail=drop "
            f"leaves out what fills no batch; set data.tail=wrap, or optim.batch_size to at most {num_images}"
        )
    return num_images // batch_size


def places_at(step: int, num_images: int, batch_size: int, tail: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs and the places in their orders that a step's global batch is made of, [batch_size] int64 each."""
    if tail == "wrap":
        return np.divmod(step * batch_size + np.arange(batch_size), num_images)
    epoch, step = divmod(step, steps_per_epoch(num_images, batch_size, tail))
    return np.full(batch_size, epoch), step * batch_size + np.arange(batch_size)


def bad_limit(num_images: int) -> int:
    """How many images of a data set may be bad before a run stops."""
    return max(100, num_images // 100)


@dataclass
class Drawn:
    """What one rank does in one step."""

    sample: np.ndarray  # [B] int64
    epoch: np.ndarray  # [B] int64
    plans: np.ndarray  # [B] records of PLAN
    bad: list[tuple[int, str]]

    def batch(self, images: Tensor, token_images: Tensor | None) -> Batch:
        return Batch(images, token_images, torch.from_numpy(self.sample), torch.from_numpy(self.epoch), self.bad)


@dataclass(frozen=True)
class Plans:
    """Which images and augmentations each step consists of.

    Raises:
        ConfigError: the images do not fill a batch, or the ranks do not divide it.
    """

    data: DataConfig
    index: Index
    batch_size: int
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        steps_per_epoch(len(self.index), self.batch_size, self.data.tail)
        if self.batch_size % self.world_size:
            raise ConfigError(f"optim.batch_size {self.batch_size} is not a multiple of the {self.world_size} ranks")

    def draw(self, step: int) -> Drawn:
        """The step's samples and augmentations, before any file is read."""
        epochs, places = places_at(step, len(self.index), self.batch_size, self.data.tail)
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        epochs, places = epochs[mine], places[mine]
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = rows_at(self.seed, int(epoch), places[chosen], len(self.index), self.index.block_rows)
        return Drawn(samples, epochs, self.augment(samples, epochs), [])

    def augment(self, sample: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """[n] records of PLAN for [n] samples."""
        data, index, view = self.data, self.index, view_of(epoch, self.data.num_crops)
        plans = np.zeros(len(sample), PLAN)
        plans["box"] = draw_crops(
            self.seed, view, sample, index.heights[sample], index.widths[sample], data.crop_scale, data.crop_ratio
        )
        plans["flip"] = draw_flips(self.seed, view, sample, data.flip)
        plans["order"], plans["factors"] = draw_jitters(self.seed, view, sample, data.jitter)
        return plans

    def augment_views(self, rows: range) -> np.ndarray:
        """[n, K] records of PLAN: all views of n images, K = data.num_crops; epochs e with e mod K = v draw view v."""
        num_views = self.data.num_crops
        views = np.tile(np.arange(num_views), len(rows))
        return self.augment(np.repeat(rows, num_views), views).reshape(len(rows), num_views)

    def load(
        self,
        drawn: Drawn,
        make: Callable[[bytes, Size, np.void], T],
        map: Callable[[Callable[[int], Any], range], Iterator[Any]] = map,
    ) -> Iterator[T]:
        """What `make` makes of each image: of its bytes, its size and its record of PLAN; it raises `BadImage`.

        In place of a bad one `drawn` gets the next valid one, with that one's own augmentation, before it is yielded.

        Args:
            map: `map`, or an executor's, which begins at once.

        Raises:
            DataError: the folder is gone, no image is valid, or more bad ones in a row than a run may have.
        """
        samples, epochs, plans = drawn.sample.tolist(), drawn.epoch.tolist(), drawn.plans
        found = map(lambda row: self._find(samples[row], epochs[row], plans[row], make), range(len(samples)))
        return self._take(drawn, found)

    def _take(self, drawn: Drawn, found: Iterator[Any]) -> Iterator[Any]:
        for row, (i, plan, made, bad) in enumerate(found):
            drawn.bad += bad
            drawn.sample[row], drawn.plans[row] = i, plan
            yield made

    def _find(self, wanted: int, epoch: int, plan: np.void, make: Callable) -> tuple[int, np.void, Any, list]:
        """The first valid image from `wanted` on: its row of the index, its plan, what was made of it; and the bad."""
        bad, num_images = [], len(self.index)
        for tried in range(num_images):
            i = (wanted + tried) % num_images
            if tried:
                plan = self.augment(np.array([i]), np.array([epoch]))[0]
            try:
                return i, plan, self._make(i, plan, make), bad
            except BadImage as err:
                bad.append((i, f"{self.index.name(i)}: {err}"))
            if tried >= bad_limit(num_images):
                raise DataError(f"{tried + 1} bad images in a row, the last {bad[-1][1]}", DATA_LIMIT)
        raise DataError(f"none of the {num_images} images is valid, such as {bad[-1][1]}", DATA_MISSING)

    def load_valid(
        self,
        rows: range,
        make: Callable[[bytes, Size, np.ndarray], T],
        bad: list[tuple[int, str]],
        map: Callable[[Callable[[int], Any], range], Iterator[Any]] = map,
    ) -> Iterator[tuple[int, T]]:
        """Place in `rows` of the valid images and what `make` makes of each and its K plans; others go to `bad`."""
        plans = self.augment_views(rows)

        def attempt(place: int) -> tuple[int, Any, list[tuple[int, str]]]:
            i = rows[place]
            try:
                return place, self._make(i, plans[place], make), []
            except BadImage as err:
                return place, None, [(i, f"{self.index.name(i)}: {err}")]

        return self._take_valid(map(attempt, range(len(rows))), bad)

    def _take_valid(self, found: Iterator[Any], bad: list[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
        for place, made, reasons in found:
            bad += reasons
            if not reasons:
                yield place, made

    def _make(self, i: int, plan: Any, make: Callable) -> Any:
        return make(self.index.read_bytes(i), (int(self.index.heights[i]), int(self.index.widths[i])), plan)
