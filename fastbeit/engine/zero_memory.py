"""What DeepSpeed's ZeRO holds of the weights on a rank: on its device, and in the host's memory.

Of n weights in float32 and m moments on R ranks, in bytes:

    stage      weights          gradients   masters, moments, and what moves
    0          4 n              4 n         4 m; gradients in one piece, while they travel
    1          4 n              4 n         (8 n + 4 m) / R: masters, this rank's sum of gradients, moments; buckets
    2          4 n              4 n / R     (4 n + 4 m) / R; buckets
    3          4 n / R + live   4 n / R     4 m / R: the weights are the masters; buckets

live: weights that are gathered, in float32, and those ahead also as they travel. Sizes of what moves: zero_sizes.py.
Offloaded, masters, moments and the sum of gradients are the host's, and with `weights` those too.

Read in DeepSpeed 0.19.8 with torch.autocast and AdamW on float32. Not measured, but that stage 3 gathers as many as it
may (two ranks on a CPU had as many at once as `stage3_max_live_parameters` says, and the persistent ones), and the
buckets of stages 1 and 2, which DeepSpeed's own code allocates in tests/engine/test_memory.py. What a step copies after
its backward is left out: the activations, which are more, are gone by then.
"""

from dataclasses import dataclass

from fastbeit.config.running import EngineConfig
from fastbeit.engine.zero_sizes import LIVE, SHARED_STATE, bucket_sizes

WEIGHT_BYTES = 4  # weights, gradients and moments are float32
ALL_REDUCED = 500_000_000  # values that stage 0 adds at a time, whatever its configuration says
BUFFERS = 2  # of a bucket in stages 1 and 2, for `overlap_comm` is on on CUDA: one fills while the other travels


@dataclass(frozen=True)
class Held:
    """Bytes of a rank: on its device, and at most in the host's memory."""

    weights: int
    gradients: int
    optimizer: int
    host: int


def held(
    engine: EngineConfig, *, num_weights: int, num_moments: int, largest: int, num_ranks: int, itemsize: int
) -> Held:
    """
    Args:
        largest: weights of the largest parameter.
        itemsize: bytes of a value in the precision of products.
    """
    whole, share = WEIGHT_BYTES * num_weights, WEIGHT_BYTES * num_weights // num_ranks
    moments, stage = WEIGHT_BYTES * num_moments // num_ranks, engine.zero_stage
    moving = _moving(stage, num_weights, num_ranks, itemsize)
    if stage == 0:
        return Held(whole, whole, WEIGHT_BYTES * num_moments + moving, 0)
    weights = share + _live(num_weights, itemsize) if stage == 3 else whole
    if engine.offload == "none":
        masters = 0 if stage == 3 else share  # there the weights are the masters
        gradients, summed = (whole, share) if stage == 1 else (share, 0)
        return Held(weights, gradients, masters + summed + moments + moving, 0)
    # masters, gradients as AdamW takes them and their sum over micro-batches; below stage 3 weights on their way back,
    # and on the device gradients on theirs
    host = moments + (3 if stage == 3 else 4) * share
    moving += 0 if stage == 3 else WEIGHT_BYTES * largest
    if engine.offload == "weights":
        weights, host = weights - share, host + share
    return Held(weights, whole if stage == 1 else 0, moving, host)


def _moving(stage: int, num_weights: int, num_ranks: int, itemsize: int) -> int:
    """Bytes of the buckets, and of what is copied from them during the backward."""
    if stage == 0:
        return WEIGHT_BYTES * min(num_weights, ALL_REDUCED) if num_ranks > 1 else 0
    bucket = bucket_sizes(num_weights, stage)["reduce_bucket_size"]
    lower = itemsize if itemsize < WEIGHT_BYTES else 0
    # a bucket for each dtype that gradients travel in
    if stage == 3:
        # one buffer each, overlapping or not, and a copy in the order of ranks
        return 2 * (WEIGHT_BYTES + lower) * bucket
    # all buffers are of float32, whatever travels. DeepSpeed copies a full bucket into one tensor, and that into the
    # dtype that travels, one bucket at a time; a model that fits into one bucket is copied after its backward
    copied = (WEIGHT_BYTES + lower) * bucket if num_weights > SHARED_STATE else 0
    return (2 if lower else 1) * BUFFERS * WEIGHT_BYTES * bucket + copied


def _live(num_weights: int, itemsize: int) -> int:
    """Bytes of the weights that are gathered at once in stage 3, at most."""
    ahead = bucket_sizes(num_weights, 3)["stage3_prefetch_bucket_size"]
    return WEIGHT_BYTES * min(num_weights, LIVE) + itemsize * ahead
