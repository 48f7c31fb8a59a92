"""What a fine-tuned model knows: top-1 and top-5 on every image of an index, once."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, ConfigError, DataError
from fastbeit.model.classify import Classifier
from fastbeit.plural import counted
from fastbeit.train.stop import Stop
from fastbeit.train.together import together

MAX_BATCH = 64  # images a rank looks at together, in float32: of BEiT-L at 512 pixels some 3 GB
TOP = 5


@dataclass(frozen=True)
class Classification:
    """Over all valid images of an index."""

    top1: float  # share of images whose class is the most likely one
    top5: float  # or among the five most likely ones
    loss: float  # mean cross-entropy in nats, of the class alone
    num_images: int
    num_bad: int  # left out


def rows_of(index: Index, classes: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Where the classes of an index stand among those of a model, by their names.

    Returns:
        [C of the index] int64, -1: nowhere; and those of its classes that stand nowhere and have images.
    """
    row = {name: i for i, name in enumerate(classes)}
    rows = torch.tensor([row.get(name, -1) for name in index.class_names], dtype=torch.int64)
    used = np.unique(index.labels[index.labels >= 0]).tolist()
    return rows, [label for label in used if rows[label] < 0]


def check_classes(index: Index, classes: Sequence[str]) -> Tensor:
    """`rows_of` where all are known.

    Raises:
        ConfigError: the model does not know the class of an image.
    """
    rows, unknown = rows_of(index, classes)
    if unknown:
        first = int(np.flatnonzero(index.labels == unknown[0])[0])
        raise ConfigError(
            f"held-out images are of {counted(len(unknown), 'class')} that the model does not know, such as "
            f"'{index.class_names[unknown[0]]}' ('{index.name(first)}'); it has {counted(len(classes), 'class')}, such "
            f"as '{classes[0]}'"
        )
    return rows


@torch.no_grad()
def classify(
    model: Classifier, data: DataConfig, index: Index, classes: list[str], world: World, stop: Stop
) -> Classification:
    """Look at the middle of each image; all ranks must call it, and each looks at its share, none twice.

    Args:
        classes: names of the model's, in the order of its head; those of the index may be in another one.

    Raises:
        StopWanted: a rank was asked to stop before the end; on all ranks.
        RunError: none of the images is valid, they are gone, or have no label or an unknown one; on all ranks.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    count, num_bad = 0, 0
    with together(world, stop):
        rows = check_classes(index, classes).to(world.device)
        loader = make_eval_loader(
            data, index, batch_size=MAX_BATCH * world.size, rank=world.rank, world_size=world.size
        )
        with contextlib.closing(loader):
            for batch in loader:
                num_bad += len(batch.bad)
                if not len(batch.images):
                    continue
                assert batch.labels is not None
                sums += _judge(model.logits(batch.images.to(world.device)), rows[batch.labels.to(world.device)])
                count += len(batch.images)
    top1, top5, loss, count, bad = world.sum([*sums.tolist(), count, num_bad])
    if not count:
        raise DataError(f"none of the {len(index)} images of '{index.location}' is valid", DATA_MISSING)
    return Classification(top1 / count, top5 / count, loss / count, int(count), int(bad))


def _judge(logits: Tensor, labels: Tensor) -> Tensor:
    """[3] float64 of [B, C] and [B]: how many are right, how many among the first five, and the summed loss."""
    logits = logits.float()
    right = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([right[:, 0].sum().double(), right.sum().double(), loss.double()])
