"""Who loads images in `benchmarks.data`: each in a process of its own, with one thread, making batches when asked.

A turn lasts until the process, its threads and its workers rest: what they prefetch for the next turn is as much as was
ready for this one. Images a CPU second are images a second a core, whoever else keeps the machine busy.
"""

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.data import official
from fastbeit.config.sections import DataConfig, MaskingConfig
from fastbeit.data.batch import Batch
from fastbeit.data.decode import decode, decode_reference
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.masking import MaskRule, Masks, draw_masks

SEED = 0
ENDLESS = 10**9  # steps
BATCHES_A_TURN = 4 if torch.cuda.is_available() else 1  # a GPU makes one in less time than rest is looked for
REST_S, BUSY = 0.05, 0.1  # processes rest when they take less than this share of a core for so long
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Task:
    """What is made of each image."""

    index: Path
    in_files: bool  # else in a tar
    batch: int
    views: int  # 0: the whole image is decoded, no more
    jitter: str  # off, full_image, crop


Batches = Generator[int, None, None]  # images made since the last one
Contestant = Callable[[Task], Batches]


def open_loader(
    index: Index, pipeline: str, jitter: str, *, views: int = 2, batch: int, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """Batches as a run gets them, without end."""
    data = DataConfig.model_validate(
        dict(pipeline=pipeline, num_workers=num_workers, tail="wrap")
        | (dict(jitter=0) if jitter == "off" else dict(jitter_on=jitter))
    )
    return make_loader(
        data,
        index,
        token_size=(official.TOKEN_SIZE, official.TOKEN_SIZE) if views == 2 else None,
        batch_size=batch,
        seed=SEED,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=ENDLESS,
    )


def masks_of(sample: Tensor, epoch: Tensor) -> Masks:
    return draw_masks(MaskRule("blockwise", MaskingConfig(), official.GRID, SEED), epoch, sample)


def ours(pipeline: str, num_workers: int, task: Task) -> Batches:
    """Batches as a run gets them, and their masks."""
    index = open_index(task.index)
    if not task.views:
        yield from _decoded(index, pipeline, task.batch)
    # several processes share a turn; DALI has threads
    batch = task.batch // (1 if pipeline == "dali" else max(1, num_workers))
    loader = open_loader(index, pipeline, task.jitter, views=task.views, batch=batch, num_workers=num_workers)
    for made in loader:
        masks_of(made.sample, made.epoch)
        yield batch


def _decoded(index: Index, pipeline: str, batch: int) -> Batches:
    """Whole images, one after another, through the decoder of a pipeline."""
    decoder = {"torch": decode, "pillow": decode_reference}.get(pipeline)
    graph = None if decoder else _decoding_graph(batch)
    first = 0
    while True:
        rows = [(first + k) % len(index) for k in range(batch)]
        first += batch
        if graph:
            graph.feed_input("encoded", [np.frombuffer(index.read_bytes(i), np.uint8) for i in rows])
            graph.run()
        elif decoder:
            for i in rows:
                decoder(index.read_bytes(i), (int(index.heights[i]), int(index.widths[i])))
        yield batch


def _decoding_graph(batch: int) -> Any:
    fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    pipeline = importlib.import_module("nvidia.dali").Pipeline
    on_gpu = torch.cuda.is_available()
    made = pipeline(batch, num_threads=1, device_id=0 if on_gpu else None, prefetch_queue_depth=1)
    with made:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        made.set_outputs(fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB))
    made.build()
    return made


def theirs(num_workers: int, transform_of: Callable[..., Callable], jitter_crop: bool, task: Task) -> Batches:
    """The official transform: image by image, or by a DataLoader with workers and its collation."""
    torch.manual_seed(SEED)
    transform: Callable[[Image.Image], Any] = _whole
    if task.views:
        transform = transform_of(task.jitter != "off", jitter_crop, task.views == 2)
    images = official.Images(open_index(task.index), task.in_files, transform)
    if num_workers:
        loader = DataLoader(
            images,
            batch_size=task.batch // num_workers,
            sampler=_places(len(images), task.batch),
            num_workers=num_workers,
            persistent_workers=True,
        )
        # an epoch of the loader is a turn, and workers rest between the two
        while True:
            for _ in loader:
                yield task.batch // num_workers
    place = 0
    while True:
        images[place % len(images)]
        place += 1
        yield 1


