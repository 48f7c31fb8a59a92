"""JPEG files in tar shards, made for the occasion and read by the real loader."""

import io
import tarfile
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.step.drawn import Source
from benchmarks.step.rates import VOCAB_SIZE
from fastbeit.config.pretrain import Config
from fastbeit.cores import num_cores
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.engine.ranks import World
from fastbeit.jobs.pretrain import Pretraining
from fastbeit.masking import Slots
from fastbeit.tokenizer.precision import Chosen
from fastbeit.tokenizer.source import EncodedTokens
from fastbeit.train.pipeline import settle_pipeline

HEIGHT, WIDTH = 375, 500  # as ImageNet's are on average
COARSE = 12, 16  # random colours that are blown up to it
NOISE = 24  # levels up and down: with it a file has about 100 KB, as ImageNet's have
QUALITY = 90
SHARD = 512  # images
NUM_IMAGES = {"cuda": 4096, "cpu": 64}


def read_shards(config: Config, world: World, chosen: Chosen | None) -> Generator[Source, None, None]:
    """
    Args:
        chosen: makes tokens of the second view; None: they come from a cache.
    """
    config, _ = settle_pipeline(config, world, None, None)
    with ExitStack() as stack:
        # all ranks are on one machine: the first rank's files serve them all
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbeit-step-"))
        shared = Path(world.gather([folder])[0])
        if world.rank == 0:
            write_shards(shared / "shards", max(NUM_IMAGES[world.device.type], config.optim.batch_size))
            build_index(shared / "shards", shared / "images.idx")
        world.barrier()
        index = open_index(shared / "images.idx")
        source: Any = EncodedTokens(chosen, config, world.device) if chosen else CachedWords(config, world, len(index))
        task = Pretraining(config, world, index, source)
        batches = stack.enter_context(closing(task.batches(0)))
        yield Source(batches, task.inputs)


class CachedWords:
    """Random tokens, read as `CachedTokens` reads them: by image, from memory, whole, then those of the slots."""

    vocab_size, token_size, fingerprint, agreement = VOCAB_SIZE, None, "", None

    def __init__(self, config: Config, world: World, num_images: int) -> None:
        self.device = world.device
        self.words = np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_images, config.num_patches), np.uint16)

    def tokens(self, batch: Batch, slots: Slots) -> Tensor:
        words = torch.from_numpy(self.words[batch.sample.numpy()].astype(np.int64))
        return words.to(self.device, non_blocking=True).gather(1, slots.predict_idx)


def write_shards(folder: Path, num_images: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(-NOISE, NOISE + 1, (HEIGHT, WIDTH, 3), np.int16)
    with ThreadPoolExecutor(num_cores()) as pool:
        for first in range(0, num_images, SHARD):
            numbers = range(first, min(first + SHARD, num_images))
            with tarfile.open(folder / f"{first:06}.tar", "w") as shard:
                for number, data in zip(numbers, pool.map(lambda n: jpeg_file(n, noise), numbers), strict=True):
                    member = tarfile.TarInfo(f"{number:06}.jpg")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def jpeg_file(number: int, noise: np.ndarray) -> bytes:
    """Soft colours with grain: no two images are alike, and one compresses as a photo does."""
    colours = np.random.default_rng(number).integers(0, 256, (*COARSE, 3), np.uint8)
    soft = Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft, np.int16) + np.roll(noise, number, (0, 1))
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=QUALITY)
