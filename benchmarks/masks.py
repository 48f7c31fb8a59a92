"""Masks a second on one core: `python -m benchmarks.masks [--json FILE]`.

The authors' algorithm one mask at a time, as in their data loader, against a whole batch at once. The two run in turn;
medians over the rounds, and the spread between the fastest and the slowest.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbeit.masking import blockwise_mask
from fastbeit_kernels.block_masks import block_masks, random_masks

GRID, NUM_MASKED, MIN_BLOCK, MIN_ASPECT = (14, 14), 75, 16, 0.3
BATCHES = 256, 2048  # images of a rank, and of BEiT's whole batch
A_TURN = 4096  # masks, so that what a turn finds in the caches is its own
ROUNDS = 9


def batched(masks: Callable, batch: int) -> Callable[[int], int]:
    sample = torch.arange(batch)

    def draw(turn: int) -> int:
        for epoch in range(turn * A_TURN // batch, (turn + 1) * A_TURN // batch):
            masks(0, torch.full_like(sample, epoch), sample, GRID, NUM_MASKED)
        return A_TURN

    return draw


def one_by_one(rng: random.Random) -> Callable[[int], int]:
    def draw(turn: int) -> int:
        for _ in range(A_TURN):
            blockwise_mask(rng, GRID, NUM_MASKED, MIN_BLOCK, MIN_ASPECT)
        return A_TURN

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contestants = {"blockwise, one by one (authors' algorithm)": one_by_one(random.Random(0))}
    for batch in BATCHES:
        contestants[f"blockwise, batch of {batch}"] = batched(block_masks, batch)
        contestants[f"random, batch of {batch}"] = batched(random_masks, batch)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(args.rounds + 1):
        for name, draw in contestants.items():
            start = time.process_time()
            num_masks = draw(turn)
            # the first round warms up
            if turn:
                rates[name].append(num_masks / (time.process_time() - start))
    rows: list[dict[str, Any]] = [
        dict(name=name, masks_per_s=statistics.median(found), slowest=min(found), fastest=max(found))
        for name, found in rates.items()
    ]
    print(f"{'masks of 75 in 14 x 14, one core':44} {'masks/s':>10} {'slowest':>10} {'fastest':>10} {'times':>6}")
    for row in rows:
        times = row["masks_per_s"] / rows[0]["masks_per_s"]
        print(
            f"{row['name']:44} {row['masks_per_s']:10,.0f} {row['slowest']:10,.0f} {row['fastest']:10,.0f} {times:6.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
