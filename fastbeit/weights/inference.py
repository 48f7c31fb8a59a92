"""Which model a state dict is of: its configuration from names and shapes, and whether all of it is there."""

import math
import re
from collections.abc import Callable

import torch
from pydantic import ValidationError
from torch import Tensor

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.model.attention import relative_position_index
from fastbeit.model.resize import BLOCK_TABLE, CLS_ROWS, SHARED_TABLE
from fastbeit.model.vit import VisionTransformer
from fastbeit.weights.dialect import Hints
from fastbeit.weights.pickles import Malformed, shown

Shapes = dict[str, tuple[int, ...]]
HEAD_WIDTH = 64  # of every model of the paper and of those that it is compared with
# no model comes near these; a hostile file does not get to say how large ours is
MAX_WIDTH, MAX_DEPTH, MAX_PATCHES = 1 << 14, 256, 1 << 12
# what may be missing, for a job makes it anew: name, and sizes in width and number of outputs
HEADS = {
    "mask_token": lambda width, _: (1, 1, width),
    "norm.weight": lambda width, _: (width,),
    "norm.bias": lambda width, _: (width,),
    "fc_norm.weight": lambda width, _: (width,),
    "fc_norm.bias": lambda width, _: (width,),
    "lm_head.weight": lambda width, outputs: (outputs, width),
    "lm_head.bias": lambda width, outputs: (outputs,),
    "head.weight": lambda width, outputs: (outputs, width),
    "head.bias": lambda width, outputs: (outputs,),
}


def infer(shapes: Shapes, hints: Hints) -> tuple[ModelConfig, Size]:
    """The encoder's configuration and its images' size in pixels.

    Args:
        shapes: under our names.
        hints: what shapes do not tell; where it tells what they do, they must agree.

    Raises:
        Malformed: there is no such model.
    """
    width, _, *patch = _shape(shapes, "patch_embed.proj.weight", 4)
    depth = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    if not 1 <= depth <= MAX_DEPTH or not 1 <= width <= MAX_WIDTH:
        raise Malformed(f"is of {depth} blocks of width {width}; up to {MAX_DEPTH} of {MAX_WIDTH} are read")
    grid, heads = _grid(shapes, hints, patch), _heads(shapes, hints, width)
    if not 1 <= grid[0] * grid[1] <= MAX_PATCHES:
        raise Malformed(f"is for images of {grid[0]}x{grid[1]} patches; from 1 to {MAX_PATCHES} in all are read")
    kind = "shared" if SHARED_TABLE in shapes else "per_block" if f"blocks.0.{BLOCK_TABLE}" in shapes else "none"
    scale = hints.layer_scale or (0.1 if depth <= 12 else 1e-5)  # where training began, in the paper
    try:
        model = ModelConfig(
            width=width,
            depth=depth,
            num_heads=heads,
            mlp_width=_shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
            patch_size=(patch[0], patch[1]),
            relative_position=kind,
            absolute_position="pos_embed" in shapes,
            layer_scale=scale if "blocks.0.gamma_1" in shapes else 0.0,
        )
    except ValidationError as err:
        raise Malformed(f"is of no model that can be built: {err.errors()[0]['msg']}") from None
    return model, (grid[0] * patch[0], grid[1] * patch[1])


