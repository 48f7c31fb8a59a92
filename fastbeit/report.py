"""The page of a run: what it learnt, measured on held-out images and drawn; one HTML file that needs no network."""

import base64
import html
import json
from dataclasses import asdict
from pathlib import Path

import yaml

from fastbeit.errors import USAGE, RunError
from fastbeit.trained import Figures, Trained, measure, open_run


def write_report(run_folder: Path, page: Path | None = None) -> tuple[Path, Figures]:
    """Measure and draw a run: PNG files and `report.json` in RUN/report, and one self-contained HTML page.

    Args:
        page: where the page goes; RUN/report.html when None.

    Raises:
        RunError: as `open_run`; matplotlib is missing (2).
    """
    try:
        from fastbeit import pictures
    except ImportError as err:
        raise RunError(f"the report wants matplotlib ({err}); pip install 'fastbeit[demo]'", USAGE) from None
    page = page or run_folder / "report.html"
    run = open_run(run_folder)
    figures = measure(run)
    folder = run_folder / "report"
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"step": run.step, **asdict(figures)}, indent=1))
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    images = {
        "predictions.png": pictures.draw_predictions(run, folder / "predictions.png"),
        "curves.png": pictures.draw_curves(lines, figures, folder / "curves.png"),
    }
    page.write_text(_page(run_folder, run, figures, images))
    return page, figures


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem } img { width: 100%; height: auto }
table { border-collapse: collapse }
td, th { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #666 } pre { overflow-x: auto }
"""


def _page(run_folder: Path, run: Trained, figures: Figures, images: dict[str, Path]) -> str:
    embedded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in images.items()}
    settings = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{held_out}</td><td class="number">{train}</td></tr>'
        for name, held_out, train in table(figures)
    )
    asked = "held-out images" if figures.held_out else "training images (none were held out)"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fastbeit: {html.escape(run_folder.name)}</title><style>{STYLE}</style></head><body>
<h1>What this run learnt</h1>
<p>{html.escape(verdict(figures))}</p>
<table><tr><th></th><th>{asked}</th><th>unseen crops of training images</th></tr>{rows}</table>
<h2>What it makes of images it has not seen</h2>
<img alt="original, masked input, prediction, true tokens" src="data:image/png;base64,{embedded["predictions.png"]}">
<p class="quiet">{html.escape(_caption(run))}</p>
<h2>How it got there</h2>
<img alt="loss, accuracy and learning rate by step" src="data:image/png;base64,{embedded["curves.png"]}">
<h2>Settings</h2>
<p class="quiet">Checkpoint {html.escape(str(run.checkpoint))}, step {run.step}. To draw this page again:
<code>fastbeit report {html.escape(str(run_folder))}</code></p>
<pre>{html.escape(settings)}</pre></body></html>
"""


def table(figures: Figures) -> list[tuple[str, str, str]]:
    """Name, value on held-out images, value on unseen crops of training images."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    unit = "squared error a pixel" if figures.baseline is None else "nats a masked patch"
    rows = [(f"loss, {unit}", number(figures.loss), number(figures.train_crops_loss))]
    if figures.baseline is None:
        return rows
    return [
        ("unigram baseline, nats", number(figures.baseline), number(figures.train_crops_baseline)),
        *rows,
        ("gain, nats", number(figures.gain), number(figures.train_crops_gain)),
        ("masked accuracy", number(figures.accuracy), number(figures.train_crops_accuracy)),
        ("words in use", f"{figures.words_in_use} of {figures.vocab_size}", ""),
    ]


def verdict(figures: Figures) -> str:
    """One honest sentence."""
    asked = "held-out images" if figures.held_out else "training images, in crops that it had not seen"
    if figures.gain is None:
        return f"Of masked patches of {asked} the model predicts pixels with a squared error of {figures.loss:.3f}."
    if figures.gain <= 0:
        return (
            f"On {asked} the model is no better than knowing how frequent each word is "
            f"({figures.loss:.2f} against {figures.baseline:.2f} nats): it has learnt nothing of use yet."
        )
    return (
        f"Masked patches of {asked} cost the model {figures.loss:.2f} nats, {figures.gain:.2f} fewer than a model that "
        f"sees nothing ({figures.baseline:.2f}); {figures.words_in_use} of {figures.vocab_size} words are in use there."
    )


def _caption(run: Trained) -> str:
    if run.tokenizer is None:
        return "Gray patches are hidden from the model. It predicts their pixels."
    return (
        "Gray patches are hidden from the model. Its most likely visual token for each of them, and the true tokens "
        "elsewhere, are decoded by the dVAE; the last column decodes true tokens everywhere: nothing can look better."
    )
