"""Which images make up a step and how each is augmented: a pure function of (seed, step).

A step's batch is the same on any number of ranks and workers, and after a resume: who starts at step k gets what an
uninterrupted run gets from step k on.
"""

from dataclasses import dataclass

import numpy as np

from fastbeit.config.sections import DataConfig
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.reader import Index
from fastbeit.data.sampling import crop_of, draw_crops, draw_flips, draw_jitters, rows_at
from fastbeit.data.views import PLAN
from fastbeit.errors import ConfigError


def places_at(step: int, num_images: int, batch_size: int, tail: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs and the places in their orders that a step's global batch is made of, [batch_size] int64 each."""
    if tail == "wrap":
        return np.divmod(step * batch_size + np.arange(batch_size), num_images)
    epoch, step = divmod(step, steps_per_epoch(num_images, batch_size, tail))
    return np.full(batch_size, epoch), step * batch_size + np.arange(batch_size)


@dataclass(frozen=True)
class Drawn:
    """What one rank is to do in one step."""

    sample: np.ndarray  # [B] int64, rows of the index
    epoch: np.ndarray  # [B] int64
    plans: np.ndarray  # [B] records of PLAN


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
    repeats: int = 1  # copies of an image, each with an epoch number of its own, so that it is augmented anew

    def __post_init__(self) -> None:
        steps_per_epoch(len(self.index), self.batch_size, self.data.tail)
        if self.batch_size % self.world_size:
            raise ConfigError(f"optim.batch_size {self.batch_size} is not a multiple of the {self.world_size} ranks")

    def draw(self, step: int) -> Drawn:
        """The step's samples and augmentations, before any file is read."""
        epochs, places = places_at(step, len(self.index), self.batch_size, self.data.tail)
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        epochs, (places, copies) = epochs[mine], np.divmod(places[mine], self.repeats)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = rows_at(self.seed, int(epoch), places[chosen], len(self.index), self.index.block_rows)
        epochs = epochs * self.repeats + copies
        return Drawn(samples, epochs, self.augment(samples, epochs))

    def augment(self, sample: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """[n] records of PLAN for [n] samples."""
        data, index, view = self.data, self.index, crop_of(epoch, self.data.num_crops)
        plans = np.zeros(len(sample), PLAN)
        plans["crop_box"] = draw_crops(
            self.seed, view, sample, index.heights[sample], index.widths[sample], data.crop_scale, data.crop_ratio
        )
        plans["flip"] = draw_flips(self.seed, view, sample, data.flip)
        plans["order"], plans["factors"] = draw_jitters(self.seed, view, sample, data.jitter)
        return plans

    def augment_crops(self, rows: range) -> np.ndarray:
        """[n, K] records of PLAN: all crops of n images, K = data.num_crops; epochs e with e mod K = k draw crop k."""
        num_crops = self.data.num_crops
        crops = np.tile(np.arange(num_crops), len(rows))
        return self.augment(np.repeat(rows, num_crops), crops).reshape(len(rows), num_crops)
