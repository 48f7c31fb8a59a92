"""Philox4x32-10 (Salmon et al., SC 2011) in PyTorch: random words from a counter, equal to Triton's `tl.philox`."""

from functools import lru_cache

import torch
from torch import Tensor

ROUNDS = 10
MASK32 = 0xFFFFFFFF
ROUND_KEYS = 0x9E3779B9, 0xBB67AE85
# scalars as tensors: PyTorch would make one of each Python number, at half the price of an operation on 1000 words
_MULTIPLIER0, _MULTIPLIER1, _LOW, _SHIFT = torch.tensor((0xD2511F53, 0xCD9E8D57, MASK32, 32), device="cpu").unbind()


@lru_cache(maxsize=4)
def _round_keys(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two scalars a round, made once a seed: making them takes a tenth of the time of 1000 words."""
    keys = (((seed >> 32 * half) + i * ROUND_KEYS[half]) & MASK32 for i in range(ROUNDS) for half in range(2))
    scalars = torch.tensor(list(keys), device="cpu").unbind()
    return list(zip(scalars[::2], scalars[1::2], strict=True))


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        seed: the 64-bit key.
        c0, c1, c2, c3: int64, the counter's words (their lower 32 bits); shapes that broadcast together.

    Returns:
        Four int64 tensors of that shape, in [0, 2**32).
    """
    c0, c2 = c0 & _LOW, c2 & _LOW
    for key0, key1 in _round_keys(seed):
        # 64-bit products wrap, and shift their sign in; c1 and c3 carry their upper halves along: only `_LOW` counts
        product0, product1 = c0 * _MULTIPLIER0, c2 * _MULTIPLIER1
        c0, c2 = (product1 >> _SHIFT) ^ c1, (product0 >> _SHIFT) ^ c3
        c0, c2 = c0.bitwise_xor_(key0).bitwise_and_(_LOW), c2.bitwise_xor_(key1).bitwise_and_(_LOW)
        c1, c3 = product1, product0
    return c0, c1 & _LOW, c2, c3 & _LOW
