"""The page of a fine-tuning: how often it is right on held-out images, against guessing, and where it is wrong."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from fastbeit.config.sections import Size
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.errors import writing
from fastbeit.evaluate import page as html
from fastbeit.evaluate.attention import Reference, grid_of
from fastbeit.evaluate.classify import TOP
from fastbeit.evaluate.finetuned_run import Finetuned, open_finetuning
from fastbeit.evaluate.finished_run import Moved
from fastbeit.evaluate.mistakes import Answers, examine, most_frequent
from fastbeit.files import read_records, write_whole
from fastbeit.plural import counted

NUM_WORST = 10  # classes in the table
MAX_CLASSES = 1000  # of more, the worst have a few images each, and say little


@dataclass(frozen=True)
class Judged:
    """A model's answers beside those of who sees no image: the classes that are the most frequent in training."""

    answers: Answers
    frequent: Sequence[int]
    classes: Sequence[str]

    @property
    def baseline(self) -> float:
        """Top-1 of guessing."""
        return self.answers.share_of(self.frequent[:1])

    @property
    def has_top5(self) -> bool:
        """Of five classes or fewer, it says nothing."""
        return len(self.classes) > TOP

    def facts(self, index: Index) -> dict[str, Any]:
        """For report.json."""
        found = self.answers
        figures = {
            "num_images": len(found.labels),
            "top1": found.top1,
            "top5": found.top5,
            "loss": found.loss,
            "baseline_top1": self.baseline,
            "baseline_top5": found.share_of(self.frequent),
            "num_bad": found.num_bad,
            "num_unknown": found.num_unknown,
        }
        mistakes = [
            {
                "file": index.name(one.sample),
                "label": self.classes[one.label],
                "guess": self.classes[one.guess],
                "probability": one.probability,
            }
            for one in found.mistakes
        ]
        return {"figures": figures, "mistakes": mistakes}


def write_report(
    run_folder: Path, page: Path | None, reference: Reference, moved: Moved | None = None
) -> tuple[Path, str]:
    """Measure and draw a fine-tuning: PNG files and `report.json` in RUN/report, and one self-contained HTML page.

    Args:
        page: where the page goes; RUN/report.html when None.
        reference: whose attention is drawn.
        moved: indices that lie elsewhere than the run's settings say.

    Returns:
        Where the page is, and what it says first.

    Raises:
        RunError: as `open_finetuning`; the model has no such patch or block, or matplotlib is missing (2); the page or
            a file of RUN/report cannot be written (74).
    """
    pictures, run = html.import_pictures(), open_finetuning(run_folder, moved)
    points, block = reference.resolved(grid_of(run.model), run.config.model.depth)
    page, folder = html.places(run_folder, page)
    judged = None
    if run.val_index and not run.lack:
        answers = examine(run.model, run.data, run.val_index, run.classes, run.device)
        judged = Judged(answers, most_frequent(run.index, run.classes, TOP), run.classes)
    said = verdict(judged, run.lack)
    facts: dict[str, Any] = {"step": run.state["step"], "said": said}
    with writing(f"the report of '{run_folder}'"):
        folder.mkdir(exist_ok=True)
        body = _curves(run_folder, judged, pictures, folder)
        if judged and run.val_index:
            facts |= judged.facts(run.val_index)
            body = _figures(judged) + body + _mistakes(judged, facts["mistakes"], pictures, folder) + _worst(judged)
            body += _attention(run, points, block, pictures, folder)
        write_whole(folder / "report.json", json.dumps(facts, indent=1))
        write_whole(page, html.document(run_folder, "What this run learnt", said, body + _settings(run_folder, run)))
    return page, said


def verdict(judged: Judged | None, lack: str) -> str:
    """One honest sentence."""
    if judged is None:
        return f"What the model knows of new images cannot be said: {lack}."
    found, name = judged.answers, judged.classes[judged.frequent[0]]
    asked = counted(len(found.labels), "held-out image")
    guess = f"always guessing '{name}', the most frequent class of training"
    if found.top1 <= judged.baseline:
        return (
            f"On {asked} the model is no better than {guess}: it is right on {found.top1:.1%}, and guessing on "
            f"{judged.baseline:.1%}. It has learnt nothing of use yet."
        )
    top5 = f" (among its five most likely classes on {found.top5:.1%})" if judged.has_top5 else ""
    return f"The model is right on {found.top1:.1%} of {asked}{top5}; {guess}, is right on {judged.baseline:.1%}."


