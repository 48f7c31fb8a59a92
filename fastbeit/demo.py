"""The whole system in minutes, on photos: the commands that a user would type, one after the other.

Each is said, then run. What is finished is not done again, so that an interrupted demo goes on where it stopped.
"""

import json
import time
from pathlib import Path

from fastbeit.cli import main
from fastbeit.errors import DONE
from fastbeit.photos import gather_photos

# straight-through words and a computed start: 64 words serve within a minute, where Gumbel-softmax alone keeps a dozen
TOKENIZER = "image_size=64 crop_scale=[0.2,1] n_hid=16 n_init=64 vocab_size=64 batch_size=32 steps=120 lr=2e-3".split()
LOGGING = "num_workers=1 log_every=20 save_every=40".split()
# below these a run of this size has learnt too little to be called learning
WANTED_GAIN, WANTED_TRAIN_GAIN, WANTED_WORDS = 0.3, 0.5, 48


def run_demo(out: Path, source: Path | None, tokenizer: list[str], overrides: list[str]) -> int:
    """Gather photos, index them, train a tokenizer, pre-train, report; say what was learnt and where to look.

    Args:
        source: a folder of photos; None: those of scikit-image, scikit-learn and sporco.
        tokenizer, overrides: `key=value` for the tokenizer's training and for pre-training.

    Returns:
        The exit code of the first command that did not end well, else 0.
    """
    began = time.monotonic()
    num_train, num_held_out = gather_photos(out / "photos", source)
    print(f"{num_train} photos to learn from, {num_held_out} held out, in {out / 'photos'}", flush=True)
    indices = {part: out / f"{part}.idx" for part in ("train", "held_out")}
    for part, index in indices.items():
        if not index.exists():
            code = _run("index", out / "photos" / part, "-o", index)
            if code != DONE:
                return code
    run, page = out / "run", out / "report.html"
    data = f"data.index={indices['train']}", f"data.val_index={indices['held_out']}", f"tokenizer.path={out / 'dvae'}"
    for command in (
        ("tokenizer", "train", "--data", indices["train"], "-o", out / "dvae", *TOKENIZER, *LOGGING, *tokenizer),
        ("pretrain", _config_file(), f"out={run}", *data, *overrides),
        ("report", run, "-o", page),
    ):
        code = _run(*command)
        if code != DONE:
            return code
    _say_what_was_learnt(json.loads((run / "report" / "report.json").read_text()), num_train)
    print(f"\nlook at {page}  ({time.monotonic() - began:.0f} s)")
    return DONE


def _run(*args: object) -> int:
    words = [str(arg) for arg in args]
    print("\n$ fastbeit " + " ".join(words), flush=True)
    return main(words)


def _config_file() -> Path:
    """configs/ lies in the package when it is installed, beside it in a clone."""
    package = Path(__file__).parent
    found = [folder / "configs" / "demo.yaml" for folder in (package, package.parent)]
    return next((path for path in found if path.exists()), found[0])


def _say_what_was_learnt(figures: dict, num_train: int) -> None:
    gain = figures["baseline"] - figures["loss"]
    train_gain = figures["train_crops_baseline"] - figures["train_crops_loss"]
    print(
        f"\nWhat it learnt, in nats a masked patch (fewer is better; the baseline sees nothing and knows how frequent "
        f"each word is in the training photos):\n"
        f"  held-out photos               baseline {figures['baseline']:.3f}  model {figures['loss']:.3f}  "
        f"gain {gain:.3f}  (wanted: {WANTED_GAIN})\n"
        f"  unseen crops of the training  baseline {figures['train_crops_baseline']:.3f}  "
        f"model {figures['train_crops_loss']:.3f}  gain {train_gain:.3f}  (wanted: {WANTED_TRAIN_GAIN})\n"
        f"  words in use on held-out photos: {figures['words_in_use']} of {figures['vocab_size']}  "
        f"(wanted: {WANTED_WORDS}); masked accuracy there: {figures['accuracy']:.3f}"
    )
    if gain < WANTED_GAIN or train_gain < WANTED_TRAIN_GAIN or figures["words_in_use"] < WANTED_WORDS:
        print("This is less than the demo should reach: too few or too similar photos, or something is amiss.")
    print(f"With {num_train} photos it learns colours and their neighbourhoods, not objects: photos are the limit.")
