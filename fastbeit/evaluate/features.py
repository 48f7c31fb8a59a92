"""What a frozen encoder makes of images: the raw outputs of its blocks, of the middle of each image.

No norm is applied, neither the last one of pre-training (`norm`) nor that of a fine-tuning (`fc_norm`), as in the
authors' linear probe.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from fastbeit.config.sections import DataConfig
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import EvalBatches
from fastbeit.data.progress import Progress
from fastbeit.data.workers import load_items
from fastbeit.errors import ConfigError
from fastbeit.model.vit import VisionTransformer
from fastbeit.train.stop import Stop

Kind = Literal["cls", "mean", "concat", "patches"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BATCH = 64  # images that are looked at together
T = TypeVar("T")


def check_blocks(blocks: Iterable[int] | None, depth: int) -> list[int]:
    """The blocks in their order; None: the last.

    Raises:
        ConfigError: there are no such blocks.
    """
    found = [depth - 1] if blocks is None else sorted(set(blocks))
    if wrong := [block for block in found if not 0 <= block < depth]:
        raise ConfigError(f"block {wrong[0]} is wanted of a model of {depth}, which are 0 to {depth - 1}")
    if not found:
        raise ConfigError(f"no block is wanted; name some of 0 to {depth - 1}")
    return found


def check_kind(kind: str) -> None:
    """
    Raises:
        ConfigError: there is no such kind of feature.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} of features: there are {', '.join(KINDS)}")


@torch.no_grad()
def features_of(model: VisionTransformer, images: Tensor, blocks: list[int], kind: Kind) -> dict[int, Tensor]:
    """By block, in float32.

    Args:
        images: [B, height, width, 3] uint8.
        kind: cls: the cls token, [B, D]; mean: over the patches, [B, D]; concat: both, in this order, [B, 2 D];
            patches: all of them in their places, [B, grid height, grid width, D].
    """
    size, patch = model.patch_embed.image_size, model.patch_embed.patch_size
    grid = size[0] // patch[0], size[1] // patch[1]

    def of(x: Tensor) -> Tensor:
        if kind == "patches":
            return x[:, 1:].unflatten(1, grid)
        parts = {"cls": x[:, :1], "mean": x[:, 1:].mean(1, keepdim=True)}
        return torch.cat([parts[name] for name in (parts if kind == "concat" else [kind])], dim=2).squeeze(1)

    return {block: of(x.float()) for block, x in model.block_outputs(images, blocks).items()}


def look_at(
    data: DataConfig, index: Index, ask: Callable[[Tensor], T], device: torch.device, stop: Stop, what: str
) -> Iterator[tuple[Batch, T | None]]:
    """What `ask` says of the middle of all images of an index, in its order, and how far it is on stderr.

    A bad image is left out of its batch and listed in `bad`; None: all of a batch are. Ends early where a stop is
    wanted.

    Args:
        ask: given [B, height, width, 3] uint8 on the device.

    Raises:
        DataError: while iterating, when the data are gone (66).
    """
    parts = (range(start, min(start + BATCH, len(index))) for start in range(0, len(index), BATCH))
    loader = load_items(EvalBatches(data, index), parts, data.num_workers)
    with contextlib.closing(loader), Progress(what, len(index)) as progress:
        for batch in stop.until_wanted(loader):
            yield batch, ask(batch.images.to(device)) if len(batch.images) else None
            progress.advance(len(batch.images) + len(batch.bad), len(batch.bad))
