"""Where a fine-tuned model is wrong: accuracy by class, its most confident mistakes, and what guessing would give.

One pass over an index. Of a batch the logits of all classes are in memory, of the index a few numbers an image and the
pictures that are shown.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.sections import DataConfig
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.errors import DATA_MISSING, DataError
from fastbeit.evaluate.classify import MAX_BATCH, TOP, rows_of
from fastbeit.model.classify import Classifier

NUM_MISTAKES = 20  # that are kept as pictures


@dataclass(frozen=True)
class Mistake:
    sample: int  # row of the index
    image: Tensor  # [height, width, 3] uint8, as the model sees it
    label: int
    guess: int
    probability: float  # of the guess


@dataclass(frozen=True)
class ClassScore:
    label: int
    num_images: int
    num_right: int
    taken_for: int  # the class that it is most often mistaken for

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_images


@dataclass(frozen=True)
class Answers:
    """What a model of C classes says of all valid images of an index whose class it knows."""

    labels: Tensor  # [n] int64
    guesses: Tensor  # [n] int64
    top1: float  # share of images whose class is the most likely one
    top5: float  # or among the five most likely ones
    loss: float  # mean cross-entropy in nats
    num_bad: int  # that cannot be decoded, left out
    num_unknown: int  # of classes that the model was not trained on, left out
    mistakes: list[Mistake]  # the most confident first, at most `NUM_MISTAKES`

    @cached_property
    def counts(self) -> dict[int, int]:
        """Images by class."""
        labels, counts = self.labels.unique(return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    @property
    def num_mistakes(self) -> int:
        return int((self.labels != self.guesses).sum())

    def share_of(self, classes: Sequence[int]) -> float:
        """Share of the images that are of some classes."""
        return sum(self.counts.get(label, 0) for label in classes) / len(self.labels)

    def worst_classes(self, most: int) -> list[ClassScore]:
        """Those with the least accuracy, of equals those with more images first; only classes with mistakes."""
        wrong = self.labels != self.guesses
        right = self.labels[~wrong].bincount(minlength=max(self.counts) + 1).tolist()
        scores = []
        for label in self.labels[wrong].unique().tolist():
            taken_for = int(self.guesses[wrong & (self.labels == label)].mode().values)
            scores.append(ClassScore(label, self.counts[label], right[label], taken_for))
        return sorted(scores, key=lambda one: (one.accuracy, -one.num_images))[:most]


def most_frequent(index: Index, classes: Sequence[str], most: int) -> list[int]:
    """The classes that most images of an index have, by their places among `classes`."""
    labels = torch.from_numpy(index.labels[index.labels >= 0].astype("int64"))
    known = rows_of(index, classes)[0][labels]
    counts = known[known >= 0].bincount(minlength=len(classes))
    return counts.sort(descending=True, stable=True).indices[:most].tolist()


@torch.no_grad()
def examine(model: Classifier, data: DataConfig, index: Index, classes: Sequence[str], device: torch.device) -> Answers:
    """Look at the middle of each image once.

    Args:
        classes: names, in the order of the head; those of `index` may be in another order.

    Raises:
        DataError: no image is valid and of a class that is known, or an image has no label (66).
    """
    found = _Gathered()
    rows, _ = rows_of(index, classes)
    with contextlib.closing(make_eval_loader(data, index, batch_size=MAX_BATCH, rank=0, world_size=1)) as loader:
        for batch in loader:
            if len(batch.images):
                assert batch.labels is not None
                found.add(batch, rows[batch.labels], model.logits(batch.images.to(device)).float().cpu())
            found.num_bad += len(batch.bad)
    return found.answers(index)


class _Gathered:
    """What is gathered from batch to batch."""

    def __init__(self) -> None:
        self.num_bad = self.num_unknown = 0
        self._labels: list[Tensor] = []
        self._guesses: list[Tensor] = []
        self._sums = torch.zeros(2, dtype=torch.float64)  # images among the five most likely, loss
        self._mistakes: list[Mistake] = []

    def add(self, batch: Batch, labels: Tensor, logits: Tensor) -> None:
        """labels [B] int64, -1: unknown; logits [B, C] float32."""
        known = (labels >= 0).nonzero()[:, 0]
        self.num_unknown += len(labels) - len(known)
        labels, logits = labels[known], logits[known]
        best = logits.topk(min(TOP, logits.shape[1])).indices
        in_best = (best == labels[:, None]).sum()
        self._sums += torch.stack([in_best, F.cross_entropy(logits, labels, reduction="sum")]).double()
        self._labels.append(labels)
        self._guesses.append(best[:, 0].clone())  # not the other four
        wrong = (best[:, 0] != labels).nonzero()[:, 0]
        sure = logits[wrong].softmax(1).amax(1)
        for which in sure.topk(min(NUM_MISTAKES, len(sure))).indices.tolist():
            row = int(wrong[which])
            place = int(known[row])
            image = batch.images[place].cpu().clone()  # not the whole batch
            guess = int(best[row, 0])
            self._mistakes.append(Mistake(int(batch.sample[place]), image, int(labels[row]), guess, float(sure[which])))
        self._mistakes = sorted(self._mistakes, key=lambda one: (-one.probability, one.sample))[:NUM_MISTAKES]

    def answers(self, index: Index) -> Answers:
        labels, guesses = (
            torch.cat([torch.empty(0, dtype=torch.int64), *found]) for found in (self._labels, self._guesses)
        )
        if not len(labels):
            raise DataError(
                f"none of the {len(index)} images of '{index.location}' is valid and of a class that the model was "
                "trained on",
                DATA_MISSING,
            )
        in_best, loss = (self._sums / len(labels)).tolist()
        top1 = float((labels == guesses).double().mean())
        return Answers(labels, guesses, top1, in_best, loss, self.num_bad, self.num_unknown, self._mistakes)
