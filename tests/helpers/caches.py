"""A cache of tokens of a tiny run, and what of it does not depend on how it was made."""

import json
import os
from pathlib import Path

from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.jobs.tokenize import tokenize

VIEWS = 3
NUM_IMAGES = 12
BAD_IMAGE = 3
CHUNK_CROPS = 6  # two rows of three views: six chunks
COMMAND = ["fastbeit", "tokenize", "tiny.yaml"]


def configured(parts, **overrides) -> Config:
    settings = {"data.num_crops": VIEWS, **parts, **overrides}
    path = settings.pop("config")
    return load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])


def make(parts, folder: Path, **overrides) -> int:
    return tokenize(configured(parts, data__tokens=folder, **overrides), COMMAND)


def files(folder: Path) -> dict[str, bytes]:
    """What stays of a cache, by name; who made it with which command aside."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    card = json.loads(found.pop("tokens.json"))
    return {**found, "tokens.json": json.dumps({**card, "command": "", "checksum": ""}).encode()}


def facts(log: list[dict]) -> list[tuple]:
    return [tuple(line.get(key) for key in ("step", "event", "loss", "accuracy", "grad_norm")) for line in log]


def edit(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
        file.write(content)
