"""Every random number of a run, from a counter: order, crop, flip, jitter, masks, drop path (design D1).

Philox4x32-10 (Salmon et al., SC 2011), the generator behind Triton's `tl.rand`: the key is the run's seed, the counter says
what the number is for. A number is therefore the same on any rank, in any worker, before and after a resume, and a Triton
kernel draws it with `tl.philox(seed, draw, purpose, epoch, sample)`.
"""

from enum import IntEnum

import numpy as np

ROUND_KEYS = 0x9E3779B9, 0xBB67AE85
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
MASK32 = np.uint64(0xFFFFFFFF)


class Purpose(IntEnum):
    """The second counter word: numbers for different ends never meet."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    JITTER = 3
    MASK = 4
    DROP_PATH = 5


def philox(seed: int, draw, purpose, epoch, sample) -> np.ndarray:
    """Four random words for each counter.

    Args:
        seed: the 64-bit key.
        draw, purpose, epoch, sample: the counter's four 32-bit words; integers or arrays that broadcast together.

    Returns:
        [..., 4] uint64 array of values below 2**32, equal to `tl.philox(seed, draw, purpose, epoch, sample)`.
    """
    words = np.broadcast_arrays(*(np.asarray(word).astype(np.uint64) & MASK32 for word in (draw, purpose, epoch, sample)))
    c0, c1, c2, c3 = words
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            product1 & MASK32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            product0 & MASK32,
        )
        key0, key1 = (key0 + ROUND_KEYS[0]) & 0xFFFFFFFF, (key1 + ROUND_KEYS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniform(seed: int, purpose: Purpose, epoch, sample, num_draws: int, first_draw: int = 0) -> np.ndarray:
    """Numbers in [0, 1) for each sample.

    Args:
        epoch, sample: [n] integers, or one integer each.
        num_draws: numbers a sample; number k comes from word k % 4 of counter k // 4.
        first_draw: the number to begin with, a multiple of 4.

    Returns:
        [n, num_draws] float64, multiples of 2**-32.
    """
    epoch, sample = np.broadcast_arrays(np.atleast_1d(epoch), np.atleast_1d(sample))
    draw = np.arange(first_draw // 4, (first_draw + num_draws + 3) // 4)
    words = philox(seed, draw, int(purpose), epoch[:, None], sample[:, None])  # [n, draws, 4]
    return words.reshape(len(sample), -1)[:, :num_draws] * 2.0**-32
