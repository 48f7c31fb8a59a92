"""Checksums of large files by blocks, so that a start can compare some of them."""

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 1 << 20  # that have a checksum
SAMPLED_BLOCKS = 64  # of a large file, at each start: some hundredths of a second


class Checked(NamedTuple):
    """How much of a file was compared with its checksums, and the first place that differs."""

    num_blocks: int
    of: int
    damaged: tuple[str, int] | None  # name of the part, and first byte in it

    def __str__(self) -> str:
        return f"{self.num_blocks:,} of {self.of:,} MiB compared with their checksums"


def block_sums(data: np.ndarray) -> list[int]:
    """The CRC-32 of each MiB of an array's bytes."""
    return [_sum(data, block) for block in range(-(-data.nbytes // BLOCK_BYTES))]


def check_blocks(parts: dict[str, np.ndarray], sums: Mapping[str, Sequence[int]]) -> Checked:
    """Compare arrays with `block_sums` of them: whole where they are small, else blocks that each call draws anew."""
    blocks = [(name, block) for name, data in parts.items() for block in range(-(-data.nbytes // BLOCK_BYTES))]
    chosen = blocks if len(blocks) <= SAMPLED_BLOCKS else random.Random().sample(blocks, SAMPLED_BLOCKS)
    for name, block in chosen:
        wanted = sums.get(name, [])
        if block >= len(wanted) or _sum(parts[name], block) != wanted[block]:
            return Checked(len(chosen), len(blocks), (name, block * BLOCK_BYTES))
    return Checked(len(chosen), len(blocks), None)


def _sum(data: np.ndarray, block: int) -> int:
    return zlib.crc32(data.reshape(-1).view(np.uint8)[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].data)
