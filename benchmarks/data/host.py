"""What the host carries besides pixels: the loader's own way, with decoding stubbed.

Order, plans, reading, checks and batches are those of a run; in place of decoding, resizing and jitter stands a
constant picture of the right shape. DALI's way reads, looks at headers and ends as of images that were checked, and
hands the bytes over; the picture stands in place of DALI.
"""

import argparse
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import official
from benchmarks.data.contestants import SEED, open_loader
from fastbeit.config.sections import DataConfig, Size
from fastbeit.data import loader
from fastbeit.data.batch import Batch
from fastbeit.data.index.checked import write_checked
from fastbeit.data.index.reader import open_index
from fastbeit.data.loader import why_no_dali
from fastbeit.data.plans import Plans
from fastbeit.data.views import Rule

AIM_IMG_PER_S = 6400
BATCHES_A_TURN = 8
GREY = 100


def host(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Images a second of each way, by the clock and by CPU seconds of the training process."""
    path = folder / "host.idx"
    shutil.copyfile(folder / "photos.idx", path)
    index = open_index(path)
    write_checked(index, np.full(len(index), float(GREY)))
    ways = {"torch": ("torch", 0), "torch, handed over by a worker process": ("torch", 1), "dali": ("dali", 0)}
    rows = []
    for who, (pipeline, num_workers) in ways.items():
        if pipeline == "dali" and (problem := why_no_dali()):
            rows.append(dict(who=who, note=f"not installed: {problem}"))
            continue
        opened = partial(open_loader, index, pipeline, "full_image", batch=args.batch, num_workers=num_workers)
        with stubbed(pipeline), closing(opened()) as batches:
            check(batches, Plans(DataConfig(tail="wrap"), index, args.batch, SEED, 0, 1))
            turns = [turn(batches) for _ in range(args.rounds)]
        wall, cpu = ([BATCHES_A_TURN * args.batch / seconds for seconds in found] for found in zip(*turns, strict=True))
        rows.append(
            dict(
                who=who,
                img_per_s=median(wall),
                img_per_cpu_s=median(cpu),
                slowest=min(wall),
                fastest=max(wall),
            )
        )
    return rows


def check(made: Iterator[Batch], plans: Plans) -> None:
    """The first batches are those of a run, but for their pixels."""
    for step in range(2):
        batch = next(made)
        assert batch.token_images is not None and batch.sample.tolist() == plans.draw(step).sample.tolist()
        assert batch.images.shape == (len(batch.sample), *plans.data.image_size, 3)
        assert (batch.images == GREY).all() and (batch.token_images == GREY).all() and not batch.bad


def turn(made: Iterator[Batch]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, of some batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(BATCHES_A_TURN):
        next(made)
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def stubbed(pipeline: str) -> Generator[None, None, None]:
    """A pipeline whose pixels cost nothing."""
    if pipeline == "dali":
        with patch.object(import_module("fastbeit.data.dali"), "Views", Pictures):
            yield
    else:
        with patch.dict(loader.PIPELINES, {pipeline: _pictures}):
            yield


SIDES: list[Size] = [(224, 224), (official.TOKEN_SIZE, official.TOKEN_SIZE)]
PICTURES = {side: np.full((*side, 3), GREY, np.uint8) for side in SIDES}


def _pictures(data: bytes, size: Size, plans: Iterable[np.void], rule: Rule) -> list[list[np.ndarray]]:
    return [[PICTURES[side] for side, _ in rule.views()] for _ in plans]


class Pictures:
    """In the place of `dali_graph.Views`; a batch of pictures lies there already, as DALI's lies on a GPU."""

    def __init__(self, plans: Plans, rule: Rule, batch_size: int) -> None:
        self._views = [torch.full((batch_size, *side, 3), GREY, dtype=torch.uint8) for side, _ in rule.views()]
        self._begun: deque[int] = deque()

    def begin(self, given: Any) -> None:
        # what a pipeline is fed with
        self._begun.append(len([np.frombuffer(image.encoded, np.uint8) for image in given.checked]))

    def end(self) -> list[Tensor]:
        number = self._begun.popleft()
        return [view[:number] for view in self._views]
