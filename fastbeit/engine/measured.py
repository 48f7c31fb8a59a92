"""Rates that were measured, for plans; each stands in a file of benchmarks/results, which a test compares it with."""

from dataclasses import dataclass
from typing import Any

from fastbeit.config.pretrain import Config
from fastbeit.config.running import KernelsConfig
from fastbeit.config.sections import ModelConfig
from fastbeit.engine.cards import CARDS, Card

LARGE = ModelConfig(width=1024, depth=24, num_heads=16, mlp_width=4096)
# of a model, what changes its time; the rest are rates and the start
SHAPE = "width", "depth", "num_heads", "mlp_width", "patch_size", "relative_position", "absolute_position"


@dataclass(frozen=True)
class Step:
    """Forward, backward and AdamW on images that are on the card: our kernels, blocks compiled, bf16."""

    card: Card
    model: ModelConfig
    images: int  # of a micro-batch
    step_ms: float
    host_ms: float  # until it is enqueued


STEPS = (Step(CARDS["h100"], ModelConfig(), 256, 76.9, 36.0), Step(CARDS["h100"], LARGE, 128, 119.9, 59.0))
# images/s of OpenAI's dVAE, fp16, masked patches alone
TOKENIZED, TOKENIZED_ON, TOKENIZED_VIEW = 5830, CARDS["h100"], (112, 112)
HOST_MS = 3.0  # a block, that the host takes to enqueue a micro-batch: the larger of the two sizes

# images/s of a core of the torch pipeline, by views (token view and patch view, or that one alone) and jitter
PHOTOS = {  # JPEGs of 500 x 375; decoding processes and the one that takes their batches share two cores
    "two views": {"off": 364.9, "full_image": 280.4, "crop": 282.6},
    "one view": {"off": 449.8, "full_image": 350.6, "crop": 331.8},
}
LARGE_PHOTOS = {"off": 68.6, "full_image": 62.8, "crop": 61.4}  # JPEGs of 3 megapixels, two views, one process
SHARDED_PHOTOS = {"off": 366.6, "full_image": 299.3, "crop": 340.1}  # the same after `fastbeit shard`


def measured_step(config: Config, card: Card) -> Step | None:
    """None: a step of this configuration has not been timed on this card."""
    default = Config()
    if (
        config.engine.checkpoint_blocks
        or config.engine.compile == "off"
        or config.kernels != KernelsConfig()
        or (config.objective, config.num_slots) != (default.objective, default.num_slots)
        or config.data.image_size != default.data.image_size
        or not config.model.layer_scale
    ):
        return None
    shape = _shape(config.model)
    return next((step for step in STEPS if step.card is card and _shape(step.model) == shape), None)


def _shape(model: ModelConfig) -> list[Any]:
    return [getattr(model, name) for name in SHAPE]
