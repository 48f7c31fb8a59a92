"""Batches of two views in uint8, or token views alone, by one of three pipelines (design D1, D4).

torch: simplejpeg and torch's antialiased resize. dali: NVIDIA DALI. pillow: as the authors, slow, the reference.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastbeit.config.sections import DataConfig
from fastbeit.cores import num_cores
from fastbeit.data.decode import decode_reduced, decode_reference
from fastbeit.data.index.reader import Index
from fastbeit.data.plans import Batch, Drawn, Plans, TokenViews, bad_limit
from fastbeit.data.views import Rule, Size, pillow_views, torch_views
from fastbeit.errors import DATA_LIMIT, ConfigError, DataError


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
    plans = Plans(data, index, batch_size, seed, rank, world_size)
    rule = Rule(data.image_size, token_size, data.jitter_on)
    steps = range(first_step, num_steps)
    if data.pipeline == "dali":
        return _import_dali().dali_batches(plans, rule, steps)
    return load_items(CpuBatches(plans, rule), steps, data.num_workers)


def make_token_loader(
    data: DataConfig, index: Index, *, token_size: Size, seed: int, rows: Sequence[range], together: int
) -> Generator[TokenViews, None, None]:
    """All `data.views` token views of images, the very bits that `make_loader` gives; close it, and its processes end.

    A file is read and decoded once for all its views.

    Args:
        rows: of the index, in the order in which they are wanted.
        together: rows an item has at most; none goes over the end of a range.

    Raises:
        ConfigError, DataError: as `make_loader`, but a bad image is listed, not replaced.
    """
    plans = Plans(data, index, 1, seed, 0, 1)
    rule = Rule(data.image_size, token_size, data.jitter_on, patch_view=False)
    items = (part[start : start + together] for part in rows for start in range(0, len(part), together))
    if data.pipeline == "dali":
        return _import_dali().dali_token_views(plans, rule, items, together)
    return load_items(CpuTokenViews(plans, rule), items, data.num_workers)


def _import_dali() -> Any:
    try:
        from fastbeit.data import dali
    except ModuleNotFoundError as err:
        raise ConfigError(f"data.pipeline=dali: {err}; pip install 'fastbeit[gpu]', or data.pipeline=torch") from None
    return dali


def torch_photo(data: bytes, size: Size, plans: Iterable[np.void], rule: Rule) -> list[list[np.ndarray]]:
    """The views of an image by each of some plans; raises `BadImage`."""
    decode_to = cache(partial(decode_reduced, data, size))
    return [torch_views(decode_to, plan, rule) for plan in plans]


def pillow_photo(data: bytes, size: Size, plans: Iterable[np.void], rule: Rule) -> list[list[np.ndarray]]:
    """As `torch_photo`."""
    image = decode_reference(data, size)
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
        photos = self.plans.load(drawn, lambda data, size, plan: self.photo(data, size, [plan], self.rule))
        for row, (views,) in enumerate(photos):
            for output, view in zip(outputs, views, strict=True):
                output[row] = view
        images, *token_images = (torch.from_numpy(output) for output in outputs)
        return drawn.batch(images, *(token_images or [None]))


class CpuTokenViews(Dataset):
    """The token views of rows of the index, by the torch or the Pillow pipeline."""

    def __init__(self, plans: Plans, rule: Rule) -> None:
        self.plans, self.rule = plans, rule
        self.photo = PIPELINES[plans.data.pipeline]

    def __getitem__(self, rows: range) -> TokenViews:
        ((token_size, _),) = self.rule.views()
        images, bad = np.zeros((len(rows), self.plans.data.views, *token_size, 3), np.uint8), []
        with _one_thread():
            photos = self.plans.load_valid(rows, partial(self.photo, rule=self.rule), bad)
            for place, views in photos:
                images[place] = np.concatenate(views)
        return TokenViews(rows, torch.from_numpy(images), bad)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # one image is too little work to share: two threads took five times as long as one
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Answer(Dataset):
    """Hands a `DataError` over as a value: an exception would reach the training process as the text of a traceback."""

    def __init__(self, items: Dataset) -> None:
        self.items = items

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.items[key]
        except DataError as err:
            return err


def load_items(items: Dataset, keys: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """The item of each key, in order, made by processes of their own."""
    # more processes than cores would only take turns
    num_workers = min(num_workers, num_cores())
    loader = DataLoader(
        _Answer(items),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        prefetch_factor=2 if num_workers else None,
    )
    # the loop alone holds the iterator: however it ends, the workers end with it
    for answer in _start(loader):
        if isinstance(answer, DataError):
            raise answer
        yield answer


def _start(loader: DataLoader) -> Iterator[Any]:
    # workers are born with SIGTERM held back, until they know what to make of it
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)
    mask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        return iter(loader)
    finally:
        mask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _begin_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process; the training process decides what they mean
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey, args=[os.getppid()], daemon=True).start()


def _obey(parent: int) -> None:
    """End by a SIGTERM of the training process, and of nobody else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


class BadSamples:
    """The list of bad images in a run's directory; stops the run when it grows too long."""

    def __init__(self, path: Path, num_images: int) -> None:
        self.path, self._limit = path, bad_limit(num_images)
        self._seen: set[int] = set()
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                self._seen.add(json.loads(line)["sample"])
            except ValueError:
                # the line that an interruption cut short; the image will be met again
                continue
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, bad: list[tuple[int, str]]) -> None:
        """List those not yet listed.

        Raises:
            DataError: more than `bad_limit` images are bad (exit code 65).
        """
        for sample, reason in bad:
            if sample in self._seen:
                continue
            self._seen.add(sample)
            with self.path.open("a") as file:
                file.write(json.dumps({"sample": sample, "reason": reason}) + "\n")
        if len(self._seen) > self._limit:
            raise DataError(
                f"{len(self._seen)} bad images, more than the {self._limit} that a run puts up with (100, or 1 % of "
                f"the data if that is more), listed in '{self.path}'; repair or remove them and make the index again",
                DATA_LIMIT,
            )
