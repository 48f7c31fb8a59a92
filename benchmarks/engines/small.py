"""BEiT-B with every width, the vocabulary and the patch's side divided by 16: its tensors by name and number, hardly
any arithmetic.

What a step of it takes is what the host does for each tensor, operator and hook, however large they are. Matrices have
a 256th of their weights, and so have the buffers of ZeRO-3 (`zero3.json`): it shares out just the tensors that it would
of BEiT-B, and gathers as many of them ahead.
"""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step.drawn import draw_inputs
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.engine.ranks import World
from fastbeit.masking import UNUSED

NUM_RANKS = {"single": 1, "ddp": 2, "zero0": 2, "zero1": 2, "zero2": 2, "zero3": 2}  # by engine
NUM_IMAGES = 2  # a rank and step
NUM_WORDS = 512
ZERO3 = Path(__file__).with_name("zero3.json")
SMALL = (
    "model.width=48",
    "model.mlp_width=192",
    "model.patch_size=4",
    "data.image_size=16",
    "masking.num_masked=6",
    "masking.min_block=2",
    "kernels.backend=reference",
    "engine.device=cpu",
)


def config_of(engine: str, micro_batches: int) -> Config:
    """The trainer's, for a name of `NUM_RANKS`."""
    name, _, stage = engine.partition("zero")
    zero = [f"engine.zero_stage={stage}"] if stage else []
    if stage == "3":
        zero.append(f"engine.deepspeed_config={ZERO3}")
    batch = [f"optim.batch_size={NUM_IMAGES * NUM_RANKS[engine]}", f"optim.accumulate={micro_batches}"]
    return configure(Config, [*SMALL, *batch, f"engine.name={name or 'deepspeed'}", *zero])


def inputs_of(config: Config, world: World) -> tuple[tuple[Tensor, ...], Tensor]:
    """A rank's images with their labels, and how many labels all ranks have."""
    images, masked, slots, labels, keep = draw_inputs(config, world, 0)
    labels = torch.where(labels == UNUSED, labels, labels % NUM_WORDS)
    return (images, masked, slots, labels, keep), world.add((labels != UNUSED).sum())
