"""The directory of a fine-tuning, as its job leaves it, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.read import save_config
from fastbeit.config.running import Kernels
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.model.classify import Classifier
from fastbeit.train.checkpoint import save_checkpoint
from fastbeit.train.ema import PREFIX
from helpers import photos
from helpers.weights import randomise

CLASSES = ["a", "b", "c", "d", "e", "f", "g"]
CONFIG: dict[str, Any] = {
    "data": {"image_size": 32, "num_workers": 0, "pipeline": "torch"},
    "model": {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 8},
    "optim": {"batch_size": 8, "steps": 20},
}


def classifier(num_classes: int, seed: int = 0) -> Classifier:
    """Of the settings above, and with a head that is sure of what it says."""
    torch.manual_seed(seed)
    config = FinetuneConfig.model_validate(CONFIG)
    data = config.data
    model = Classifier(
        config.model,
        image_size=data.image_size,
        num_classes=num_classes,
        mean=data.mean,
        std=data.std,
        kernels=Kernels(),
        pooling=config.model.pooling,
    )
    randomise(model)
    return model


def index_of(folder: Path, images: dict[str, int]) -> Index:
    """Of crops of a photo, so many a class, in folders named as their classes."""
    number, photo = 0, photos.small_photo(200, 300)
    for name, count in images.items():
        (folder / "images" / name).mkdir(parents=True)
        for _ in range(count):
            number += 1
            left, top = 37 * number % 200, 53 * number % 120
            photo.crop((left, top, left + 60, top + 70)).save(folder / "images" / name / f"{number:03}.png")
    build_index(folder / "images", folder / "images.idx", progress=False)
    return open_index(folder / "images.idx")


def write_run(
    folder: Path,
    indexes: tuple[Index, Index | None],
    classes: list[str],
    model: Classifier,
    averaged: dict[str, Tensor] | None = None,
) -> Path:
    """
    Args:
        indexes: of training and held-out images.
        averaged: weights, where they are kept beside the last.
    """
    train, val = indexes
    data = CONFIG["data"] | {"index": str(train.location), "val_index": str(val.location) if val else ""}
    config = FinetuneConfig.model_validate(CONFIG | {"data": data, "out": str(folder)})
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    weights = model.state_dict() | {f"{PREFIX}{name}": one for name, one in (averaged or {}).items()}
    state = {"config": config.model_dump(mode="json"), "classes": classes, "versions": {"torch": "2.11"}}
    save_checkpoint(folder / "checkpoints", 20, weights, {}, state)
    lines: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 5, "lr": 1e-3 * (20 - step), "loss": 4 / step, "accuracy": step / 25}
        for step in range(1, 21)
    ]
    if val:
        lines += [
            {"step": step, "event": "validation", "top1": step / 30, "top5": step / 20, "loss": 5 / step}
            for step in (5, 10, 15, 20)
        ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
