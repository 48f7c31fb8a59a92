"""Which images make up a step and how each is augmented: a pure function of (seed, step) (design D1).

A step's batch is the same on any number of ranks and workers, and after a resume: who starts at step k gets what an
uninterrupted run gets from step k on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbeit.config import ConfigError, DataConfig
from fastbeit.data.decode import BadImage
from fastbeit.data.index import DataError, Index
from fastbeit.data.sampling import draw_crops, draw_flips, draw_jitters, rows_at, view_of
from fastbeit.data.views import PLAN, Size
from fastbeit.errors import DATA_LIMIT, DATA_MISSING


@dataclass
class Batch:
    """One rank's share of a step's images."""

    images: Tensor  # [B, H, W, 3] uint8, the patch view
    token_images: Tensor | None  # [B, h, w, 3] uint8, the token view: the same box, flip and jitter
    sample: Tensor  # [B] int64, rows of the index
    epoch: Tensor  # [B] int64; with tail=wrap a batch can straddle epochs
    bad: list[tuple[int, str]] = field(default_factory=list)  # (row of the index, path and reason) of images replaced


@dataclass
class TokenViews:
    """All token views of some images, in the order of the index."""

    rows: range  # of the index
    images: Tensor  # [n, K, h, w, 3] uint8; 0 where the image is bad
    bad: list[tuple[int, str]]  # as in `Batch`, of images that none replaces


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
    """Which images and augmentations each step consists of."""

    data: DataConfig
    index: Index
    batch_size: int
    seed: int
    rank: int
    world_size: int

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
        data, index, view = self.data, self.index, view_of(epoch, self.data.views)
        plans = np.zeros(len(sample), PLAN)
        plans["box"] = draw_crops(
            self.seed, view, sample, index.heights[sample], index.widths[sample], data.crop_scale, data.crop_ratio
        )
        plans["flip"] = draw_flips(self.seed, view, sample, data.flip)
        plans["order"], plans["factors"] = draw_jitters(self.seed, view, sample, data.jitter)
        return plans

    def augment_views(self, rows: range) -> np.ndarray:
        """[n, K] records of PLAN: all views of n images, K = data.views; epochs e with e mod K = v draw view v."""
        num_views = self.data.views
        views = np.tile(np.arange(num_views), len(rows))
        return self.augment(np.repeat(rows, num_views), views).reshape(len(rows), num_views)

    def load(self, drawn: Drawn, decoder: Callable[[bytes, Size], Any]) -> Iterator[Any]:
        """Each image, decoded. In place of a bad one `drawn` gets the next valid one, with that one's own augmentation.

        Raises:
            DataError: the folder is gone, no image is valid, or more bad ones in a row than a run may have.
        """
        for row, wanted in enumerate(drawn.sample.tolist()):
            for tried in range(len(self.index)):
                i = (wanted + tried) % len(self.index)
                try:
                    image = self._decode(i, decoder)
                except BadImage as err:
                    drawn.bad.append((i, f"{self.index.path(i)}: {err}"))
                else:
                    break
                if tried >= bad_limit(len(self.index)):
                    raise DataError(f"{tried + 1} bad images in a row, the last {drawn.bad[-1][1]}", DATA_LIMIT)
            else:
                raise DataError(
                    f"none of the {len(self.index)} images is valid, such as {drawn.bad[-1][1]}", DATA_MISSING
                )
            if tried:
                drawn.sample[row] = i
                drawn.plans[row] = self.augment(drawn.sample[[row]], drawn.epoch[[row]])[0]
            yield image

    def load_valid(
        self, rows: range, decoder: Callable[[bytes, Size], Any], bad: list[tuple[int, str]]
    ) -> Iterator[tuple[int, Any]]:
        """Place in `rows` and image of those that are valid; the others go to `bad`."""
        for place, i in enumerate(rows):
            try:
                yield place, self._decode(i, decoder)
            except BadImage as err:
                bad.append((i, f"{self.index.path(i)}: {err}"))

    def _decode(self, i: int, decoder: Callable[[bytes, Size], Any]) -> Any:
        try:
            data = self.index.read_bytes(i)
        except OSError as err:
            if not self.index.root.is_dir():
                raise DataError(
                    f"the images' folder '{self.index.root}' is gone, or not mounted", DATA_MISSING
                ) from None
            raise BadImage(f"unreadable: {err.strerror or err}") from None
        if not data:
            raise BadImage("empty file")
        return decoder(data, (int(self.index.heights[i]), int(self.index.widths[i])))
