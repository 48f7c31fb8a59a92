"""What a benchmark leaves behind: rows as JSON that is whole at any moment, as lines and as a Markdown table.

A row is a dict: words that say what was measured, figures under names that end in their unit, or `error` or `wrong`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastbeit.files import aside, put_in_place

Row = dict[str, Any]

MAX_ERROR = 200  # characters

# how a figure is said, in the order of a line
FIGURES = {
    "us": "{:,.1f} us",
    "host_us": "host {:,.0f} us",
    "ms": "{:,.3f} ms",
    "step_ms": "{:,.2f} ms a step",
    "predicted_ms": "predicted {:,.1f} ms",
    "p95_ms": "p95 {:,.2f} ms",
    "host_ms": "host {:,.1f} ms",
    "images_per_s": "{:,.0f} img/s",
    "all_images_per_s": "all ranks {:,.0f} img/s",
    "tflop_per_s": "{:,.1f} TFLOP/s",
    "mfu": "MFU {:.1%}",
    "gb_per_s": "{:,.0f} GB/s",
    "gflop_per_image": "{:,.1f} GFLOP an image",
    "gflop_per_image_authors": "the authors' way {:,.1f}",
    "operations": "{:,} operations a step",
    "read_mb_per_image": "{:,.0f} MB an image read",
    "written_mb_per_image": "{:,.0f} MB written",
    "saved_mib": "{:,.0f} MiB kept for the backward",
    "cpu_ms": "{:,.1f} ms of the CPU",
    "times": "{:.2f} times ours",
    "low": "quartiles {:.2f}",
    "high": "{:.2f}",
    "left_out": "left out: {}",
    "predicted_ms_H100": "H100 predicted {:,.1f} ms a step",
    "predicted_ms_A100": "A100 {:,.1f} ms",
    "peak_mib": "{:,.0f} MiB",
    "first_step_s": "first step {:,.1f} s",
    "warm_start_s": "with what it compiled {:,.1f} s",
    "no_warm_start": "no warm start: {}",
    "data_wait_share": "waits for data {:.1%}",
    "attention": "attention by {}",
    "loss": "loss {:.4f}",
    "first": "in the first step they differ by {:.1e} of it",
    "last": "at the end by {:.1e}",
    "speedup": "{:.2f} times fp32",
    "patch_view_db": "patch view {:.1f} dB",
    "token_view_db": "token view {:.1f} dB",
    "same_tokens": "{:.2%} of tokens the same",
    "choice": "{}",
    "found": "{}",
    "sdpa": "SDPA takes {}",
    "wrong": "wrong: {}",
    "error": "{}",
}


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename: whoever reads, and whoever ends this process, finds the file before or the file after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside(path).write_text(json.dumps(value, indent=1) + "\n")
    put_in_place(path)


def first_line(err: BaseException) -> str:
    """An error's type and the first line of what it says, cut where it goes on for long."""
    return ": ".join([type(err).__name__, *str(err).strip().splitlines()[:1]])[:MAX_ERROR]


def keep(rows: Iterable[Row], where: dict[str, Any], file: Path | None) -> list[Row]:
    """Print and write each row as it comes: what is there when time runs out stays."""
    print(json.dumps(where))
    found: list[Row] = []
    for row in rows:
        found.append(row)
        print(f"{row['case']:64} {figures(row)}", flush=True)
        if file:
            write_json(file, dict(where, rows=found))
    return found


def figures(row: Row) -> str:
    return ", ".join(form.format(row[name]) for name, form in FIGURES.items() if row.get(name) is not None)


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table, its columns aligned, so that it can be read in a terminal too."""
    cells = [[cell.replace("|", "/") for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
