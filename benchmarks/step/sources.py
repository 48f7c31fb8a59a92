"""Where a timed step's inputs come from: drawn before, with tokens made on the fly, or through the real loader."""

import itertools
from collections.abc import Callable, Generator

from benchmarks.step.drawn import NUM_BATCHES, Source, draw_inputs
from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.engine.ranks import World


def synthetic(config: Config, world: World) -> Generator[Source, None, None]:
    """Images, masks and labels that are on the device; masks are BEiT's, labels random: the loss stays near log V."""
    ready = [draw_inputs(config, world, number) for number in range(NUM_BATCHES)]
    counts = [(labels != masking.UNUSED).sum() for _, _, _, labels, _ in ready]
    yield Source(itertools.cycle(zip(ready, counts, strict=True)), lambda batch, _: batch)


def tokens(config: Config, world: World) -> Generator[Source, None, None]:
    """Views that are on the device, of which a dVAE makes tokens in each step."""
    from benchmarks.step.online import encoded_views

    yield from encoded_views(config, world)


def jpeg(config: Config, world: World) -> Generator[Source, None, None]:
    """JPEG files in shards, by `data.pipeline`; tokens of as many images stand in a cache."""
    from benchmarks.step.shards import read_shards

    yield from read_shards(config, world, None)


def jpeg_tokens(config: Config, world: World) -> Generator[Source, None, None]:
    """The same with two views, and tokens made on the fly."""
    from benchmarks.step.online import random_tokenizer
    from benchmarks.step.shards import read_shards

    yield from read_shards(config, world, random_tokenizer(config, world.device))


# those with files or tokens want more of fastbeit's dependencies, and import them when they are asked for
SOURCES: dict[str, Callable[[Config, World], Generator[Source, None, None]]] = {
    "synthetic": synthetic,
    "tokens": tokens,
    "jpeg": jpeg,
    "jpeg-tokens": jpeg_tokens,
}
