"""`fastbeit probe`: what a linear classifier and k-NN make of the frozen features of each block."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastbeit.config.running import EngineConfig
from fastbeit.data.index.given import opened
from fastbeit.data.index.reader import Index
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World, device_of
from fastbeit.errors import CANNOT_CREATE, DONE, ConfigError, writing
from fastbeit.evaluate.features import Kind, check_blocks
from fastbeit.evaluate.frozen import Frozen, ModelSource, open_frozen
from fastbeit.evaluate.knn import TEMPERATURE, K
from fastbeit.evaluate.linear_probe import Recipe, accuracy, train_heads
from fastbeit.evaluate.probe import Cached, Classes, classes_of, extract, knn, strange
from fastbeit.files import make_folder, try_to_write, write_whole
from fastbeit.plural import counted
from fastbeit.train.stop import Stop, StopWanted

MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Settings:
    """Of a probe; the recipe's defaults are the authors'."""

    kind: Kind
    blocks: list[int] | None  # None: all
    recipe: Recipe
    num_seeds: int  # of the linear classifier


def probe(model: ModelSource, train: Path, val: Path, settings: Settings, output: Path) -> int:
    """Print a table, a line a block, and write the same as JSON, whole or not at all; returns the exit code.

    Args:
        train, val: indices, or whatever `fastbeit index` takes; with labels.

    Raises:
        DataError: no labels, or no valid image (66).
        RunError: no such block, one class, no room for the features (2); the file cannot be written (73, 74).
        KeyboardInterrupt: stopped; nothing is written.
    """
    with writing(f"'{output}'", exit_code=CANNOT_CREATE):
        try_to_write(output)
    engine = EngineConfig()
    frozen = open_frozen(model, device_of(engine))
    world, dtype = World(0, 1, frozen.device), compute_dtype(engine, frozen.device)
    chosen = range(frozen.depth) if settings.blocks is None else settings.blocks
    blocks, levels = check_blocks(chosen, frozen.depth), frozen.data.levels
    how = blocks, settings.kind, world, dtype
    try:
        with opened(train, levels) as index, opened(val, levels) as val_index, Stop() as stop:
            classes = classes_of(index, val_index)
            _check_memory(frozen, settings.kind, len(blocks), len(index) + len(val_index))
            with stop.interrupts():
                known = extract(frozen.model, frozen.data, index, classes.train, *how, what="training images")
                asked = extract(frozen.model, frozen.data, val_index, classes.val, *how, what="held-out images")
            neighbours = knn(known, asked, len(classes), K, world, stop)
            with stop.interrupts():
                linear = _linear(known, asked, len(classes), settings, frozen.device)
            about = _about(frozen, settings, index, val_index, known, asked, classes)
    except StopWanted:
        raise KeyboardInterrupt from None
    rows = [
        {"block": block, "linear": one, "knn": asdict(other)}
        for block, one, other in zip(blocks, linear, neighbours, strict=True)
    ]
    print(_table(rows, about, strange(classes)))
    with writing(f"'{output}'", exit_code=CANNOT_CREATE):
        make_folder(output.parent)
        write_whole(output, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(f"written to {output}")
    return DONE


def _linear(known: Cached, asked: Cached, num_classes: int, settings: Settings, device: torch.device) -> list[dict]:
    """Of each block means over seeds, and their deviation."""
    found = []
    for seed in range(settings.num_seeds):
        heads = train_heads(known.values, known.rows, num_classes, settings.recipe, seed, device)
        found.append(accuracy(heads, asked.values, asked.rows, settings.recipe.batch_size).tolist())
    blocks = []
    for shares in zip(*found, strict=True):
        top1, top5 = ([share[place] for share in shares] for place in (0, 1))
        spread = {"top1_deviation": statistics.stdev(top1)} if len(top1) > 1 else {}
        blocks.append({"top1": statistics.mean(top1), "top5": statistics.mean(top5)} | spread)
    return blocks


def _about(
    frozen: Frozen, settings: Settings, index: Index, val_index: Index, known: Cached, asked: Cached, classes: Classes
) -> dict[str, Any]:
    origin = frozen.origin
    return {
        "model": f"{origin.dialect}: {origin.file}",
        "model_sha256": origin.sha256,
        "train": {"index": index.fingerprint, "images": len(known.rows), "bad": known.num_bad},
        "val": {"index": val_index.fingerprint, "images": len(asked.rows), "bad": asked.num_bad},
        "classes": len(classes),
        "classes_without_training_images": classes.num_strange,
        "features": {"kind": settings.kind, "norm": "none", "view": "centre crop"},
        "linear": {**asdict(settings.recipe), "seeds": settings.num_seeds},
        "knn": {"k": min(K, len(known.rows)), "temperature": TEMPERATURE},
    }


def _table(rows: list[dict[str, Any]], about: dict[str, Any], note: str) -> str:
    train, val = (counted(about[part]["images"], "image") for part in ("train", "val"))
    num_bad = about["train"]["bad"] + about["val"]["bad"]
    few = " (there are no more images)" if about["knn"]["k"] < K else ""
    lines = [
        f"{about['model']}: {train} in {counted(about['classes'], 'class')}, {val} held out"
        + f"; {counted(num_bad, 'bad image')} left out" * bool(num_bad),
        f"features: {about['features']['kind']}, raw, of the middle of each image (the authors train the linear one on "
        "random crops and flips)",
        f"linear: {about['linear']['epochs']} epochs, {counted(about['linear']['seeds'], 'seed')}; k-NN: k = "
        f"{about['knn']['k']}{few}, cosine, temperature {TEMPERATURE}",
        *[note] * bool(note),
        f"{'block':>5}  {'linear top-1':>16}  {'top-5':>7}  {'k-NN top-1':>10}  {'top-5':>7}",
    ]
    for row in rows:
        linear, neighbours = row["linear"], row["knn"]
        spread = f" ± {linear['top1_deviation']:.2%}" if "top1_deviation" in linear else ""
        shown = f"{linear['top1']:.2%}{spread}"
        lines.append(
            f"{row['block']:>5}  {shown:>16}  {linear['top5']:>7.2%}"
            f"  {neighbours['top1']:>10.2%}  {neighbours['top5']:>7.2%}"
        )
    return "\n".join(lines)


def _check_memory(frozen: Frozen, kind: Kind, num_blocks: int, num_images: int) -> None:
    """
    Raises:
        ConfigError: the features have no room.
    """
    width = frozen.model.cls_token.shape[2] * (2 if kind == "concat" else 1)
    wanted, free = 4 * width * num_blocks * num_images, _free_bytes()
    if free is not None and wanted > free:
        raise ConfigError(
            f"the features of {num_images:,} images and {counted(num_blocks, 'block')} take {wanted / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} GB are free; name fewer blocks (--blocks), or take --kind cls"
        )


def _free_bytes() -> int | None:
    """Of memory, by Linux; None: it does not say."""
    lines = MEMORY.read_text().splitlines() if MEMORY.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
