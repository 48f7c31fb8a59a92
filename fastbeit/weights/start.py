"""Pre-trained weights as another training's start: made to fit its model, and loaded.

What a fine-tuning takes of a pre-training, as the authors' program does it: the encoder, the table that all blocks
share copied to each of them, tables and positions resized to another grid of patches. What belongs to the end of the
model (mask token, last norm, heads) is taken where it is of the same kind, or starts anew, and is named. An encoder
that does not fit is refused, with the settings that it wants.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbeit.config.finetune import VitConfig
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.engine.ranks import World
from fastbeit.engine.sharded import whole
from fastbeit.errors import ConfigError
from fastbeit.model.resize import resize_weights, share_out
from fastbeit.plural import counted
from fastbeit.train.checkpoint import ALIASES, newest_first
from fastbeit.weights.inference import HEADS
from fastbeit.weights.models import ModelWeights, read_model

SIZES = "width", "depth", "num_heads", "mlp_width", "patch_size"
INDEX = "relative_position_index"


@dataclass(frozen=True)
class Start:
    """Weights that a model starts with, and what to say of them."""

    names: list[str]  # all of the encoder, and those of the ends that are taken
    tensors: dict[str, Tensor]  # on rank 0; on the others none
    lines: list[str]  # likewise

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Give the model these weights, one at a time, and forget them; all ranks must call it."""
        for name, parameter in model.named_parameters():
            if name in self.names:
                with whole([parameter], written=True):
                    if self.tensors:
                        parameter.copy_(self.tensors.pop(name))


def start_from(
    path: Path,
    empty: nn.Module,
    model: ModelConfig,
    image_size: Size,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: list[str] | None = None,
) -> Start:
    """Read weights of any kind that `read_model` knows, and make them fit.

    Args:
        empty: what they are for, with or without values; on the meta device it costs no memory.
        model, image_size, mean, std: its configuration.
        classes: names of the rows of its `head`; None: it has none.

    Raises:
        ConfigError: the encoder is another one; says which settings it wants.
        WeightsError, RunError: as `read_model`.
    """
    found = read_model(path)
    _check_sizes(path, found, model)
    grids = [_grid(size, model.patch_size) for size in (found.image_size, image_size)]
    tensors = {name: one for name, one in found.tensors.items() if not name.endswith(INDEX)}
    lines = [f"start: {path} ({found.origin.dialect}, sha256 {found.origin.sha256[:12]})"]
    if model.relative_position == "per_block" and found.model.relative_position == "shared":
        tensors = share_out(tensors, model.depth)
        lines.append(f"start: the shared table of relative positions, copied to {counted(model.depth, 'block')}")
    if grids[0] != grids[1] and (model.absolute_position or model.relative_position != "none"):
        tensors = resize_weights(tensors, *grids)
        (old, new) = (f"{down}x{across}" for down, across in grids)
        lines.append(f"start: positions of {old} patches, resized to {new}")
    wanted = {name: tensor.shape for name, tensor in empty.state_dict().items() if not name.endswith(INDEX)}
    reasons = _left_out(tensors, wanted, found.classes != classes if found.classes and classes else False)
    taken = {name: tensor for name, tensor in tensors.items() if name not in reasons}
    lines += [f"start: {name} of the file left out: {why}" for name, why in _grouped(reasons).items()]
    missing = [name for name in wanted if name not in taken]
    assert all(name in HEADS for name in missing), missing  # else the sizes differ, and that was refused
    if "head.weight" in taken and not found.classes:
        lines.append(
            f"start: with the head, by number: the file does not name its {len(taken['head.weight']):,} classes, which "
            "are taken to be the data's"
        )
    if "lm_head.weight" in taken:
        number = f"{len(taken['lm_head.weight']):,}"
        lines.append(
            f"start: with the head of {number} visual words, which mean what the file's tokenizer meant by them"
        )
    if missing:
        lines.append(f"start: anew, for the file has none that fits: {', '.join(missing)}")
    if (found.mean, found.std) != (tuple(mean), tuple(std)) and found.mean and found.std:
        lines.append(
            f"WARNING: these weights were trained on images of data.mean={list(found.mean)} data.std={list(found.std)}"
            f"; here they are {list(mean)} and {list(std)}"
        )
    return Start([*taken], taken, lines)


