"""Random inputs of a timed step, and what a source of inputs is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.rates import VOCAB_SIZE
from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.data.sampling import drop_path_keep
from fastbeit.engine.ranks import World

NUM_BATCHES = 4  # that take turns

Inputs = tuple[Tensor, ...]  # as `Beit.forward` takes them
Ready = tuple[Inputs, Tensor]  # and what the loss is divided by, of this rank


@dataclass(frozen=True)
class Source:
    """Batches, which a step may have to wait for, and how one becomes the inputs of step number so and so."""

    batches: Iterator[Any]
    inputs: Callable[[Any, int], Ready]


def draw_inputs(config: Config, world: World, number: int) -> Inputs:
    device, (height, width) = world.device, config.data.image_size
    gen, sample = drawn(config, world, number)
    B = len(sample)
    images = torch.randint(256, (B, height, width, 3), generator=gen, device=device, dtype=torch.uint8)
    words = torch.randint(VOCAB_SIZE, (B, config.num_patches), generator=gen, device=device)
    ids = sample.to(device)
    slots = masking.draw(masking.rule_of(config), torch.zeros_like(ids), ids)
    labels = masking.label(slots, words.gather(1, slots.predict_idx))
    keep = torch.from_numpy(drop_path_keep(config.seed, number, sample.numpy(), config.model.drop_rates))
    return images, slots.masked, slots.predict_idx, labels, keep.to(device)


def drawn(config: Config, world: World, number: int) -> tuple[torch.Generator, Tensor]:
    """Random numbers of a rank's batch, and its images' places."""
    B = config.optim.batch_size // world.size
    number = number * world.size + world.rank
    return torch.Generator(world.device).manual_seed(number), torch.arange(B) + number * B
