"""The page of a run: what it learnt, measured on held-out images and drawn; one HTML file that needs no network."""

import base64
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path

import yaml

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.given import indexed_for_now
from fastbeit.errors import DONE, USAGE, RunError, writing
from fastbeit.evaluate.finished_run import Figures, Moved, Trained, measure, open_run
from fastbeit.files import read_records, try_to_write, write_whole


def report(run_folder: Path, page: Path | None, num_crops: int, moved: Moved | None = None) -> int:
    """Write the page and say what it says first; returns the exit code.

    Args:
        moved: what lies elsewhere than when the run was trained; of images also a source, which is indexed for this.
            Others as of `write_report`.
    """
    moved = moved or Moved()
    images = {"index": str(moved.index or ""), "val_index": str(moved.val_index or "")}
    with indexed_for_now(DataConfig().model_copy(update=images)) as data:
        index, val_index = (Path(path) if path else None for path in (data.index, data.val_index))
        written, figures = write_report(run_folder, page, num_crops, Moved(moved.tokenizer, index, val_index))
    print(f"{verdict(figures)}\nreport: {written}")
    return DONE


def write_report(
    run_folder: Path, page: Path | None, num_crops: int, moved: Moved | None = None
) -> tuple[Path, Figures]:
    """Measure and draw a run: PNG files and `report.json` in RUN/report, and one self-contained HTML page.

    Args:
        page: where the page goes; RUN/report.html when None.
        num_crops: crops that each figure is measured on.

    Raises:
        RunError: as `open_run`; matplotlib is missing (2); the page or a file of RUN/report cannot be written (74).
    """
    try:
        from fastbeit.evaluate import pictures
    except ImportError as err:
        raise RunError(f"the report wants matplotlib ({err}); pip install 'fastbeit[demo]'", USAGE) from None
    page = page or run_folder / "report.html"
    run, folder = open_run(run_folder, moved), run_folder / "report"
    with writing(f"the report of '{run_folder}'"):
        # not to find out after it was measured
        for path in page, folder / "report.json":
            try_to_write(path)
    figures = measure(run, num_crops)
    # the last line may still be on its way
    lines, _ = read_records(run_folder / "log.jsonl")
    facts = {"step": run.state["step"], "crops": num_crops, "figures": asdict(figures)}
    with writing(f"the report of '{run_folder}'"):
        folder.mkdir(exist_ok=True)
        images = {
            "predictions": pictures.draw_predictions(run, folder / "predictions.png"),
            "curves": pictures.draw_curves(lines, figures, folder / "curves.png"),
        }
        write_whole(folder / "report.json", json.dumps(facts, indent=1))
        write_whole(page, _page(run_folder, run, figures, num_crops, images))
    return page, figures


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
.lead { font-size: 1.15rem; max-width: 46rem } .quiet { opacity: .7; font-size: .9rem; max-width: 52rem }
img { width: 100%; height: auto; background: #fff; border-radius: 6px } img.narrow { max-width: 46rem }
table { border-collapse: collapse } th { text-align: left; font-weight: 600 }
td, th { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid #8884 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { overflow-x: auto; padding: 1rem; border-radius: 6px; background: #8881; font-size: .85rem }
"""


def _page(run_folder: Path, run: Trained, figures: Figures, num_crops: int, images: dict[str, Path]) -> str:
    source = {
        name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for name, path in images.items()
    }
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{held_out}</td><td class="number">{train}</td></tr>'
        for name, held_out, train in table(figures)
    )
    asked = "held-out images" if figures.held_out else "training images (none were held out)"
    versions = ", ".join(f"{name} {version}" for name, version in run.state.get("versions", {}).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fastbeit: {escape(run_folder.name)}</title><style>{STYLE}</style></head><body>
<h1>What this run learnt</h1>
<p class="lead">{escape(verdict(figures))}</p>
<table><tr><th></th><th>{asked}</th><th>unseen crops of training images</th></tr>{rows}</table>
<p class="quiet">{escape(_explain(figures, num_crops))}</p>
<h2>What it makes of {"images that it has not seen" if figures.held_out else "images"}</h2>
<img class="narrow" alt="original, true tokens, masked input, prediction, entropy" src="{source["predictions"]}">
<p class="quiet">{escape(_caption(run))}</p>
<h2>How it got there</h2>
<img alt="loss, accuracy and learning rate by step" src="{source["curves"]}">
<h2>What it was</h2>
<p class="quiet">{len(run.index):,} training images, {len(run.val_index) if run.val_index else 0:,} held out. Step
{run.state["step"]:,}, checkpoint {escape(str(run.checkpoint))}. {escape(versions)}. To train it again:
<code>fastbeit pretrain {escape(str(run_folder / "config.yaml"))} out=ANOTHER</code>; to draw this page again:
<code>fastbeit report {escape(str(run_folder))}</code></p>
<pre>{escape(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))}</pre></body></html>
"""


def table(figures: Figures) -> list[tuple[str, str, str]]:
    """Name, value on held-out images, value on unseen crops of training images."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    unit = "squared error" if figures.baseline is None else "nats"
    rows = [(f"loss a masked patch, {unit}", number(figures.loss), number(figures.train_crops_loss))]
    if figures.baseline is None or figures.vocab_size is None:
        return rows
    even = number(math.log(figures.vocab_size))
    return [
        *rows,
        (
            "baseline: knows only how frequent each word is in training, nats",
            number(figures.baseline),
            number(figures.train_crops_baseline),
        ),
        ("baseline: knows how frequent each word is in these images, nats", number(figures.own_baseline), ""),
        ("baseline: takes all words as equally likely, nats", even, even),
        ("gain on the baseline, nats", number(figures.gain), number(figures.train_crops_gain)),
        ("masked accuracy", number(figures.accuracy), number(figures.train_crops_accuracy)),
        ("words in use", f"{figures.words_in_use} of {figures.vocab_size}", ""),
    ]


def verdict(figures: Figures) -> str:
    """One honest sentence."""
    asked = "held-out images" if figures.held_out else "training images, in crops that it had not seen"
    if figures.gain is None:
        return f"Of masked patches of {asked} the model predicts pixels with a squared error of {figures.loss:.3f}."
    if not figures.gain > 0:
        return (
            f"On {asked} the model is no better than knowing how frequent each word is "
            f"({figures.loss:.2f} against {figures.baseline:.2f} nats): it has learnt nothing of use yet."
        )
    return (
        f"Masked patches of {asked} cost the model {figures.loss:.2f} nats, {figures.gain:.2f} fewer than a model that "
        f"sees no image ({figures.baseline:.2f}); {figures.words_in_use} of {figures.vocab_size} words occur there."
    )


def _explain(figures: Figures, num_crops: int) -> str:
    if figures.baseline is None:
        return f"Measured on {num_crops:,} crops; squared error of pixels normalised as the model sees them."
    return (
        f"Measured on {num_crops:,} crops each. The loss is the cross-entropy of the true visual token: fewer nats are "
        "better. The baseline is a model that sees no image and knows how frequent each word is in training."
    )


def _caption(run: Trained) -> str:
    hidden = (
        "Nothing is hidden from this model" if run.config.mask == "none" else "Gray patches are hidden from the model"
    )
    if run.tokenizer is None:
        return f"{hidden}. It predicts their pixels."
    return (
        "The true tokens, decoded, are what the tokenizer keeps of an image: no prediction can look better. "
        f"{hidden}. Its most likely visual token for each patch that it predicts, and the true tokens elsewhere, are "
        "decoded. The last column shows how unsure the model is (the entropy of its prediction): black where it is "
        "sure, bright where all words seem equally likely."
    )
