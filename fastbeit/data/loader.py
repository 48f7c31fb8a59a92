"""Batches of two views in uint8, or token views alone, by one of three pipelines.

torch: simplejpeg and torch's antialiased resize. dali: NVIDIA DALI. pillow: as the authors, slow, the reference.
"""

import contextlib
import importlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastbeit.config.sections import DataConfig, Size
from fastbeit.data.batch import Batch, TokenViews
from fastbeit.data.decode import decode_reduced, decode_reference
from fastbeit.data.index.reader import Index
from fastbeit.data.plans import Drawn, Plans
from fastbeit.data.reading import batch_of, read_rows, read_step
from fastbeit.data.views import Rule, pillow_views, torch_views
from fastbeit.data.workers import load_items
from fastbeit.errors import ConfigError


def make_loader(
    data: DataConfig,
    index: Index,
    *,
    token_size: Size | None,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
) -> Generator[Batch, None, None]:
    """The batches of steps `first_step` to `num_steps` - 1 for one rank; close it, and its processes end.

    Args:
        token_size: height and width of the token view, None for none.
        batch_size: images a step over all ranks; rank r gets the r-th contiguous slice.

    Raises:
        ConfigError: at once, when the images do not fill a batch or the ranks do not divide it.
        DataError: while iterating: the folder is gone or no image is valid (66), too many bad ones (65).
    """
    refuse_auto(data)
    plans = Plans(data, index, batch_size, seed, rank, world_size)
    rule = Rule(data.image_size, token_size, data.jitter_on, levels=data.levels)
    steps = range(first_step, num_steps)
    if data.pipeline == "dali":
        return import_dali().dali_batches(plans, rule, steps)
    return load_items(CpuBatches(plans, rule), steps, data.num_workers)


def make_token_loader(
    data: DataConfig, index: Index, *, token_size: Size, seed: int, rows: Sequence[range], together: int
) -> Generator[TokenViews, None, None]:
    """All `data.num_crops` token views of images, the very bits of `make_loader`; close it, and its processes end.

    A file is read and decoded once for all its views.

    Args:
        rows: of the index, in the order in which they are wanted.
        together: rows an item has at most; none goes over the end of a range.

    Raises:
        ConfigError, DataError: as `make_loader`, but a bad image is listed, not replaced.
    """
    refuse_auto(data)
    plans = Plans(data, index, 1, seed, 0, 1)
    rule = Rule(data.image_size, token_size, data.jitter_on, patch_view=False, levels=data.levels)
    items = (part[start : start + together] for part in rows for start in range(0, len(part), together))
    if data.pipeline == "dali":
        return import_dali().dali_token_views(plans, rule, items, together)
    return load_items(CpuTokenViews(plans, rule), items, data.num_workers)


def why_no_dali() -> str | None:
    """Why DALI cannot be used here; None: it can."""
    try:
        importlib.import_module("nvidia.dali.fn")
    except (ImportError, OSError, RuntimeError) as err:
        # the latter two where a library that it is linked to is missing, or does not fit
        return str(err)
    return None


def import_dali() -> Any:
    if problem := why_no_dali():
        raise ConfigError(f"data.pipeline=dali: {problem}; pip install 'fastbeit[gpu]', or data.pipeline=torch")
    return importlib.import_module("fastbeit.data.dali")


def refuse_auto(data: DataConfig) -> None:
    if data.pipeline == "auto":
        raise ValueError("wanted data.pipeline by name, got auto; `train.pipeline.settle_pipeline` gives it a name")


def torch_photo(data: bytes, size: Size, plans: Iterable[np.void], rule: Rule) -> list[list[np.ndarray]]:
    """The views of an image by each of some plans; raises `BadImage`."""
    decode_to = cache(partial(decode_reduced, data, size, levels=rule.levels))
    return [torch_views(decode_to, plan, rule) for plan in plans]


def pillow_photo(data: bytes, size: Size, plans: Iterable[np.void], rule: Rule) -> list[list[np.ndarray]]:
    """As `torch_photo`."""
    image = decode_reference(data, size, rule.levels)
    return [pillow_views(image, plan, rule) for plan in plans]


PIPELINES = {"torch": torch_photo, "pillow": pillow_photo}


class CpuBatches(Dataset):
    """The batch of each step, by the torch or the Pillow pipeline."""

    def __init__(self, plans: Plans, rule: Rule) -> None:
        self.plans, self.rule = plans, rule
        self.photo = PIPELINES[plans.data.pipeline]

    def __getitem__(self, step: int) -> Batch:
        with _one_thread():
            return self._make(self.plans.draw(step))

    def _make(self, drawn: Drawn) -> Batch:
        outputs = [np.empty((len(drawn.sample), *size, 3), np.uint8) for size, _ in self.rule.views()]
        found = []
        for row, one in enumerate(read_step(self.plans, drawn, self._photo)):
            for output, view in zip(outputs, one.made, strict=True):
                output[row] = view
            # views are large, and they are in the batch already
            found.append(one._replace(made=None))
        images, *token_images = (torch.from_numpy(output) for output in outputs)
        return batch_of(drawn, found, images, *(token_images or [None]))

    def _photo(self, row: int, data: bytes, size: Size, plan: np.void) -> list[np.ndarray]:
        (views,) = self.photo(data, size, [plan], self.rule)
        return views


class CpuTokenViews(Dataset):
    """The token views of rows of the index, by the torch or the Pillow pipeline."""

    def __init__(self, plans: Plans, rule: Rule) -> None:
        self.plans, self.rule = plans, rule
        self.photo = PIPELINES[plans.data.pipeline]

    def __getitem__(self, rows: range) -> TokenViews:
        ((token_size, _),) = self.rule.views()
        images, bad = np.zeros((len(rows), self.plans.data.num_crops, *token_size, 3), np.uint8), []
        with _one_thread():
            for place, views, reasons in read_rows(self.plans, rows, self._photo):
                bad += reasons
                if not reasons:
                    images[place] = np.concatenate(views)
        return TokenViews(rows, torch.from_numpy(images), bad)

    def _photo(self, row: int, data: bytes, size: Size, plans: np.ndarray) -> list[list[np.ndarray]]:
        return self.photo(data, size, plans, self.rule)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # one image is too little work to share: two threads took five times as long as one
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
