"""What pre-training is worth on a CPU: `python -m benchmarks.finetune [--json FILE]`.

The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn. Pre-training sees 70 % of them, and no label.
Two fine-tunings, one from it and one from scratch, see the labels of a few of those, for equally many steps with equal
settings, and are judged by the other 30 %, which nobody trains on. Several seeds; a seed decides weights, order, crops
and masks. The difference counts where it is more than twice the pooled deviation of the seeds.
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.data.index.scan import build_index
from fastbeit.jobs.finetune import finetune
from fastbeit.jobs.pretrain import pretrain
from fastbeit.jobs.tokenize import tokenize

HELD_OUT, LABELLED = 0.3, 10  # share of each class; images of a class that have their label
COMMON = [
    *("data.image_size=32", "data.crop_scale=[0.6,1]", "data.flip=0", "data.jitter=0", "data.num_workers=0"),
    *("data.tail=wrap", "model.width=96", "model.depth=4", "model.num_heads=3", "model.mlp_width=384"),
    *("model.patch_size=4", "model.drop_path=0"),
]
PRETRAIN = [
    *("masking.ratio=0.4", "data.num_crops=4", "optim.batch_size=64", "optim.lr=2e-3", "optim.warmup_steps=50"),
    *("log.every=100", "log.save_every=0"),
]
FINETUNE = [
    *("augment.num_ops=0", "augment.erase=0", "augment.mixup=0", "augment.cutmix=0", "optim.batch_size=50"),
    *("optim.lr=1e-3", "optim.layer_decay=0.75", "optim.warmup_steps=20", "log.every=100", "log.val_every=1000000"),
]


def write_digits(folder: Path) -> None:
    """Three indices: all that is trained on, those of it with labels, and the held-out ones."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    random = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "labelled": [], "held_out": []}
    for i, image in enumerate(digits.images):
        path = folder / "images" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    for label in range(10):
        rows = random.permutation(np.flatnonzero(digits.target == label)).tolist()
        num_held_out = round(HELD_OUT * len(rows))
        parts = rows[:num_held_out], rows[num_held_out:], rows[num_held_out : num_held_out + LABELLED]
        for name, part in zip(("held_out", "train", "labelled"), parts, strict=True):
            lists[name] += [f"images/{i:04}.png\t{label}" for i in part]
    for name, lines in lists.items():
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        build_index(folder / f"{name}.tsv", folder / f"{name}.idx", progress=False)


def fine_tuned(folder: Path, seed: int, steps: int, init: Path | None) -> float:
    """Top-1 on the held-out digits at the end."""
    out = folder / f"finetune-{seed}{'' if init else '-scratch'}"
    settings = [
        *COMMON, *FINETUNE, f"data.index={folder}/labelled.idx", f"data.val_index={folder}/held_out.idx", f"out={out}",
        f"seed={seed}", f"optim.steps={steps}", f"init={init or ''}",
    ]  # fmt: skip
    finetune(configure(FinetuneConfig, settings), ["benchmark"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return next(line["top1"] for line in reversed(lines) if line.get("event") == "validation")


def pre_trained(folder: Path, seed: int, steps: int) -> Path:
    out = folder / f"pretrain-{seed}"
    settings = [
        *COMMON, *PRETRAIN, f"data.index={folder}/train.idx", f"out={out}", f"seed={seed}", f"optim.steps={steps}",
        f"data.tokens={folder}/tokens-{seed}",
    ]  # fmt: skip
    config = configure(Config, settings)
    # once: to make them anew for each of some 40 epochs would take longer than all else
    tokenize(config, ["benchmark"])
    pretrain(config, ["benchmark"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"), help="of data and runs; removed before")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=200, help="of each fine-tuning")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    write_digits(args.folder)
    found: dict[str, list[float]] = {"pre-trained": [], "from scratch": []}
    for seed in range(args.seeds):
        begun = pre_trained(args.folder, seed, args.pretrain_steps)
        found["pre-trained"].append(fine_tuned(args.folder, seed, args.steps, begun))
        found["from scratch"].append(fine_tuned(args.folder, seed, args.steps, None))
    spread = math.sqrt(statistics.mean(statistics.variance(values) for values in found.values()))
    difference = statistics.mean(found["pre-trained"]) - statistics.mean(found["from scratch"])
    for name, values in found.items():
        print(f"{name:13} top-1 {statistics.mean(values):.3f}  seeds {' '.join(f'{value:.3f}' for value in values)}")
    counts = "more" if difference > 2 * spread else "no more"
    print(f"difference {difference:.3f}, {counts} than twice the pooled deviation {spread:.3f}")
    if args.json:
        sizes = {"pretrain_steps": args.pretrain_steps, "steps": args.steps, "labelled_a_class": LABELLED}
        rows = {"top1": found, "difference": difference, "pooled_deviation": spread}
        args.json.write_text(json.dumps({**sizes, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
