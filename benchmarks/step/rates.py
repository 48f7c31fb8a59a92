"""Work and the rate at which it is done: FLOPs of an image, MFU, and others' figures to stand beside ours.

FLOPs are those of the products of matrices in a forward and a backward, without recomputation. An MFU uses what our
step computes, whose last block and head work on masked slots alone (104.1 G an image of BEiT-B); the authors' step,
whose last block works on all patches, has 108.0 G, by which the same step would have 4 % more "MFU".
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.predictions import Chip
from benchmarks.results import Row
from fastbeit.config.pretrain import Config
from fastbeit.config.running import KernelsConfig
from fastbeit.engine.forecast import step_ms
from fastbeit.engine.memory import count_weights, footprint
from fastbeit.model.attention import take
from fastbeit.model.beit import Beit, make_beit

VOCAB_SIZE = 8192
ANCHORS: tuple[Row, ...] = (
    dict(who="nvSubquadratic", what="ViT-B class on an H100, with data", images_per_s=2119),
    dict(who="stable-pretraining", what="ViT-L, compute only", mfu=0.36),
)


@dataclass(frozen=True)
class Work:
    """Of an image's share of a step in bfloat16, and of the model."""

    flops: int
    saved: int  # bytes
    num_weights: int

    def step_ms(self, chip: Chip, num_images: int) -> float:
        """Predicted, of a step on one card."""
        return step_ms(chip.card, num_images, self.flops, self.saved, self.num_weights)


def work_of(config: Config) -> Work:
    found = footprint(config, num_outputs=VOCAB_SIZE, token_size=None, num_ranks=1, itemsize=2)
    return Work(model_flops(config), found.saved, count_weights(config, VOCAB_SIZE))


def model_flops(config: Config, authors: bool = False) -> int:
    """Of an image, forward and backward, counted on tensors without memory.

    Args:
        authors: their way: all blocks work on all patches, the head on masked ones.
    """
    plain = config.model_copy(update=dict(kernels=KernelsConfig(backend="reference")))
    with torch.device("meta"):
        model = make_beit(plain, VOCAB_SIZE)
        images = torch.zeros(1, *config.data.image_size, 3, dtype=torch.uint8)
        masked = torch.zeros(1, config.num_patches, dtype=torch.bool)
        slots = torch.zeros(1, config.num_slots, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = _authors_logits(model, images, masked, slots) if authors else model.logits(images, masked, slots)
        logits.sum().backward()
    return counter.get_total_flops()


def _authors_logits(model: Beit, images: Tensor, masked: Tensor, slots: Tensor) -> Tensor:
    x = model.encode(model.embed(images, masked, model.mask_token.flatten()))
    return model.lm_head(take(model.norm(x[:, 1:]), slots))
