"""What a fine-tuned model knows: top-1 and top-5 on every image of an index, once."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, DataError
from fastbeit.model.classify import Classifier
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


@torch.no_grad()
def classify(model: Classifier, data: DataConfig, index: Index, world: World, stop: Stop) -> Classification:
    """Look at the middle of each image; all ranks must call it, and each looks at its share, none twice.

    Raises:
        StopWanted: a rank was asked to stop before the end; on all ranks.
        DataError: none of the images is valid, or an image has no label (66); on all ranks.
    """
    found = torch.zeros(4, dtype=torch.float64, device=world.device)
    num_bad = 0
    loader = make_eval_loader(data, index, batch_size=MAX_BATCH * world.size, rank=world.rank, world_size=world.size)
    with contextlib.suppress(StopWanted), contextlib.closing(loader), stop.interrupts():
        for batch in loader:
            num_bad += len(batch.bad)
            if not len(batch.images):
                continue
            assert batch.labels is not None
            labels = batch.labels.to(world.device)
            logits = model.logits(batch.images.to(world.device)).float()
            best = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            found += torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels))]).double()
    stops, bad, *sums = world.sum([stop.wanted, num_bad, *found.tolist()])
    if stops:
        raise StopWanted
    top1, top5, loss, count = sums
    if not count:
        raise DataError(f"none of the {len(index)} images of '{index.location}' is valid", DATA_MISSING)
    return Classification(top1 / count, top5 / count, loss / count, int(count), int(bad))
