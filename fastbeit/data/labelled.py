"""Batches of labelled images: augmented for fine-tuning, or as they are for evaluation.

Fine-tuning draws order, crop and flip as pre-training does, and RandAugment on the view. Evaluation sees the middle of
each image, by the authors' rule.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastbeit.config.finetune import AugmentConfig
from fastbeit.config.sections import DataConfig, Levels, Size
from fastbeit.data.augment import draw_steps, fill_of, rand_augment
from fastbeit.data.batch import Batch
from fastbeit.data.decode import MAX_PIXELS, decode, decode_reference
from fastbeit.data.index.reader import Index
from fastbeit.data.loader import CpuBatches, import_dali, refuse_auto
from fastbeit.data.plans import Plans
from fastbeit.data.views import Rule
from fastbeit.data.workers import load_items
from fastbeit.errors import BadImage, DataError

CROP_SHARE = 224 / 256  # of the resized image's side
LARGE = 384  # from this size on, the crop takes the whole shorter side


def make_labelled_loader(
    data: DataConfig,
    augment: AugmentConfig,
    index: Index,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
) -> Generator[Batch, None, None]:
    """The training batches of steps `first_step` to `num_steps` - 1 for one rank, as `loader.make_loader`.

    RandAugment takes the place of colour jitter, as in timm. It works on bytes on the CPU, also on what DALI has made.
    Random erasing is left to `augment.erase_`, which works where the normalised images are.

    Raises:
        ConfigError: at once, as `make_loader`.
        DataError: at once, when an image has no label (66); while iterating, as `make_loader`.
    """
    refuse_auto(data)
    check_labels(index)
    if augment.num_ops:
        data = data.model_copy(update={"jitter": 0.0})
    plans, steps = Plans(data, index, batch_size, seed, rank, world_size, augment.repeats), range(first_step, num_steps)
    labelled = Labelled(plans, augment)
    if data.pipeline == "dali":
        return labelled.by_threads(import_dali().dali_batches(plans, labelled.rule, steps))
    return load_items(TrainingBatches(labelled), steps, data.num_workers)


def make_eval_loader(
    data: DataConfig, index: Index, *, batch_size: int, rank: int, world_size: int
) -> Generator[Batch, None, None]:
    """Every image once, in the order of the index; of each `batch_size` images rank r gets the r-th contiguous share.

    All ranks get equally many batches; a share of the last can be short, and with more ranks than images empty. A bad
    image is left out of its batch and listed in `bad`.

    Raises:
        DataError: at once, when an image has no label; while iterating, when the data are gone (66).
    """
    check_labels(index)
    starts = range(0, len(index), batch_size)
    shares = (_share(start, min(start + batch_size, len(index)), rank, world_size) for start in starts)
    return load_items(EvalBatches(data, index), shares, data.num_workers)


def _share(start: int, stop: int, rank: int, world_size: int) -> range:
    first, last = ((stop - start) * part // world_size for part in (rank, rank + 1))
    return range(start + first, start + last)


def check_labels(index: Index) -> None:
    """
    Raises:
        DataError: an image has no label (66).
    """
    bare = np.flatnonzero(index.labels < 0)
    if len(bare):
        raise DataError(
            f"{len(bare)} of {len(index)} images have no label, such as '{index.name(int(bare[0]))}'; give each one (a "
            "folder named as its class, a .cls member beside it, a label column) and make the index again"
        )


class Labelled:
    """What makes a training's batch of views one of fine-tuning: RandAugment, and labels."""

    def __init__(self, plans: Plans, augment: AugmentConfig) -> None:
        self.plans, self.augment = plans, augment
        self.rule = Rule(plans.data.image_size, None, plans.data.jitter_on, levels=plans.data.levels)
        self.fill = fill_of(plans.data.mean)

    def __call__(self, batch: Batch, map: Callable[..., Iterable[Any]] = map) -> Batch:
        """Changes the images of `batch`, which lie on the CPU, in place."""
        augment = self.augment
        # of the images that are shown: in place of a bad one stands another
        sample, epoch, images = batch.sample.numpy(), batch.epoch.numpy(), batch.images.numpy()
        magnitude = augment.magnitude, augment.magnitude_std
        drawn = draw_steps(self.plans.seed, epoch, sample, augment.num_ops, *magnitude)

        def carry_out(row: int) -> None:
            images[row] = rand_augment(images[row], drawn[row], self.fill)

        for _ in map(carry_out, range(len(images))):
            pass
        return replace(batch, labels=_labels(self.plans.index, sample))

    def by_threads(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """Of batches that are made in this process; close it, and they are closed."""
        with ThreadPoolExecutor(max(1, self.plans.data.num_workers), "augment") as threads:
            try:
                for batch in batches:
                    yield self(replace(batch, images=batch.images.cpu()), threads.map)
            finally:
                batches.close()


class TrainingBatches(Dataset):
    """The augmented batch of each step, by the torch or the Pillow pipeline."""

    def __init__(self, labelled: Labelled) -> None:
        self.labelled, self.views = labelled, CpuBatches(labelled.plans, labelled.rule)

    def __getitem__(self, step: int) -> Batch:
        return self.labelled(self.views[step])


class EvalBatches(Dataset):
    """The middle of each image of some rows of the index."""

    def __init__(self, data: DataConfig, index: Index) -> None:
        self.index, self.size = index, data.image_size
        self.levels: Levels = data.levels
        self.decode = decode_reference if data.pipeline == "pillow" else _decode

    def __getitem__(self, rows: range) -> Batch:
        images, samples, bad = np.empty((len(rows), *self.size, 3), np.uint8), [], []
        for i in rows:
            try:
                images[len(samples)] = self._middle(i)
                samples.append(i)
            except BadImage as err:
                bad.append((i, f"{self.index.name(i)}: {err}"))
        sample = np.array(samples, np.int64)
        views, epoch = torch.from_numpy(images[: len(sample)]), torch.zeros(len(sample), dtype=torch.int64)
        return Batch(views, None, torch.from_numpy(sample), epoch, bad, _labels(self.index, sample))

    def _middle(self, i: int) -> np.ndarray:
        size = int(self.index.heights[i]), int(self.index.widths[i])
        return centre_crop(self.decode(self.index.read_bytes(i), size, self.levels), self.size)


def _decode(data: bytes, size: Size, levels: Levels) -> Image.Image:
    return Image.fromarray(decode(data, size, levels))


def _labels(index: Index, sample: np.ndarray) -> Tensor:
    return torch.from_numpy(index.labels[sample].astype(np.int64))


def centre_crop(image: Image.Image, size: Size) -> np.ndarray:
    """The middle of an image: it is resized, bicubic, with its aspect ratio kept, until it covers `size` / 0.875, or
    `size` itself from 384 on (authors' code: crop_pct), and `size` is cut out.

    Args:
        image: RGB.
        size: height and width.

    Returns:
        [height, width, 3] uint8.
    """
    share = CROP_SHARE if min(size) < LARGE else 1.0
    height, width = int(size[0] / share), int(size[1] / share)
    # the other side follows, and is rounded down
    if height * image.width >= width * image.height:
        width = height * image.width // image.height
    else:
        height = width * image.height // image.width
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    box = left, top, left + size[1], top + size[0]
    if height * width <= MAX_PIXELS:
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).crop(box))
    # a line of pixels would fill the memory: only what is cut out is made, which rounds otherwise
    scale = image.width / width, image.height / height
    source = box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=source))
