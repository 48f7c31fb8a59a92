"""What a first hour on a card shall answer: settings and plans that only measuring can decide; torch and triton alone.

    python -m benchmarks.first_hour [sdpa] [attention] [linear_cross_entropy] [cross_entropy] [masked_embed] [host]
                                    [--json FILE] [--seconds N] [--rounds N]                    wants CUDA

Without names it asks all. Each case is checked against float64 before it is timed, where it has a reference. A case
that fails, as a refused SDPA backend or too large a tile does, is a row that says so. The file holds all rows so far.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import environment
from benchmarks.first_hour.attention import attention, sdpa
from benchmarks.first_hour.bench import Bench, Question
from benchmarks.first_hour.embed import masked_embed
from benchmarks.first_hour.losses import cross_entropy, host, linear_cross_entropy
from benchmarks.results import Row, figures, first_line, write_json
from fastbeit_kernels.backend import INTERPRETED

# in the order of what their answers are worth
QUESTIONS: dict[str, Question] = {
    question.__name__: question
    for question in (sdpa, attention, linear_cross_entropy, cross_entropy, masked_embed, host)
}


def answers(names: Iterable[str], bench: Bench) -> Iterator[Row]:
    """Rows of one question after the other; one that cannot go on leaves an error, and the next is asked."""
    for name in names:
        print(f"\n{name}: {inspect.getdoc(QUESTIONS[name])}\n", flush=True)
        try:
            for row in QUESTIONS[name](bench):
                yield dict(question=name) | row
        # whatever went wrong with this question, the others are asked
        except Exception as err:
            yield dict(question=name, case="the question", error=first_line(err))
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def ask(
    names: Iterable[str], bench: Bench, where: dict[str, Any], file: Path | None, seconds: float = float("inf")
) -> list[Row]:
    """Print and keep each answer as it comes; after `seconds` no further case is begun."""
    rows: list[Row] = []
    deadline = time.monotonic() + seconds
    for row in answers(names, bench):
        rows.append(row)
        print(f"{row['case']:64} {figures(row)}", flush=True)
        if file:
            write_json(file, dict(where, rows=rows))
        if time.monotonic() > deadline:
            print(f"stopped after {seconds:.0f} s; what comes after is not asked")
            break
    return rows


def failed(rows: list[Row]) -> bool:
    """A result was wrong, or a question has no answer but errors: those are many a row's honest answer."""
    answered = {row["question"] for row in rows if "us" in row}
    return any("wrong" in row or row["question"] not in answered for row in rows)


def main(argv: list[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_hour", description=summary)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=Bench.rounds, help="times that each case is timed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args = parser.parse_args(argv)
    if unknown := set(args.questions) - set(QUESTIONS):
        parser.error(f"no question {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    if not torch.cuda.is_available():
        print("no CUDA device to ask; tests ask the same of Triton's interpreter, without times", file=sys.stderr)
        return 2
    if INTERPRETED:
        parser.error("kernels are interpreted: unset TRITON_INTERPRET")
    where = environment()
    print(json.dumps(where))
    return int(failed(ask(args.questions or QUESTIONS, Bench(rounds=args.rounds), where, args.json, args.seconds)))


if __name__ == "__main__":
    sys.exit(main())
