"""What an engine costs the host: milliseconds a step and memory of `single`, `ddp` and DeepSpeed's ZeRO 0 to 3.

    python -m benchmarks.engines [-o FILE]

The model has the tensors of BEiT-B, each of them small, so that the products take little and the work for each tensor,
operator and hook is what is timed (`small.py`). `ddp` and ZeRO have two ranks on this machine's CPU, that talk by gloo;
`single` is one process with as many images as one of those ranks has. All stay alive and take turns, in rounds; a
figure is the median over rounds, and a ratio to `ddp` that of the rounds' ratios, with their quartiles. First with a
step's images in one micro-batch, then in two.

A CPU with gloo tells the host's cost and memory, not the speed of a GPU, where computing and communication overlap.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median, quantiles

from benchmarks.card import cpu_name, environment
from benchmarks.engines.ranks import Facts, Ranks, Turn
from benchmarks.engines.small import NUM_IMAGES, NUM_RANKS
from benchmarks.results import Row, markdown, write_json
from fastbeit.errors import RunError

BASE = "ddp"
MICRO_BATCHES = 1, 2
COLUMNS = "engine", "ms a step", f"times {BASE}", "ms of the CPU", f"times {BASE}", "peak, MiB", "imports, MiB"


def play(micro_batches: int, num_rounds: int, num_steps: int) -> tuple[dict[str, Facts], dict[str, list[Turn]]]:
    """Facts of each engine, and its turns, one a round."""
    turns: dict[str, list[Turn]] = {engine: [] for engine in NUM_RANKS}
    with ExitStack() as stack:
        facts, ranks = {}, {}
        for engine in NUM_RANKS:
            ranks[engine] = stack.enter_context(closing(Ranks(engine, micro_batches)))
            # before the next one starts: all at once would take as long
            facts[engine] = ranks[engine].facts()
        for number in range(num_rounds):
            # there and back, so that nobody always follows the same one
            for engine in list(NUM_RANKS)[:: -1 if number % 2 else 1]:
                turns[engine].append(ranks[engine].turn(num_steps))
    return facts, turns


def summarise(facts: Mapping[str, Facts], turns: Mapping[str, Sequence[Turn]]) -> list[Row]:
    """A row an engine; ratios are of turns of the same round.

    `own_cpu_ms` is the CPU's time less that of the forward and backward of `single`: gradients' way, clipping and
    AdamW, hooks.
    """
    plain = [turn.gradient_cpu_ms for turn in turns["single"]]
    return [
        dict(
            engine=engine,
            ranks=NUM_RANKS[engine],
            **_compared("step_ms", "", mine, turns[BASE]),
            **_compared("cpu_ms", "cpu_", mine, turns[BASE]),
            own_cpu_ms=median(turn.cpu_ms - without for turn, without in zip(mine, plain, strict=True)),
            peak_mib=max(turn.peak_mib for turn in mine),
            imports_mib=facts[engine].imports_mib,
        )
        for engine, mine in turns.items()
    ]


def _compared(figure: str, prefix: str, mine: Sequence[Turn], base: Sequence[Turn]) -> Row:
    """The median of a figure; median and quartiles of its ratios to `base`."""
    ratios = [getattr(a, figure) / getattr(b, figure) for a, b in zip(mine, base, strict=True)]
    low, times, high = quantiles(ratios, n=4, method="inclusive")
    value = median(getattr(turn, figure) for turn in mine)
    return {figure: value, f"{prefix}times": times, f"{prefix}low": low, f"{prefix}high": high}


def table(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        wall, cpu = (
            f"{row[f'{prefix}times']:.2f} ({row[f'{prefix}low']:.2f} to {row[f'{prefix}high']:.2f})"
            for prefix in ("", "cpu_")
        )
        memory = (f"{row[key]:,.0f}" for key in ("peak_mib", "imports_mib"))
        return [row["engine"], f"{row['step_ms']:.1f}", wall, f"{row['cpu_ms']:.1f}", cpu, *memory]

    return markdown(COLUMNS, map(cells, rows))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines",
        description=__doc__,
        epilog="Takes three to four minutes on two cores, a third of it to start processes, and up to 5 GiB of RAM.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="in each of which every engine has a turn (9)")
    parser.add_argument("--steps", type=int, default=15, help="of a turn, whose median counts (15)")
    parser.add_argument("-o", "--json", type=Path, metavar="FILE", help="write the tables there too, as JSON")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds wants at least 2, for quartiles; got {args.rounds}")
    if args.steps < 1:
        parser.error(f"--steps wants at least 1; got {args.steps}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    # of the processes that are started
    os.environ |= dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    where = environment() | dict(cpu=cpu_name(), rounds=args.rounds, steps=args.steps, images=NUM_IMAGES)
    load, found = [os.getloadavg()[0]], []
    for micro_batches in MICRO_BATCHES:
        try:
            facts, turns = play(micro_batches, args.rounds, args.steps)
        except RunError as err:
            print(err, file=sys.stderr)
            return err.exit_code
        load.append(os.getloadavg()[0])
        where |= dict(tensors=facts[BASE].num_tensors, weights=facts[BASE].num_weights, load=load)
        rows = summarise(facts, turns)
        print(f"micro-batches: {micro_batches}", table(rows), sep="\n", flush=True)
        found += [dict(row, micro_batches=micro_batches) for row in rows]
    print(json.dumps(where))
    if args.json:
        write_json(args.json, where | dict(rows=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
