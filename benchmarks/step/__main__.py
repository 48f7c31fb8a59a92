"""A training step of BEiT: what it computes, and how long it takes.

    python -m benchmarks.step                     times, on CUDA; and what can be counted anywhere
    python -m benchmarks.step --peers             on the CPU, beside others' code
    python -m benchmarks.step --device cpu        a toy model, to see that all of it runs
    torchrun --nproc-per-node N -m benchmarks.step            N ranks, by DDP
    deepspeed --num_gpus N --module benchmarks.step           by DeepSpeed

A step is what the trainer does with a batch: forward, backward, sum over ranks, clipping, AdamW. Rates are medians.
"""

import argparse
import gc
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.card import environment
from benchmarks.results import Row, figures, first_line, write_json
from benchmarks.step import counts, training
from benchmarks.step.rates import ANCHORS
from benchmarks.step.sources import SOURCES
from benchmarks.step.variants import DEFAULT, SIZES, VARIANTS, Case
from benchmarks.step.warm import empty_caches, warm_start
from fastbeit.config.running import EngineConfig
from fastbeit.cores import num_cores
from fastbeit.engine.ranks import World, start_world
from fastbeit.process import leave

BATCHES = {"B": 256, "L": 128}  # images a rank and step: BEiT's 2048 on eight cards, and half of it
IMAGE_MIB = {"B": 128, "L": 352}  # about 100 and 260 that are saved for the backward in bfloat16, and room for the rest
TOY_BATCH = 4
PEER_IMAGES = 1


def fitting_batch(size: str) -> int:
    """Images a step that the free memory has room for, at most those of `BATCHES`."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(BATCHES[size], free // 2**20 // IMAGE_MIB[size] // 8 * 8))


def launched_engine() -> str:
    """Which engine the launcher is for: DeepSpeed's says how many machines there are by a name of its own."""
    if "RANK" not in os.environ:
        return "single"
    return "deepspeed" if "CROSS_SIZE" in os.environ else "ddp"


def cases(args: argparse.Namespace, world: World) -> Iterator[Case]:
    """Sizes in turn, and of each all variants."""
    settings = list(args.set)
    if args.source.startswith("jpeg"):
        settings.insert(0, f"data.num_workers={max(1, num_cores() // world.size)}")
    for size in args.size:
        batch = args.batch or (TOY_BATCH if args.device == "cpu" else min(world.gather([fitting_batch(size)])))
        for name in args.variants:
            yield Case(size, VARIANTS[name], batch, world.size, launched_engine(), args.device, tuple(settings))


def timed(args: argparse.Namespace, world: World) -> Iterator[Row]:
    """A row for each case; what goes wrong with one is its row, and the next one has its turn."""
    for number, case in enumerate(cases(args, world)):
        row: Row = dict(case.facts, steps=args.steps)
        try:
            row |= training.measure(case, world, args.steps, args.source)
        # a kernel that this card refuses costs its own row, not those of the others; of several ranks all shall end
        except Exception as err:
            if world.size > 1:
                raise
            row["error"] = told(err, case.batch)
        free_memory()
        wants_warm = number == 0 and case.variant.compiled and args.steps > 1 and "error" not in row
        if wants_warm and world.size == 1 and args.device == "cuda":
            row |= warm_start(case)
        yield row


def told(err: Exception, batch: int) -> str:
    if isinstance(err, torch.OutOfMemoryError):
        return f"a batch of {batch} does not fit into the memory of this card; try --batch {max(1, batch // 2)}"
    return first_line(err)


def free_memory() -> None:
    """Nothing that a variant compiled or allocated is left to the next."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(rows: Iterable[Row], world: World, file: Path | None) -> int:
    """Print and keep each row as it comes, on the first rank; the exit code."""
    where, found = dict(environment(), anchors=ANCHORS), []
    if world.rank == 0:
        print(json.dumps(where))
    for row in rows:
        found.append(row)
        if world.rank == 0:
            print(f"{row['case']:64} {figures(row)}", flush=True)
            if file:
                write_json(file, dict(where, rows=found))
    if world.rank == 0 and any("step_ms" in row for row in found):
        for anchor in ANCHORS:
            print(f"others: {anchor['who']}, {anchor['what']}: {figures(anchor)}")
    return int(any("error" in row or "wrong" in row for row in found))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=summary)
    parser.add_argument("--size", nargs="+", choices=SIZES, help="of the model (default: all; of --peers: B)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a toy model (default: cuda)")
    parser.add_argument(
        "--variants", nargs="+", choices=(*VARIANTS, "all"), default=list(DEFAULT), metavar="NAME",
        help=f"of {', '.join(VARIANTS)}; all (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="ratios to others' forward and backward, on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="of --peers (7)")
    parser.add_argument("--source", choices=SOURCES, default="synthetic", help="of a step's inputs (synthetic)")
    parser.add_argument("--steps", type=int, default=50, help="that are timed; 1: the first alone (default: 50)")
    parser.add_argument("--batch", type=int, help=f"images a rank and step (default: {BATCHES}, or what has room)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the trainer's configuration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args, others = parser.parse_known_args(argv)
    # the deepspeed launcher says it to every program; ranks are read from the environment
    if unknown := [word for word in others if not word.startswith("--local_rank")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if min(args.steps, args.batch or 1) < 1:
        parser.error("--steps and --batch want at least 1")
    args.size = args.size or (["B"] if args.peers else list(SIZES))
    if "all" in args.variants:
        args.variants = list(VARIANTS)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.peers:
        from benchmarks.step import peers

        found = (row for size in args.size for row in peers.rows(size, args.batch or PEER_IMAGES, args.rounds))
        return report(found, World(0, 1, torch.device("cpu")), args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device to take steps on, so this is what can be counted; --device cpu runs a toy model")
        return report(counts.rows(args.size), World(0, 1, torch.device("cpu")), args.json)
    with empty_caches():
        world = start_world(EngineConfig.model_validate(dict(device=args.device)))
        found: Iterable[Row] = timed(args, world)
        # last, for they are the same wherever they are counted
        if args.device == "cuda" and world.size == 1 and args.steps > 1:
            found = itertools.chain(found, counts.rows(args.size))
        code = report(found, world, args.json)
    world.leave()
    return code


if __name__ == "__main__":
    leave(main())
