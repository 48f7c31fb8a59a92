"""A small training of a dVAE on photos: its settings, its images, one step of it."""

import copy
from pathlib import Path

import torch

from fastbeit.config.sections import DataConfig
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader
from fastbeit.tokenizer.training.objective import DvaeTrainer, gumbel_noise
from helpers.tiny import make_photos

TINY = {
    "data": {"image_size": 32, "num_workers": 0},
    "model": {"n_hid": 8, "n_init": 16, "vocab_size": 24},
    "optim": {"batch_size": 8, "steps": 6},
    "engine": {"device": "cpu"},
    "log": {"every": 1, "save_every": 500, "keep": 1},
}


def photo_index(folder: Path) -> Path:
    build_index(make_photos(folder / "images"), folder / "images.idx")
    return folder / "images.idx"


def crops(index_path: Path, num_images: int, seed: int = 0) -> torch.Tensor:
    """uint8 [n, 32, 32, 3]"""
    loader = make_loader(
        DataConfig(image_size=(32, 32), tail="wrap", num_workers=0, pipeline="torch"),
        open_index(index_path),
        token_size=None,
        batch_size=num_images,
        seed=seed,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=1,
    )
    return next(iter(loader)).images


def config(**changes) -> TokenizerTrainConfig:
    """With `section__key=value` changed."""
    values = copy.deepcopy(TINY)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return TokenizerTrainConfig.model_validate(values)


def step_of(trainer: DvaeTrainer, images: torch.Tensor, step: int, seed: int) -> tuple[torch.Tensor, ...]:
    """What the model gives for a step, with noise of this seed."""
    of, B = trainer.config, len(images)
    noise = gumbel_noise((B, of.model.vocab_size, 4, 4), torch.Generator().manual_seed(seed))
    return trainer(images, noise, torch.full((B,), of.temperature_at(step)), torch.full((B,), of.kl_weight_at(step)))
