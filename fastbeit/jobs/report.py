"""The page of a run: what it learnt, measured on held-out images and drawn; one HTML file that needs no network.

A fine-tuning's page is made by `evaluate/finetuned_page.py`.
"""

import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.given import indexed_for_now
from fastbeit.errors import DONE, writing
from fastbeit.evaluate import finetuned_page
from fastbeit.evaluate import page as html
from fastbeit.evaluate.attention import UNCHOSEN, Reference
from fastbeit.evaluate.finished_run import Figures, Moved, Trained, is_finetuning, measure, open_run
from fastbeit.files import read_records, write_whole


def report(
    run_folder: Path, page: Path | None, num_crops: int, reference: Reference = UNCHOSEN, moved: Moved | None = None
) -> int:
    """Write the page and say what it says first; returns the exit code.

    Args:
        moved: what lies elsewhere than when the run was trained; of images also a source, which is indexed for this.
            Others as of `write_report`.
    """
    moved = moved or Moved()
    images = {"index": str(moved.index or ""), "val_index": str(moved.val_index or "")}
    with indexed_for_now(DataConfig().model_copy(update=images)) as data:
        index, val_index = (Path(path) if path else None for path in (data.index, data.val_index))
        moved = Moved(moved.tokenizer, index, val_index)
        if is_finetuning(run_folder):
            written, said = finetuned_page.write_report(run_folder, page, reference, moved)
        else:
            written, figures = write_report(run_folder, page, num_crops, reference, moved)
            said = verdict(figures)
    print(f"{said}\nreport: {written}")
    return DONE


def write_report(
    run_folder: Path, page: Path | None, num_crops: int, reference: Reference = UNCHOSEN, moved: Moved | None = None
) -> tuple[Path, Figures]:
    """Measure and draw a pre-training: PNG files and `report.json` in RUN/report, and one self-contained HTML page.

    Args:
        page: where the page goes; RUN/report.html when None.
        num_crops: crops that each figure is measured on.
        reference: whose attention is drawn.

    Raises:
        RunError: as `open_run`; the model has no such patch or block, or matplotlib is missing (2); the page or a file
            of RUN/report cannot be written (74).
    """
    pictures, run = html.import_pictures(), open_run(run_folder, moved)
    points, block = reference.resolved(run.config.grid, run.config.model.depth)
    page, folder = html.places(run_folder, page)
    figures = measure(run, num_crops)
    # the last line may still be on its way
    lines, _ = read_records(run_folder / "log.jsonl")
    facts = {"step": run.state["step"], "crops": num_crops, "figures": asdict(figures)}
    with writing(f"the report of '{run_folder}'"):
        folder.mkdir(exist_ok=True)
        look = pictures.look_at(run)
        images = {
            "predictions": pictures.draw_predictions(run, look, folder / "predictions.png"),
            "attention": pictures.draw_attention(run.model, look.images, points, block, folder / "attention.png"),
            "curves": pictures.draw_curves(lines, figures, folder / "curves.png"),
        }
        write_whole(folder / "report.json", json.dumps(facts, indent=1))
        write_whole(page, _page(run_folder, run, figures, num_crops, block, images))
    return page, figures


def _page(run_folder: Path, run: Trained, figures: Figures, num_crops: int, block: int, images: dict[str, Path]) -> str:
    asked = "held-out images" if figures.held_out else "training images (none were held out)"
    columns = "original, true tokens, masked input, prediction, entropy"
    body = f"""
{html.table(["", asked, "unseen crops of training images"], table(figures))}
{html.note(_explain(figures, num_crops))}
<h2>What it makes of {"images that it has not seen" if figures.held_out else "images"}</h2>
{html.picture(images["predictions"], columns, "narrow")}
{html.note(_caption(run))}
{html.attention_part(images["attention"], block, run.config.model.depth)}
<h2>How it got there</h2>
{html.picture(images["curves"], "loss, accuracy and learning rate by step")}
<h2>What it was</h2>
<p class="quiet">{len(run.index):,} training images, {len(run.val_index) if run.val_index else 0:,} held out. Step
{run.state["step"]:,}, checkpoint {escape(str(run.checkpoint))}. {escape(html.versions(run.state))}. To train it again:
<code>fastbeit pretrain {escape(str(run_folder / "config.yaml"))} out=ANOTHER</code>; to draw this page again:
<code>fastbeit report {escape(str(run_folder))}</code></p>
{html.settings(run.config)}"""
    return html.document(run_folder, "What this run learnt", verdict(figures), body)


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
