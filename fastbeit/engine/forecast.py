"""How long a step takes, before there is a card: compute, host and network (docs/planning.md).

A step whose kernels are ours and whose blocks are compiled takes a card

    images * (FLOPs / matrix rate + 4 * saved / memory bandwidth) + 28 * weights / memory bandwidth

FLOPs of an image: engine/work.py; saved: bytes that the forward of an image leaves to the backward (engine/memory.py),
each written once and read once, as its gradient is; 28: AdamW reads four and writes three float32 of a weight.
Launches, and a host that is late, are left out: a bound, not a forecast. The formula was written when both sizes had
been timed on an H100; it has no number that was fitted to them.
"""

from dataclasses import dataclass

from fastbeit.engine.cards import Card

ADAMW_BYTES = 28  # of a weight
PASSES = 4  # over what is saved
RECOMPUTE_TIME = 1.25  # with engine.checkpoint_blocks; BEiT-B on an H100: 118.2 and 94.5 ms
LINK_SHARE = 0.8  # of a link's or a network's rate that a large all-reduce reaches; assumption
BACKWARD = 2 / 3  # of a micro-batch's time


def step_ms(card: Card, num_images: int, flops: float, saved: int, num_weights: int) -> float:
    """Of a step on one card.

    Args:
        flops, saved: of an image.
    """
    of_image = flops / card.products + PASSES * saved / card.copy
    return 1e3 * (num_images * of_image + ADAMW_BYTES * num_weights / card.copy)


def exchange_ms(card: Card, num_ranks: int, ranks_per_node: int, num_bytes: int) -> float:
    """Of an all-reduce of so many bytes: 2 (n - 1) / n of them pass the slowest link of a ring.

    Within a node that is a card's link; between nodes also the adapters of a node, which share the ring.
    """
    rate = card.link if num_ranks <= ranks_per_node else min(card.link, card.network * ranks_per_node)
    return 1e3 * 2 * (num_ranks - 1) / num_ranks * num_bytes / (LINK_SHARE * rate)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step of one rank, all its micro-batches together."""

    compute_ms: float  # of the card for forward, backward and AdamW
    tokenizer_ms: float  # likewise for tokens on the fly; 0: they are stored
    host_ms: float  # until all is enqueued
    exchange_ms: float  # of gradients
    window_ms: float  # of the card's work, in which the exchange may run

    @property
    def exposed_ms(self) -> float:
        """Of the exchange, what the card waits for."""
        return max(0.0, self.exchange_ms - self.window_ms)

    @property
    def total_ms(self) -> float:
        return max(self.compute_ms + self.tokenizer_ms, self.host_ms) + self.exposed_ms

    @property
    def without_overlap_ms(self) -> float:
        return max(self.compute_ms + self.tokenizer_ms, self.host_ms) + self.exchange_ms