def _whole(image: Image.Image) -> int:
    return image.width  # decoded by then


def _places(num_images: int, batch: int) -> list[int]:
    return [place % num_images for place in range(batch)]


CONTESTANTS: dict[str, Contestant] = {
    "official": partial(theirs, 0, official.Transform, False),
    "official, DataLoader of 2": partial(theirs, 2, official.Transform, False),
    "official, jitter after crop": partial(theirs, 0, official.Transform, True),
    "official, torchvision": partial(theirs, 0, official.TorchvisionTransform, False),
    "ours, torch": partial(ours, "torch", 0),
    "ours, torch, 2 workers": partial(ours, "torch", 2),
    "ours, dali": partial(ours, "dali", 0),
    "ours, dali, 4 threads": partial(ours, "dali", 4),
    "ours, pillow": partial(ours, "pillow", 0),
}

# of those that may be missing
WANTED = {
    "official, torchvision": "torchvision.transforms",
    "ours, dali": "nvidia.dali",
    "ours, dali, 4 threads": "nvidia.dali",
}


@dataclass(frozen=True)
class Turn:
    """What a batch cost."""

    images: int
    wall_s: float
    cpu_s: float
    memory_mib: float  # held at its end by the process and its workers, what they share counted once


class Player:
    """A contestant's process; ask it for `absent` first, and close it."""

    def __init__(self, who: str) -> None:
        self.who = who
        spawn = multiprocessing.get_context("spawn")  # of a fork, the parent's memory would count as its own
        self._connection, other = spawn.Pipe()
        # no daemon: it may have workers; it ends when the connection does
        self._process = spawn.Process(target=_serve, args=(other, who))
        self._process.start()
        other.close()

    @cached_property
    def absent(self) -> str | None:
        """Why it cannot take part; None: it can."""
        return self._receive()

    def begin(self, task: Task) -> None:
        """Warm up for turns of a task, and leave the last one."""
        self._connection.send(task)
        self._receive()

    def turn(self) -> Turn:
        self._connection.send("turn")
        return self._receive()

    def peak_mib(self) -> float:
        """The most memory that its process, without its workers, has held in RAM so far."""
        self._connection.send("peak")
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"'{self.who}' failed; its traceback stands above") from None


def _serve(connection: Connection, who: str) -> None:
    torch.set_num_threads(1)
    connection.send(_absent(who))
    batches: Batches | None = None
    task, worked_s = None, 0.0
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            break  # nobody asks any more
        if asked == "peak":
            connection.send(_proc_mib("status", "VmHWM"))
            continue
        if isinstance(asked, Task):
            if batches:
                batches.close()
            task, batches = asked, CONTESTANTS[who](asked)
        assert task and batches
        started, made = time.perf_counter(), 0
        while made < task.batch * BATCHES_A_TURN:
            made += next(batches)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        (rested_at, now_s), before_s = _rest(), worked_s
        worked_s = now_s
        connection.send(Turn(made, rested_at - started, now_s - before_s, held_mib()))
    if batches:
        batches.close()


def _absent(who: str) -> str | None:
    try:
        importlib.import_module(WANTED.get(who, "torch"))
    except (ImportError, RuntimeError) as err:
        # torchvision raises the latter beside a torch that it was not built for
        return f"not installed: {err}"
    return None


def held_mib() -> float:
    """Memory of this process and its workers; what they share counts once."""
    return sum(_proc_mib("smaps_rollup", "Pss", pid) for pid in [os.getpid(), *_workers()])


def _rest() -> tuple[float, float]:
    """Waits until this process and its workers rest; since when they do, and their CPU seconds so far."""
    since, before_s = time.perf_counter(), _cpu_s()
    time.sleep(REST_S)
    while (now_s := _cpu_s()) - before_s > BUSY * REST_S:
        since, before_s = time.perf_counter(), now_s
        time.sleep(REST_S)
    return since, now_s


def _cpu_s() -> float:
    ticks = 0
    for worker in _workers():
        # what follows the name in brackets: state is field 3, user and system time are 14 and 15
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + ticks * TICK_S


def _workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def _proc_mib(file: str, key: str, pid: int | str = "self") -> float:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/{file} has no {key}; memory is measured on Linux alone")
