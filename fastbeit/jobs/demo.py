"""The whole system in minutes, on photos: the commands that a user would type, one after the other.

Each is said, then run. What is finished is not done again, so that an interrupted demo goes on where it stopped.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fastbeit.config.read import load_config, shipped_configs
from fastbeit.data.demo_photos import gather_photos
from fastbeit.errors import DONE, writing
from fastbeit.evaluate.attention import UNCHOSEN
from fastbeit.evaluate.finished_run import Figures
from fastbeit.files import write_whole
from fastbeit.jobs.index import index
from fastbeit.jobs.pretrain import pretrain
from fastbeit.jobs.report import report
from fastbeit.plural import counted

# what the demo promises on the photos of the packages; below it, something is amiss
WANTED_GAIN, WANTED_TRAIN_GAIN, WANTED_WORDS = 0.3, 0.5, 512


def run_demo(out: Path, source: Path | None, overrides: list[str], num_crops: int, command: list[str]) -> int:
    """Gather photos, index them, pre-train with the bundled tokenizer, report; say what was learnt, where to look.

    Args:
        source: a folder of photos; None: those of scikit-image, scikit-learn and sporco.
        overrides: `key=value` for pre-training.
        num_crops: that each figure of the report is measured on.
        command: what the user typed, said again where the demo stops early.

    Returns:
        The exit code of the first command that did not end well, else 0.
    """
    began = time.monotonic()
    num_train, num_held_out = gather_photos(out / "photos", source)
    print(f"{counted(num_train, 'photo')} to learn from, {num_held_out} held out, in {out / 'photos'}")
    for words, job in _jobs(out, overrides, num_crops):
        print(f"\n$ {shlex.join(['fastbeit', *words])}", flush=True)
        code = job()
        if code != DONE:
            print(f"the demo stopped here; to go on: {shlex.join(command)}", file=sys.stderr)
            return code
    figures = Figures(**json.loads((out / "run/report/report.json").read_text())["figures"])
    seconds = round(time.monotonic() - began)
    result = {"photos": num_train, "held_out_photos": num_held_out, "seconds": seconds, **asdict(figures)}
    with writing(f"'{out / 'result.json'}'"):
        write_whole(out / "result.json", json.dumps(result, indent=1))
    print(f"\n{_say_what_was_learnt(figures, num_train)}\nlook at {out / 'report.html'}  ({seconds} s)")
    return DONE


def _jobs(out: Path, overrides: list[str], num_crops: int) -> Iterator[tuple[list[str], Callable[[], int]]]:
    """What a user would type after `fastbeit`, and the job that it stands for."""
    indices = {part: out / f"{part}.idx" for part in ("train", "held_out")}
    for part, path in indices.items():
        if not path.exists():
            photos = out / "photos" / part
            yield ["index", str(photos), "-o", str(path)], partial(index, photos, path)
    data = f"data.index={indices['train']}", f"data.val_index={indices['held_out']}"
    file, settings = shipped_configs()["demo"], [f"out={out / 'run'}", *data, *overrides]
    words = ["pretrain", str(file), *settings]
    yield words, lambda: pretrain(load_config(file, settings), ["fastbeit", *words])
    run, page = out / "run", out / "report.html"
    yield ["report", str(run), "-o", str(page)], partial(report, run, page, num_crops, UNCHOSEN)


def _say_what_was_learnt(figures: Figures, num_photos: int) -> str:
    gain, train_gain = figures.gain, figures.train_crops_gain
    if gain is None or train_gain is None:
        return "Pixels were predicted: there is no baseline to compare with."
    lines = [
        "What it learnt, in nats a masked patch (fewer is better; the baseline sees no image and knows how frequent "
        "each word is in the training photos):",
        f"  held-out photos               baseline {figures.baseline:.3f}  model {figures.loss:.3f}  "
        f"gain {gain:.3f}  (wanted: {WANTED_GAIN})",
        f"  unseen crops of the training  baseline {figures.train_crops_baseline:.3f}  "
        f"model {figures.train_crops_loss:.3f}  gain {train_gain:.3f}  (wanted: {WANTED_TRAIN_GAIN})",
        f"  words in use on held-out photos: {figures.words_in_use} of {figures.vocab_size}  (wanted: {WANTED_WORDS}); "
        f"masked accuracy there: {figures.accuracy:.3f}",
    ]
    if gain < WANTED_GAIN or train_gain < WANTED_TRAIN_GAIN or (figures.words_in_use or 0) < WANTED_WORDS:
        lines.append("This is less than the demo should reach: too few or too similar photos, or something is amiss.")
    elif train_gain > gain:
        lines.append(
            f"On new crops of photos that it knows it gains {train_gain - gain:.2f} nats more: {num_photos} photos are "
            "few to learn from, and the limit of this demo."
        )
    return "\n".join(lines)
