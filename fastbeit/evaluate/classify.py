"""What a fine-tuned model knows: top-1 and top-5 on every image of an index, once."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, ConfigError, DataError, RunError
from fastbeit.model.classify import Classifier
from fastbeit.plural import counted
from fastbeit.train.stop import Stop, StopWanted

MAX_BATCH = 256  # images a rank looks at together
TOP = 5


@dataclass(frozen=True)
class Classification:
    """Over all valid images of an index."""

    top1: float  # share of images whose class is the most likely one
    top5: float  # or among the five most likely ones
    loss: float  # mean cross-entropy in nats, of the class alone
    num_images: int
    num_bad: int  # left out


def numbers_of(index: Index, classes: list[str]) -> Tensor:
    """[C of the index] int64: each of an index's classes by its number among a model's; -1: no image is of it.

    Raises:
        ConfigError: the model does not know the class of an image.
    """
    number = {name: i for i, name in enumerate(classes)}
    used = set(np.unique(index.labels[index.labels >= 0]).tolist())
    unknown = [name for i, name in enumerate(index.class_names) if i in used and name not in number]
    if unknown:
        raise ConfigError(
            f"'{index.location}' has images of {counted(len(unknown), 'class')} that the model does not know, such as "
            f"'{unknown[0]}'; it has {counted(len(classes), 'class')}, such as '{classes[0]}'"
        )
    return torch.tensor([number.get(name, -1) for name in index.class_names])


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
    count, num_bad, error = 0, 0, None
    try:
        numbers = numbers_of(index, classes).to(world.device)
        loader = make_eval_loader(
            data, index, batch_size=MAX_BATCH * world.size, rank=world.rank, world_size=world.size
        )
        with contextlib.suppress(StopWanted), contextlib.closing(loader), stop.interrupts():
            for batch in loader:
                num_bad += len(batch.bad)
                if not len(batch.images):
                    continue
                assert batch.labels is not None
                sums += _judge(model.logits(batch.images.to(world.device)), numbers[batch.labels.to(world.device)])
                count += len(batch.images)
    except RunError as err:
        error = err
    now = world.agree(stop=stop.wanted, save=False, bad=[], error=error)
    if now.error:
        raise now.error
    if now.stops:
        raise StopWanted
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
