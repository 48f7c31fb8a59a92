"""What `fastbeit doctor --tune` times, for BEiT-B with 256 images on one card; keeps no table.

python -m benchmarks.tune [--json FILE]     without a card a toy model, by the interpreter where there is one
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.card import environment
from benchmarks.results import Row, keep
from benchmarks.step.rates import VOCAB_SIZE
from benchmarks.step.variants import TOY
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.health.operators import operator
from fastbeit.health.tuning import ATTENTIONS, chosen, timings

PAIRS = [*(("attention", name) for name in ATTENTIONS), ("loss", "triton")]


def rows(config: Config, device: torch.device) -> Iterator[Row]:
    """A row for each choice, those of a setting together; last what a run would take."""
    right = []
    for pair in PAIRS:
        found = operator(pair, config, VOCAB_SIZE, device)
        if found.state == "runs":
            right.append(found.name)
        else:
            yield dict(case=found.name, left_out=found.why)
    timed = []
    for one in timings(config, VOCAB_SIZE, 1, device, right):
        timed.append(one)
        row: Row = dict(case=f"kernels.{one.setting}={one.choice or 'default'}")
        yield row | (dict(error=one.why) if one.ms is None else dict(ms=one.ms))
    default = "triton" if "attention triton" in right else "sdpa"
    for setting, choice in chosen(timed, default).items():
        yield dict(case=f"{setting}: what a run would take", choice=choice or "default")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = ["optim.batch_size=256", *(TOY if device.type == "cpu" else ())]
    found = keep(rows(configure(Config, settings), device), environment(), args.json)
    return int(not any("ms" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
