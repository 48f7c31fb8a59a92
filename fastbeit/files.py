"""Files that are whole or not there, and their checksums."""

import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK_BYTES = 1 << 20  # that have a checksum
SAMPLED_BLOCKS = 64  # of a large file, at each start: some hundredths of a second


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; lines that a kill or a disk has damaged are passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside(path: Path) -> Path:
    """Where to write what `put_in_place` then renames to `path`."""
    return path.with_name(f".{path.name}.part")


def put_in_place(path: Path) -> None:
    """Rename the finished `aside(path)` to `path`: a reader sees the old file or the new one."""
    # without the sync a power cut can leave the new name on an empty file
    sync(aside(path))
    share(aside(path))
    os.replace(aside(path), path)


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors writes files that their owner alone can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
