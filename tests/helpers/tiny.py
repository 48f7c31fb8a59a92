"""A run that takes a second: real photos, small; a tokenizer of the true architecture, narrow, with random weights."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from fastbeit.config.pretrain import Config
from fastbeit.config.tokenizer import Architecture
from fastbeit.data.index.scan import build_index
from fastbeit.files import sha256
from fastbeit.model.beit import Beit, make_beit
from fastbeit.tokenizer.disk import save_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder, to_mapped
from helpers.waiting import finished

PHOTOS = "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"image_size": 32, "tail": "wrap", "num_workers": 0},
    "masking": {"num_masked": 6, "min_block": 2},
    "model": {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 8, "drop_path": 0.2},
    "optim": {"batch_size": 8, "steps": 6, "warmup_steps": 2, "lr": 1e-2},
    "log": {"every": 1, "save_every": 0},
}


def photo_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data"


def make_photos(folder: Path, num_photos: int = 12) -> Path:
    """Quarters of four photos, as JPEG files of 80 x 64 pixels."""
    folder.mkdir(parents=True)
    for i in range(num_photos):
        photo = Image.open(photo_folder() / PHOTOS[i % len(PHOTOS)]).convert("RGB")
        left, top = i // 4 % 2 * photo.width // 2, i // 8 * photo.height // 2
        photo.crop((left, top, left + photo.width // 2, top + photo.height // 2)).resize((80, 64)).save(
            folder / f"{i:02}.jpg", quality=95
        )
    return folder


def make_parts(folder: Path) -> dict[str, str]:
    """Index and tokenizer of a tiny run, as overrides."""
    build_index(make_photos(folder / "photos"), folder / "images.idx")
    make_tokenizer(folder / "dvae", seed=0)
    return {"data.index": str(folder / "images.idx"), "tokenizer.path": str(folder / "dvae")}


def make_tokenizer(folder: Path, seed: int) -> Path:
    """Random weights, but for the last bias: no word is more likely than another, as in a tokenizer that is trained."""
    torch.manual_seed(seed)
    architecture = Architecture(n_hid=8, n_init=8, vocab_size=32)
    encoder = Encoder(architecture)
    photo = np.asarray(Image.open(photo_folder() / PHOTOS[0]).convert("RGB").resize((128, 128)))
    with torch.no_grad():
        logits = encoder(to_mapped(torch.tensor(photo)[None]))
        encoder.get_parameter("blocks.output.conv.b").sub_(logits.mean((0, 2, 3)))
    save_tokenizer(folder, encoder, Decoder(architecture))
    return folder


def tiny_model(**model: Any) -> Beit:
    """That of `SETTINGS`, but for some settings of the model; initialised alike each time."""
    torch.manual_seed(0)
    return make_beit(Config.model_validate({**SETTINGS, "model": {**SETTINGS["model"], **model}}), vocab_size=32)


def write_config(path: Path) -> Path:
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def rewrite_state(checkpoint: Path, **changes) -> None:
    """Change what a checkpoint says, so that it still verifies."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    size = (checkpoint / "state.json").stat().st_size
    manifest["files"]["state.json"] = {"bytes": size, "sha256": sha256(checkpoint / "state.json")}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def run(*args: str, module: str = "fastbeit", **options) -> subprocess.CompletedProcess:
    """A command as its user runs it."""
    return finished(
        [sys.executable, "-m", module, *args],
        **options,
    )
