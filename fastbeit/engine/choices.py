"""The engines that a pre-training can take, and how its step lies in the memory of a card with each."""

import math
from dataclasses import dataclass
from typing import Any

from fastbeit.config.pretrain import Config
from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import Size
from fastbeit.config.tokenizer import Architecture
from fastbeit.engine.cards import Card
from fastbeit.engine.memory import Footprint, expected_room, fewest, footprint

DVAE = Architecture()  # OpenAI's, of the paper
SHARING = 1, 2, 3  # stages of ZeRO


@dataclass(frozen=True)
class Fitted:
    """How a step lies in the memory of a card."""

    engine: str
    footprint: Footprint
    accumulate: int
    micro_batch: int
    peak_bytes: int
    fits: bool


def choices(config: Config, card: Card, num_ranks: int) -> list[Fitted]:
    """DDP, ZeRO's stages that share, and what the configuration asks for, if that is none of them."""
    zero = [dict(name="deepspeed", zero_stage=stage, offload="none") for stage in SHARING]
    found = [fit(config, card, num_ranks, **engine) for engine in (dict(name="ddp", offload="none"), *zero)]
    own = fit(config, card, num_ranks)
    return found if own in found else [*found, own]


def row_of(engine: EngineConfig) -> str:
    """The engine's name among `choices`; `auto` and `single` take what `ddp` takes."""
    if engine.name != "deepspeed":
        return "ddp"
    return f"ZeRO-{engine.zero_stage}" + (", offload" if engine.offload != "none" else "")


def fit(config: Config, card: Card, num_ranks: int, **engine: Any) -> Fitted:
    """With some settings of the engine in place of the configuration's."""
    images, room = config.optim.batch_size // num_ranks, expected_room(card.memory_gib)
    found, wanted = footprint_of(config, num_ranks, **engine), config.optim.accumulate
    accumulate = fewest(images, found, room) if wanted == "auto" else wanted
    peak = found.peak(images // accumulate)
    name = row_of(config.engine.model_copy(update=engine))
    return Fitted(name, found, accumulate, images // accumulate, peak, peak <= room)


def footprint_of(config: Config, num_ranks: int, **engine: Any) -> Footprint:
    """In bf16, with tokens on the fly; settings of the engine as for `fit`."""
    changed = config.model_copy(update={"engine": config.engine.model_copy(update=engine)})
    return footprint(
        changed,
        num_outputs=num_outputs(config),
        token_size=token_size(config),
        num_ranks=num_ranks,
        itemsize=2,
    )


def num_outputs(config: Config) -> int:
    """V, or P where pixels are regressed."""
    return DVAE.vocab_size if config.objective == "tokens" else 3 * math.prod(config.model.patch_size)


def token_size(config: Config) -> Size | None:
    """Of the token view, in pixels; None where no tokens are predicted."""
    down, across = config.grid
    return (down * DVAE.stride, across * DVAE.stride) if config.objective == "tokens" else None
