"""Indices to load from, and batches of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.config.sections import DataConfig
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader
from helpers import photos

PIPELINES = ["torch", "pillow", "dali"]
GOOD = photos.encoded(photos.small_photo(24, 32))


def photo_index(folder: Path) -> Index:
    """All of `photos.PHOTOS`."""
    photos.copy_photos(folder / "photos")
    build_index(folder / "photos", folder / "images.idx", progress=False)
    return open_index(folder / "images.idx")


def small_index(folder: Path, files: dict[str, bytes | None]) -> Index:
    """An index of files that were all `GOOD` when it was made; `files` then says what they hold."""
    (folder / "data").mkdir()
    for name in files:
        (folder / "data" / name).write_bytes(GOOD)
    build_index(folder / "data", folder / "images.idx", progress=False)
    for name, data in files.items():
        if data is not None:
            (folder / "data" / name).write_bytes(data)
    return open_index(folder / "images.idx")


def batches(index: Index, **options) -> list[Batch]:
    """Of `make_loader`, whose arguments and fields of DataConfig `options` are."""
    if options.get("pipeline") == "dali":
        pytest.importorskip("nvidia.dali")
    arguments = {"batch_size": 4, "rank": 0, "world_size": 1, "first_step": 0, "num_steps": 3, "token_size": (16, 24)}
    arguments = {name: options.pop(name, value) for name, value in arguments.items()}
    data = DataConfig.model_validate({"image_size": (32, 48), "num_workers": 0, "pipeline": "torch", **options})
    return list(make_loader(data, index, seed=5, **arguments))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for name in ("images", "token_images", "sample", "epoch"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def psnr(one: torch.Tensor | None, two: torch.Tensor | None) -> np.ndarray:
    """[n] in dB, of [n, h, w, 3] images."""
    assert one is not None and two is not None
    error = (one.double() - two.double()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
    return 10 * torch.log10(255**2 / error).numpy()
