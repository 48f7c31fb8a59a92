"""A model's weights from any file that is known, under our names; of what kind it is follows from what it holds.

    fastbeit       a run, a checkpoint, what `fastbeit convert` wrote: `own.py`
    unilm          the BEiT authors'
    timm           BEiT of timm
    huggingface    BEiT of transformers
    vit            ViT and DeiT trained with labels, and encoders alone; dino, mocov3, mae

Every name of a file is used, or left out for a reason that is listed. What the encoder needs and is not there is an
error; a head may be missing, for the next job makes its own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastbeit.config.sections import Levels, ModelConfig, Size
from fastbeit.errors import WeightsError
from fastbeit.files import sha256
from fastbeit.model.attention import relative_position_index
from fastbeit.weights import huggingface, own, unilm, vit
from fastbeit.weights.dialect import KEY_BIAS, Channels, Dialect, Hints, Names, assembled
from fastbeit.weights.inference import check, infer, with_indices
from fastbeit.weights.own import Origin
from fastbeit.weights.pickles import Malformed, shown
from fastbeit.weights.source import Source, as_float, open_source
from fastbeit.weights.timm import TIMM

SHOWN = 6  # names of a file that is not known


@dataclass(frozen=True)
class ModelWeights:
    """A state dict of ours, and what is known of it."""

    tensors: dict[str, Tensor]  # float32; with indices
    model: ModelConfig
    image_size: Size
    mean: Channels | None  # of pixels in [0, 1]; None: the file does not say
    std: Channels | None
    origin: Origin
    levels: Levels = "high_byte"  # of 16-bit images that it was trained on
    classes: list[str] | None = None  # names of the rows of `head`; None: it has none, or nobody says them


def read_model(path: Path, num_heads: int | None = None) -> ModelWeights:
    """Weights of a run, a checkpoint, a file or a directory of any known dialect.

    Args:
        num_heads: for files that do not say; None: what they say, or heads of 64.

    Raises:
        WeightsError: it is damaged, of no known dialect or not whole, or names what it may not; nothing was run.
        RunError: it is not there (exit code 66), or a checkpoint is not usable (78).
    """
    try:
        return _own(path) if own.is_own(path) else _foreign(path, num_heads)
    except Malformed as err:
        raise WeightsError(f"'{path}' {err}") from None
    except OSError as err:
        raise WeightsError(f"'{path}' cannot be read: {err.strerror or err}") from err


def _own(path: Path) -> ModelWeights:
    found = own.read(path)
    card = found.card
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items() if not name.endswith("_index")}
    check(shapes, card.model, card.image_size)
    tensors = {name: as_float(name, found.tensors[name]) for name in shapes}
    tensors = with_indices(tensors, card.model, card.image_size)
    _check_classes(tensors, card.classes)
    said = card.mean, card.std, card.origin, card.levels, card.classes
    return ModelWeights(tensors, card.model, card.image_size, *said)


def _foreign(path: Path, num_heads: int | None) -> ModelWeights:
    source = open_source(path)
    dialect = recognise(source)
    names = dialect.translate(source.shapes)
    _check_names(names)
    hints = dialect.hints(source)
    if num_heads:
        hints = hints._replace(num_heads=num_heads)
    # first without values: what is wrong is found before gigabytes are read
    with torch.device("meta"):
        parts = {ours: torch.empty(source.shapes[name]) for name, ours in names.used.items()}
        model, image_size = _inspect(parts, hints, dialect)
    _check_config(source, model)
    values = {names.used[name]: as_float(name, tensor) for name, tensor in source.read(names.used).items()}
    _check_indices(source, model, image_size)
    origin = Origin(
        dialect=dialect.name,
        file=source.file.name,
        sha256=sha256(source.file),
        wrapper=source.wrapper,
        used=names.used,
        left_out=names.left_out | source.beside,
        notes=_notes(names),
    )
    tensors = with_indices(assembled(values), model, image_size)
    classes = hints.classes if "head.weight" in tensors else None
    _check_classes(tensors, classes)
    return ModelWeights(tensors, model, image_size, hints.mean, hints.std, origin, classes=classes)


def _check_classes(tensors: dict[str, Tensor], classes: list[str] | None) -> None:
    rows = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    if classes is not None and len(classes) != rows:
        raise Malformed(f"names {len(classes)} classes, and has a head of {rows}: not one model")


def recognise(source: Source) -> Dialect:
    """Whose file it is.

    Raises:
        Malformed: nobody's that is known.
    """
    names = source.shapes.keys()
    if huggingface.fits(names):
        return huggingface.HUGGINGFACE
    if vit.fits(names):
        return vit.recognise(source)
    if unilm.fits(names):
        has_index = any(name.endswith(unilm.INDEX) for name in names)
        pretrained = any(name.endswith("mask_token") for name in names)
        return unilm.UNILM if has_index or pretrained or source.wrapper else TIMM
    listed = ", ".join(map(shown, list(names)[:SHOWN]))
    raise Malformed(
        f"is of no known kind ({listed}, ...); known are BEiT of its authors, timm and Hugging Face, and DeiT, ViT, "
        "DINO, MoCo v3 and MAE by timm's names"
    )


def _inspect(parts: dict[str, Tensor], hints: Hints, dialect: Dialect) -> tuple[ModelConfig, Size]:
    shapes = {name: tuple(tensor.shape) for name, tensor in assembled(parts).items()}
    model, image_size = infer(shapes, hints)
    check(shapes, model, image_size, dialect.theirs)
    return model, image_size


def _check_names(names: Names) -> None:
    seen: dict[str, str] = {}
    for theirs, ours in names.used.items():
        if ours in seen:
            raise Malformed(f"has {shown(theirs)} and {shown(seen[ours])}, which are the same tensor: no such model")
        seen[ours] = theirs


def _check_config(source: Source, model: ModelConfig) -> None:
    """What a config.json says of the shape is what the weights have."""
    said = {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "intermediate_size": model.mlp_width,
        "embed_dim": model.width,
        "depth": model.depth,
    }
    args = source.config.get("model_args")
    config = source.config | (args if isinstance(args, dict) else {})
    for key, found in said.items():
        if key in config and config[key] != found:
            raise Malformed(
                f"has a config.json of {key} {shown(str(config[key]))}, and weights of {found}: not one model"
            )


def _check_indices(source: Source, model: ModelConfig, image_size: Size) -> None:
    """Indices are not read, but made; one that differs belongs to another kind of bias."""
    grid = image_size[0] // model.patch_size[0], image_size[1] // model.patch_size[1]
    for name in source.shapes:
        if name.endswith(unilm.INDEX):
            (found,) = source.read([name]).values()
            if not torch.equal(found.long(), relative_position_index(grid)):
                raise Malformed(f"has {shown(name)} of another order of offsets than BEiT's: no such model")


def _notes(names: Names) -> list[str]:
    packed = [name for name in names.used if name.endswith("attn.qkv.bias")]
    return [f"blocks.*.attn.qkv.bias: {KEY_BIAS}"] if packed else []