def _figures(judged: Judged) -> str:
    found = judged.answers
    rows = [("top-1", f"{found.top1:.1%}", f"{judged.baseline:.1%}")]
    if judged.has_top5:
        rows.append(("top-5", f"{found.top5:.1%}", f"{found.share_of(judged.frequent):.1%}"))
    rows.append(("cross-entropy, nats", f"{found.loss:.3f}", ""))
    explained = (
        f"Measured on the middle of {counted(len(found.labels), 'held-out image')}, each once. Guessing sees no image, "
        "and says the classes that most training images have."
    )
    left_out = ((found.num_bad, "that cannot be decoded"), (found.num_unknown, "of a class that training had not"))
    for number, why in left_out:
        explained += f" Left out: {counted(number, 'image')} {why}." if number else ""
    return html.table(["", "held-out images", "guessing"], rows) + html.note(explained)


def _curves(run_folder: Path, judged: Judged | None, pictures: ModuleType, folder: Path) -> str:
    # the last line may still be on its way
    lines, _ = read_records(run_folder / "log.jsonl")
    drawn = pictures.draw_finetuning_curves(lines, judged and judged.baseline, folder / "curves.png")
    return (
        "<h2>How it got there</h2>\n"
        + html.picture(drawn, "loss, accuracy and learning rate by step")
        + html.note(
            "Training is harder than it looks: its images are augmented, perhaps erased and mixed, and the targets are "
            "smoothed. Its loss does not compare with that of held-out images."
        )
    )


def _mistakes(judged: Judged, listed: list[dict[str, Any]], pictures: ModuleType, folder: Path) -> str:
    title, found = "<h2>Its worst mistakes</h2>\n", judged.answers
    if not found.mistakes:
        # of an earlier report
        (folder / "mistakes.png").unlink(missing_ok=True)
        return f"{title}{html.note('It made none.')}"
    drawn = pictures.draw_mistakes(found.mistakes, judged.classes, folder / "mistakes.png")
    rows = [(one["guess"], one["label"], one["file"], f"{one['probability']:.1%}") for one in listed]
    return (
        title
        + html.picture(drawn, "images, what they were taken for, and what they are", "own")
        + html.note(
            f"Of {counted(found.num_mistakes, 'mistake')} those that the model was most sure of, as it saw them. Above "
            "each is the class that it says, with its probability, and the class that is written of the image: "
            "which may be the one that is wrong."
        )
        + f"<details><summary>Their files</summary>{html.table(['taken for', 'is', 'file', ''], rows, 3)}</details>\n"
    )


def _worst(judged: Judged) -> str:
    worst = judged.answers.worst_classes(NUM_WORST) if len(judged.classes) <= MAX_CLASSES else []
    if not worst:
        return ""
    rows = [
        (
            judged.classes[one.label],
            judged.classes[one.taken_for],
            f"{one.accuracy:.0%}",
            f"{one.num_right:,} of {one.num_images:,}",
        )
        for one in worst
    ]
    header = ["class", "most often taken for", "accuracy", "images"]
    return f"<h2>Its weakest classes</h2>\n{html.table(header, rows, 2)}"


def _attention(run: Finetuned, points: tuple[Size, ...], block: int, pictures: ModuleType, folder: Path) -> str:
    """Of the first held-out images."""
    assert run.val_index
    # of a few images, processes would take longer to start
    data, size = run.data.model_copy(update={"num_workers": 0}), pictures.NUM_ATTENTION_IMAGES
    with contextlib.closing(make_eval_loader(data, run.val_index, batch_size=size, rank=0, world_size=1)) as loader:
        images = next(batch.images for batch in loader if len(batch.images))
    drawn = pictures.draw_attention(run.model, images.to(run.device), points, block, folder / "attention.png")
    return html.attention_part(drawn, block, run.config.model.depth)


def _settings(run_folder: Path, run: Finetuned) -> str:
    held_out = len(run.val_index) if run.val_index else 0
    return f"""<h2>What it was</h2>
<p class="quiet">{len(run.index):,} training images of {counted(len(run.classes), "class")}, {held_out:,} images held
out. Step {run.state["step"]:,}, checkpoint {escape(str(run.checkpoint))}. {escape(html.versions(run.state))}. To train
it again: <code>fastbeit finetune {escape(str(run_folder / "config.yaml"))} out=ANOTHER</code>; to draw this page again:
<code>fastbeit report {escape(str(run_folder))}</code></p>
{html.settings(run.config)}"""
