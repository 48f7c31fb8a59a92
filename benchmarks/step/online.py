"""Tokens made on the fly by a dVAE of OpenAI's size, with random weights, as a run without a cache makes them."""

import itertools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.drawn import NUM_BATCHES, Source, drawn
from benchmarks.step.rates import VOCAB_SIZE
from fastbeit.config.pretrain import Config
from fastbeit.config.tokenizer import Architecture
from fastbeit.data.batch import Batch
from fastbeit.engine.ranks import World
from fastbeit.jobs.pretrain import Pretraining
from fastbeit.tokenizer.dvae import Encoder
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.precision import NAMES, Chosen, encoding_dtype
from fastbeit.tokenizer.source import EncodedTokens

TOY_TOKENIZER = dict(n_hid=8, n_init=8)


def encoded_views(config: Config, world: World) -> Generator[Source, None, None]:
    """Both views are on the device; masks, tokens and the rest are made in each step by the trainer's own code."""
    source = EncodedTokens(random_tokenizer(config, world.device), config, world.device)
    index: Any = _NoIndex(config.optim.batch_size)
    task = Pretraining(config, world, index, source)
    batches = [draw_views(config, source.token_size, world, number) for number in range(NUM_BATCHES)]
    yield Source(itertools.cycle(batches), task.inputs)


class _NoIndex:
    """Of so many images that nobody reads."""

    fingerprint = ""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images


def draw_views(config: Config, token_size: tuple[int, int], world: World, number: int) -> Batch:
    gen, sample = drawn(config, world, number)

    def view(size: tuple[int, int]) -> Tensor:
        return torch.randint(256, (len(sample), *size, 3), generator=gen, device=world.device, dtype=torch.uint8)

    return Batch(view(config.data.image_size), view(token_size), sample, torch.zeros_like(sample))


def random_tokenizer(config: Config, device: torch.device) -> Chosen:
    """OpenAI's size, and a narrow one beside a toy model; as a run has chosen it."""

    def no_decoder() -> Any:
        raise AssertionError("nothing is decoded")

    torch.manual_seed(config.seed)
    toy = TOY_TOKENIZER if device.type == "cpu" else {}
    dtype = encoding_dtype(config.tokenizer.precision, device)
    encoder = Encoder(Architecture(vocab_size=VOCAB_SIZE, **toy)).to(device)
    return Chosen(DiscreteVAE(encoder, no_decoder, "", dtype), NAMES[dtype], 1.0, "random weights")