def _grid(size: Size, patch_size: Size) -> Size:
    return size[0] // patch_size[0], size[1] // patch_size[1]


def _check_sizes(path: Path, found: ModelWeights, model: ModelConfig) -> None:
    """
    Raises:
        ConfigError: the encoders differ in what no resize can change.
    """
    theirs, wrong = found.model, []
    for name in SIZES:
        if getattr(theirs, name) != getattr(model, name):
            wrong.append((name, _plain(getattr(theirs, name)), _plain(getattr(model, name))))
    if theirs.absolute_position != model.absolute_position:
        wrong.append(("absolute_position", *(str(one.absolute_position).lower() for one in (theirs, model))))
    if bool(theirs.layer_scale) != bool(model.layer_scale):
        wrong.append(("layer_scale", f"{theirs.layer_scale:g}", f"{model.layer_scale:g}"))
    kinds = theirs.relative_position, model.relative_position
    if kinds[0] != kinds[1] and kinds != ("shared", "per_block"):
        wrong.append(("relative_position", *kinds))
    if wrong:
        raise ConfigError(
            f"init '{path}' is of another encoder: "
            + ", ".join(f"model.{name} {has}, here {here}" for name, has, here in wrong)
            + "; set "
            + " ".join(f"model.{name}={has}" for name, has, _ in wrong)
        )


def _plain(value: object) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def _left_out(tensors: dict[str, Tensor], wanted: dict[str, torch.Size], other_classes: bool) -> dict[str, str]:
    """Of names of the file, those that this model does not take, and why."""
    reasons = {}
    for name, tensor in tensors.items():
        kind = name.partition(".")[0]
        if name not in wanted:
            reasons[name] = NO_PLACE[kind]
        elif tensor.shape != wanted[name]:
            reasons[name] = f"it has {counted(len(tensor), 'output')}, and {wanted[name][0]:,} are wanted"
        elif kind == "head" and other_classes:
            reasons[name] = f"its {counted(wanted[name][0], 'class')} have other names, or another order"
    return reasons


NO_PLACE = {
    "mask_token": "nothing is masked here",
    "lm_head": "it predicts visual tokens",
    "norm": "the mean over patches has a norm of its own",
    "fc_norm": "the cls token has a norm of its own",
    "head": "it predicts classes",
}


def _grouped(reasons: dict[str, str]) -> dict[str, str]:
    """One line for weight and bias."""
    return {name.partition(".")[0]: why for name, why in reasons.items()}


def start_of(
    config: VitConfig,
    make_empty: Callable[[], nn.Module],
    world: World,
    is_fresh: bool,
    classes: list[str] | None = None,
) -> Start | None:
    """What `init` gives a fresh run: read on rank 0, and given to the others with `load`; all ranks must call it.

    Args:
        make_empty: makes the model, on whatever device PyTorch is told.

    Raises:
        RunError: as `start_from`, on all ranks.
    """
    found: Start | None = None

    def read() -> list[str]:
        nonlocal found
        if config.init and is_fresh:
            with torch.device("meta"):
                empty = make_empty()
            size, pixels = config.data.image_size, {"mean": config.data.mean, "std": config.data.std}
            found = start_from(Path(config.init), empty, config.model, size, **pixels, classes=classes)
        return found.names if found else []

    names = world.from_first(read)
    return found or (Start(names, {}, []) if names else None)


def lines_of(start: Start | None, init: str, first_step: int) -> list[str]:
    """For the log: what a run began with."""
    if init and first_step:
        return [f"init '{init}' is not read: the run goes on from its own checkpoint"]
    return start.lines if start else []


def missing_init(init: str, run: Path) -> list[str]:
    """A line where `init` leads nowhere, and the run has not begun."""
    path = Path(init)
    if not init or path.exists() or path.name in ALIASES or newest_first(run / "checkpoints"):
        return []
    return [f"init: '{path}' does not exist; wanted a run, a checkpoint, or weights that `fastbeit convert` reads"]
