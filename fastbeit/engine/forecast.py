"""How long a step takes, before there is a card: compute, host and network (docs/planning.md).

A step whose kernels are ours and whose blocks are compiled takes a card

    images * (FLOPs / matrix rate + 4 * saved / memory bandwidth) + 28 * weights / memory bandwidth

FLOPs of an image: engine/work.py; saved: bytes that the forward of an image leaves to the backward (engine/memory.py),
each written once and read once, as its gradient is; 28: AdamW reads four and writes three float32 of a weight.
Launches, and a host that is late, are left out: a bound, not a forecast. The formula was written when both sizes had
been timed on an H100; it has no number that was fitted to them.

What cards send one another and to their hosts has never been timed: it is what DDP and DeepSpeed 0.19.8 send, by their
source, at assumed shares of data sheets.
"""

from dataclasses import dataclass

from fastbeit.config.running import EngineConfig
from fastbeit.engine.cards import Card

ADAMW_BYTES = 28  # of a weight
PASSES = 4  # over what is saved
RECOMPUTE_TIME = 1.25  # with engine.checkpoint_blocks; BEiT-B on an H100: 118.2 and 94.5 ms
LINK_SHARE = 0.8  # of a link's or a network's rate that a large all-reduce reaches; assumption
BACKWARD = 2 / 3  # of a micro-batch's time
HOST_MEMORY = 100e9  # bytes/s that AdamW reaches in a host's memory, all ranks of a node together; assumption


def step_ms(card: Card, num_images: int, flops: float, saved: int, num_weights: int) -> float:
    """Of a step on one card.

    Args:
        flops, saved: of an image.
    """
    of_image = flops / card.products + PASSES * saved / card.copy
    return 1e3 * (num_images * of_image + ADAMW_BYTES * num_weights / card.copy)


def exchange_passes(engine: EngineConfig, accumulate: int) -> int:
    """How often a step sends the bytes of all weights once around: an all-reduce 2 times, a gather or scatter once.

    DDP and stage 0 reduce gradients, once a step. Stage 1 also gathers the weights that were updated; stage 2 reduces
    in each micro-batch. DeepSpeed reduces on all ranks there, though each keeps its share alone
    (`use_multi_rank_bucket_allreduce`). Stage 3 scatters gradients, and gathers weights for forward and backward, in
    each micro-batch.
    """
    if engine.name != "deepspeed":
        return 2
    return {0: 2, 1: 2 + 1, 2: 2 * accumulate + 1, 3: 3 * accumulate}[engine.zero_stage]


def exchange_ms(card: Card, num_ranks: int, ranks_per_node: int, num_bytes: int, passes: int = 2) -> float:
    """Of so many passes of so many bytes, an all-reduce by default: (n - 1) / n of them pass the slowest link of a
    ring, each time.

    Within a node that is a card's link; between nodes also the adapters of a node, which share the ring.
    """
    rate = card.link if num_ranks <= ranks_per_node else min(card.link, card.network * ranks_per_node)
    return 1e3 * passes * (num_ranks - 1) / num_ranks * num_bytes / (LINK_SHARE * rate)


def offload_ms(
    card: Card, engine: EngineConfig, num_ranks: int, ranks_per_node: int, num_weights: int, accumulate: int
) -> float:
    """Of a rank's traffic with its host, and of the host's AdamW; 0 without offload. Nothing else runs meanwhile.

    Gradients go down in each micro-batch, and from the second on up before, to be added; updated weights go up.
    Offloaded weights go up for each gather instead.
    """
    if engine.offload == "none":
        return 0.0
    passes = 2 * accumulate if engine.offload == "optimizer" else 2 * accumulate - 1 + 2 * accumulate
    share = num_weights / num_ranks
    adamw = ADAMW_BYTES * share * min(num_ranks, ranks_per_node) / HOST_MEMORY
    return 1e3 * (passes * 4 * share / (LINK_SHARE * card.to_host) + adamw)


def overlap_ms(engine: EngineConfig, compute_ms: float, accumulate: int) -> float:
    """Of the card's work, in which an exchange may run: DDP's in the backward of the last micro-batch, that of stage 3
    all along, which gathers ahead; the other stages have none."""
    if engine.name != "deepspeed":
        return BACKWARD * compute_ms / accumulate
    return compute_ms if engine.zero_stage == 3 else 0.0


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step of one rank, all its micro-batches together."""

    compute_ms: float  # of the card for forward, backward and AdamW
    tokenizer_ms: float  # likewise for tokens on the fly; 0: they are stored
    host_ms: float  # until all is enqueued
    exchange_ms: float  # of gradients, and with ZeRO of weights
    window_ms: float  # of the card's work, in which the exchange may run
    offload_ms: float = 0.0  # beside which nothing runs

    @property
    def exposed_ms(self) -> float:
        """Of the exchange, what the card waits for."""
        return max(0.0, self.exchange_ms - self.window_ms)

    @property
    def total_ms(self) -> float:
        return max(self.compute_ms + self.tokenizer_ms, self.host_ms) + self.exposed_ms + self.offload_ms

    @property
    def without_overlap_ms(self) -> float:
        return max(self.compute_ms + self.tokenizer_ms, self.host_ms) + self.exchange_ms + self.offload_ms