def check(shapes: Shapes, model: ModelConfig, image_size: Size, theirs: Callable[[str], str] = str) -> None:
    """Every tensor of the encoder is there by name and shape, and no other but those of heads, which are whole.

    Args:
        theirs: for messages, what a tensor of ours is called in the file.

    Raises:
        Malformed: the first that is missing, of another shape, or unknown.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_encoder(model, image_size).items()}
    for name, shape in wanted.items():
        if name.endswith("relative_position_index"):
            continue
        if name not in shapes:
            raise Malformed(f"has no {shown(theirs(name))}, which {_sizes(shape)} is wanted; it is not whole")
        if shapes[name] != shape:
            raise Malformed(
                f"has {shown(theirs(name))} {_sizes(shapes[name])}, and {_sizes(shape)} is wanted by a model of width "
                f"{model.width}, {model.depth} blocks, {model.num_heads} heads and images of {_sizes(image_size)}"
            )
    for name, shape in shapes.items():
        if name not in wanted and name not in HEADS:
            raise Malformed(
                f"has {shown(theirs(name).removeprefix('?'))} {_sizes(shape)}, which no BEiT has; nothing is left out "
                "without a reason: take it out of the file if it is not needed"
            )
    _check_heads(shapes, model.width, theirs)


def _check_heads(shapes: Shapes, width: int, theirs: Callable[[str], str]) -> None:
    for name in HEADS:
        kind, _, part = name.partition(".")
        outputs = shapes.get(f"{kind}.weight", (0,))[:1]
        shape = HEADS[name](width, *outputs)
        if part and f"{kind}.weight" in shapes and name not in shapes:
            raise Malformed(f"has {shown(theirs(f'{kind}.weight'))} and no {shown(theirs(name))}; it is not whole")
        if name in shapes and shapes[name] != shape:
            raise Malformed(f"has {shown(theirs(name))} {_sizes(shapes[name])}, and {_sizes(shape)} is wanted")


def empty_encoder(model: ModelConfig, image_size: Size) -> dict[str, Tensor]:
    """The state dict of the encoder, without values."""
    with torch.device("meta"):
        encoder = VisionTransformer(
            model.model_copy(update={"depth": 1}), image_size=image_size, mean=(0,), std=(1,), kernels=Kernels()
        )
    # blocks are alike; one of them is made, for those of large models take a second
    one = encoder.state_dict()
    rest = {name: tensor for name, tensor in one.items() if not name.startswith("blocks.")}
    block = {name.removeprefix("blocks.0."): tensor for name, tensor in one.items() if name.startswith("blocks.")}
    return rest | {f"blocks.{i}.{name}": tensor for i in range(model.depth) for name, tensor in block.items()}


def with_indices(tensors: dict[str, Tensor], model: ModelConfig, image_size: Size) -> dict[str, Tensor]:
    """A state dict together with the indices of its tables, as modules keep them."""
    grid = image_size[0] // model.patch_size[0], image_size[1] // model.patch_size[1]
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    index = relative_position_index(grid) if tables else None
    return tensors | {name.removesuffix("bias_table") + "index": index.clone() for name in tables if index is not None}


def _grid(shapes: Shapes, hints: Hints, patch: list[int]) -> Size:
    """Patches down and across; square unless the file says otherwise."""
    positions, table = shapes.get("pos_embed"), shapes.get(SHARED_TABLE) or shapes.get(f"blocks.0.{BLOCK_TABLE}")
    if hints.image_size:
        return hints.image_size[0] // patch[0], hints.image_size[1] // patch[1]
    if positions:
        num_patches = _shape(shapes, "pos_embed", 3)[1] - 1
        side = math.isqrt(max(0, num_patches))
        if side and side * side == num_patches:
            return side, side
        what = f"positions of {num_patches} patches"
    elif table:
        offsets = table[0] - CLS_ROWS
        side = math.isqrt(max(0, offsets))
        if side % 2 and side * side == offsets:
            return (side + 1) // 2, (side + 1) // 2
        what = f"a table of {offsets} offsets"
    else:
        what = "neither positions nor a table"
    raise Malformed(
        f"has {what}, from which no square grid follows; non-square images are read from runs of fastbeit and where a "
        "config.json says their image_size"
    )


def _heads(shapes: Shapes, hints: Hints, width: int) -> int:
    table = shapes.get(SHARED_TABLE) or shapes.get(f"blocks.0.{BLOCK_TABLE}")
    of_table = table[1] if table and len(table) == 2 else None
    if of_table and hints.num_heads and of_table != hints.num_heads:
        raise Malformed(f"has tables of {of_table} heads, and {hints.num_heads} were said")
    heads = of_table or hints.num_heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)
    if not heads:
        raise Malformed(f"is of width {width}, not a multiple of {HEAD_WIDTH}: say --num-heads")
    return heads


def _shape(shapes: Shapes, name: str, num_dims: int) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != num_dims:
        raise Malformed(f"wants {name} with {num_dims} dimensions, found {list(shape) or 'none'}")
    return shape


def _sizes(shape: tuple[int, ...]) -> str:
    return str(list(shape))
