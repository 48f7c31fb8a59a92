"""Weights of fastbeit: of a run, of one of its checkpoints, or what `fastbeit convert` wrote.

The last is a directory of `model.safetensors`, under the names of our modules and in float32, and its card
`model.json`: the model's configuration, what its images were normalised with, and where every tensor came from. Both
are written whole or not at all.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbeit.config.sections import Levels, ModelConfig, Section, Size
from fastbeit.errors import CANNOT_WRITE, USAGE, RunError
from fastbeit.files import sha256, whole_folder
from fastbeit.train.checkpoint import ALIASES, MANIFEST, load_model, load_state, resolve_checkpoint
from fastbeit.train.ema import PREFIX
from fastbeit.weights.dialect import Channels
from fastbeit.weights.pickles import Malformed

WEIGHTS, CARD = "model.safetensors", "model.json"
FORMAT = 1
INDEX = "relative_position_index"


class Origin(Section):
    """Where weights come from; every name of the file is in `used` or in `left_out`."""

    dialect: str = Field(description="fastbeit, unilm, timm, huggingface, vit, dino, mocov3 or mae")
    file: str = Field(description="its name")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of it")
    wrapper: str = Field(default="", description="what the weights were under in a trainer's file")
    used: dict[str, str] = Field(default={}, description="names of the file, to ours; @ marks a third of a tensor")
    left_out: dict[str, str] = Field(default={}, description="names of the file, to the reason")
    notes: list[str] = Field(default=[], description="what else was done")


class Card(Section):
    """What `model.json` holds."""

    format: int = Field(ge=FORMAT, le=FORMAT, description="version of this layout")
    model: ModelConfig
    image_size: Size = Field(description="height and width in pixels")
    mean: Channels | None = Field(description="subtracted from pixels in [0, 1]; null: the file does not say")
    std: Channels | None = Field(description="pixels in [0, 1] are divided by it; null: likewise")
    levels: Levels = Field(default="high_byte", description="of 16-bit images, as data.levels")
    classes: list[str] | None = Field(
        default=None, description="names of the head's rows; null: it has none, or nobody"
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of model.safetensors")
    origin: Origin


class Own(NamedTuple):
    tensors: dict[str, Tensor]
    card: Card


def is_own(path: Path) -> bool:
    """Whether `read` is to read it, by what stands beside it."""
    if path.is_dir() or path.name in ALIASES:
        marks = CARD, "config.yaml", MANIFEST, "checkpoints"
        return path.name in ALIASES or path.name.startswith("step-") or any((path / one).exists() for one in marks)
    return path.name == WEIGHTS and any((path.parent / one).is_file() for one in (CARD, MANIFEST))


def read(path: Path) -> Own:
    """
    Raises:
        Malformed: a card or the weights are damaged, or there is no ViT in the run.
        RunError: no checkpoint is usable (exit code 78).
    """
    folder = path.parent if path.name == WEIGHTS else path
    return _read_converted(folder) if (folder / CARD).is_file() else _read_checkpoint(resolve_checkpoint(folder))


def _read_converted(folder: Path) -> Own:
    try:
        card = Card.model_validate_json((folder / CARD).read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise Malformed(f"has a {CARD} that cannot be read: {where}: {first['msg']}; convert again") from None
    found = sha256(folder / WEIGHTS)
    if found != card.sha256:
        raise Malformed(
            f"has a {WEIGHTS} of sha256 {found[:16]}..., and {CARD} says {card.sha256[:16]}...: damaged or replaced; "
            "convert again"
        )
    return Own(_load(folder), card)


def _load(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as err:
        raise Malformed(f"has a damaged {WEIGHTS}: {err}; convert again") from None


def _read_checkpoint(checkpoint: Path) -> Own:
    weights, state = load_model(checkpoint), load_state(checkpoint)
    config: dict[str, Any] = state.get("config", {})
    data: dict[str, Any] = config.get("data", {})
    model: dict[str, Any] = config.get("model", {})
    if not {"width", "depth", "num_heads"} <= model.keys():
        raise Malformed(f"is a checkpoint ({checkpoint.name}) of something else than a vision transformer")
    # where there is an average, it is what was judged and kept
    start = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
    left_out = {
        name: "the last step's; their moving average is taken" for name in weights if not name.startswith(start)
    }
    left_out |= {name: "follows from the grid" for name in weights if name.endswith(INDEX)}
    used = {name: name.removeprefix(start) for name in weights if name not in left_out}
    tensors = {ours: weights[name] for name, ours in used.items()}
    try:
        card = Card(
            format=FORMAT,
            # a job may have more settings of its model than those of the encoder
            model=ModelConfig.model_validate({key: model[key] for key in ModelConfig.model_fields if key in model}),
            image_size=data.get("image_size", ()),
            mean=data.get("mean"),
            std=data.get("std"),
            levels=data.get("levels", "high_byte"),
            classes=state.get("classes"),
            sha256=sha256(checkpoint / WEIGHTS),
            origin=Origin(
                dialect="fastbeit",
                file=f"{checkpoint.name}/{WEIGHTS}",
                sha256=sha256(checkpoint / WEIGHTS),
                used=used,
                left_out=left_out,
            ),
        )
    except ValidationError as err:
        first = err.errors()[0]
        raise Malformed(
            f"is a checkpoint ({checkpoint.name}) whose state.json cannot be read: {first['loc']}: {first['msg']}"
        ) from None
    return Own(tensors, card)


def save(folder: Path, tensors: dict[str, Tensor], **said: Any) -> None:
    """Write a converted model whole or not at all.

    Args:
        said: the card's fields; format and hash come from here.

    Raises:
        RunError: `folder` is there and not empty (exit code 2), or cannot be written (74).
    """
    refuse_full(folder)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if not name.endswith(INDEX)}
    try:
        with whole_folder(folder) as part:
            save_file(kept, part / WEIGHTS)
            card = Card(format=FORMAT, sha256=sha256(part / WEIGHTS), **said)
            (part / CARD).write_text(card.model_dump_json(indent=1) + "\n")
    except (OSError, SafetensorError) as err:
        raise RunError(f"'{folder}' cannot be written: {err}", CANNOT_WRITE) from err


def refuse_full(folder: Path) -> None:
    """
    Raises:
        RunError: there is something already (exit code 2).
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"'{folder}' is there and not empty; choose another -o, or remove it", USAGE)
