"""What the pages of all runs have in common: where they are written, and how they look. HTML that needs no network."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from fastbeit.errors import USAGE, RunError, writing
from fastbeit.files import try_to_write

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
.lead { font-size: 1.15rem; max-width: 46rem } .quiet { opacity: .7; font-size: .9rem; max-width: 52rem }
img { width: 100%; height: auto; background: #fff; border-radius: 6px } img.narrow { max-width: 46rem }
img.own { width: auto; max-width: 100% }
table { border-collapse: collapse } th { text-align: left; font-weight: 600 }
td, th { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { overflow-x: auto; padding: 1rem; border-radius: 6px; background: #8881; font-size: .85rem }
"""


def import_pictures() -> ModuleType:
    """
    Raises:
        RunError: matplotlib is missing (2).
    """
    try:
        from fastbeit.evaluate import pictures
    except ImportError as err:
        raise RunError(f"the report wants matplotlib ({err}); pip install 'fastbeit[demo]'", USAGE) from None
    return pictures


def places(run_folder: Path, page: Path | None) -> tuple[Path, Path]:
    """Where the page goes, RUN/report.html when None, and RUN/report for its parts.

    Raises:
        RunError: one of them cannot be written (74): not to find out after all is measured.
    """
    page, folder = page or run_folder / "report.html", run_folder / "report"
    with writing(f"the report of '{run_folder}'"):
        for path in page, folder / "report.json":
            try_to_write(path)
    return page, folder


def document(run_folder: Path, heading: str, lead: str, body: str) -> str:
    """
    Args:
        body: HTML; the other texts are not.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fastbeit: {escape(run_folder.name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(heading)}</h1>
<p class="lead">{escape(lead)}</p>
{body}</body></html>
"""


def picture(path: Path, what: str, kind: str = "") -> str:
    """A PNG file, in the page itself."""
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f'<img class="{kind}" alt="{escape(what)}" src="{source}">\n'


def note(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>\n'


def table(header: Iterable[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """
    Args:
        num_texts: columns before those of numbers.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[:num_texts])
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[num_texts:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>\n"


def settings(config: Any) -> str:
    """All of a `Section`."""
    return f"<pre>{escape(yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False))}</pre>\n"


def versions(state: dict[str, Any]) -> str:
    """That a checkpoint was made by."""
    return ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())


def attention_part(path: Path, block: int, depth: int) -> str:
    return (
        "<h2>Where it looks</h2>\n"
        + picture(path, "a map for each head and each marked patch", "own")
        + note(
            f"Self-attention of block {block}, of 0 to {depth - 1}. A row shows what each head attends to from the "
            "marked patch, in a whole image: the share of each patch, from black for none to the brightest for the "
            "largest of this map. What is missing to 1 goes to the cls token. Other patches: --points ROW,COLUMN; "
            "other blocks: --block N."
        )
    )
