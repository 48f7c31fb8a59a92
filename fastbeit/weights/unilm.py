"""The BEiT authors' files (microsoft/unilm), in and out; the names are ours.

In: pre-trained and fine-tuned, released or a trainer's; of a segmentation the encoder. Out: a pickle, as theirs are,
which holds the weights and nothing else.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastbeit.weights.dialect import HALF, Dialect, Hints, Names, reason_for, sorted_out, under_prefix
from fastbeit.weights.source import Source

FILE = "model.pth"
INDEX = "relative_position_index"
PREFIXES = r"((module|backbone)\.)*"
SEGMENTATION = {
    r"(module\.)?(decode_head|auxiliary_head)\.": "a head for segmentation",
    r"fpn[1-4]\.": "makes maps of several sizes for a segmentation",
}
INDEX_REASON = "follows from the grid; it was compared"


def fits(names: Iterable[str]) -> bool:
    """A ViT by timm's and the authors' names, whose queries and values alone have a bias."""
    return any(name.endswith("blocks.0.attn.q_bias") for name in names)


def translate(names: Iterable[str]) -> Names:
    names = list(names)
    prefix = under_prefix(names, "patch_embed.proj.weight", PREFIXES)

    def reason(name: str) -> str | None:
        if name.endswith(INDEX):
            return INDEX_REASON
        return reason_for(name, SEGMENTATION) or reason_for(name.removeprefix(prefix), SEGMENTATION)

    return sorted_out(names, reason, lambda name: name.removeprefix(prefix))


def _hints(source: Source) -> Hints:
    return Hints(mean=HALF, std=HALF)


UNILM = Dialect("unilm", translate, lambda name: name, _hints)


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """`model.pth`, for their `--finetune` and `--resume`: weights under `model`, with the indices that theirs keep."""
    torch.save({"model": {name: tensor.contiguous() for name, tensor in tensors.items()}}, folder / FILE)
