"""What is looked at on frozen features: which classes there are, the features of labelled images, and k-NN on them.

Several ranks share the images, and say the same in the end.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.labelled import check_labels, make_eval_loader
from fastbeit.data.progress import Progress
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError, DataError
from fastbeit.evaluate.classify import rows_of
from fastbeit.evaluate.features import Kind, features_of
from fastbeit.evaluate.knn import K, Neighbours, joined, nearest, num_right
from fastbeit.model.vit import VisionTransformer
from fastbeit.plural import counted
from fastbeit.train.stop import Stop
from fastbeit.train.together import together

MAX_BATCH = 256  # images a rank looks at together


@dataclass(frozen=True)
class Classes:
    """Those that have images in training; labels with gaps between them make no rows without images."""

    names: list[str]
    train: np.ndarray  # row of each label of the training index; -1: it has no image
    val: np.ndarray  # likewise of the other index, by the names of its classes
    num_strange: int  # classes of the other index that have no image in training

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Cached:
    """Features of this rank's share of the images."""

    values: Tensor  # [n, L, F] float32, on the host
    rows: Tensor  # [n] int64, into `Classes.names`; -1: of a class without images in training
    num_bad: int


def classes_of(train: Index, val: Index) -> Classes:
    """
    Raises:
        DataError: an image has no label (66).
        ConfigError: there is one class, or the two indices have none in common.
    """
    for index in (train, val):
        check_labels(index)
    names = [train.class_names[label] for label in np.unique(train.labels)]
    if len(names) < 2:
        raise ConfigError(
            f"all images to learn from, such as '{train.name(0)}', are of one class, '{names[0]}'; a probe wants two "
            "or more"
        )
    (rows, _), (val_rows, unknown) = (rows_of(index, names) for index in (train, val))
    if len(unknown) == len(np.unique(val.labels)):
        raise ConfigError(
            f"held-out images and those to learn from have no class in common: '{val.class_names[unknown[0]]}' there, "
            f"'{names[0]}' here, for example; give both the same names"
        )
    return Classes(names, rows.numpy(), val_rows.numpy(), len(unknown))


@torch.no_grad()
def extract(
    model: VisionTransformer,
    data: DataConfig,
    index: Index,
    rows: np.ndarray,
    blocks: list[int],
    kind: Kind,
    world: World,
    dtype: torch.dtype,
    what: str = "",
) -> Cached:
    """Features of the middle of each image of this rank's share.

    Args:
        rows: of each label of the index.
        dtype: of activations.
        what: said on stderr with how far it is; empty: nothing is.

    Raises:
        DataError: the data are gone (66).
    """
    loader = make_eval_loader(data, index, batch_size=MAX_BATCH * world.size, rank=world.rank, world_size=world.size)
    half = dtype != torch.float32
    values, found, count, num_bad = torch.empty(0), [], 0, 0
    with contextlib.closing(loader), Progress(what, len(index)) if what else contextlib.nullcontext() as progress:
        for batch in loader:
            num_bad += len(batch.bad)
            if len(batch.images):
                assert batch.labels is not None
                with torch.autocast(world.device.type, dtype=dtype, enabled=half):
                    outputs = features_of(model, batch.images.to(world.device), blocks, kind)
                some = torch.stack([*outputs.values()], dim=1)
                if not count:
                    # memory is taken when it is written
                    values = torch.empty(len(index), *some.shape[1:])
                values[count : count + len(some)] = some.cpu()
                count += len(some)
                found.append(torch.from_numpy(rows)[batch.labels])
            if progress:
                progress.advance(len(batch.images) + len(batch.bad), len(batch.bad))
    return Cached(values[:count], torch.cat(found) if found else torch.empty(0, dtype=torch.int64), num_bad)


@dataclass(frozen=True)
class KnnFigures:
    """Of one block."""

    top1: float  # share of images whose class has the most votes
    top5: float


def knn(train: Cached, val: Cached, num_classes: int, k: int, world: World, stop: Stop) -> list[KnnFigures]:
    """By block; all ranks must call it, and get the same.

    Raises:
        StopWanted: a rank was asked to stop; on all ranks.
        DataError: none of the images of an index is valid; on all ranks.
    """
    counts = world.sum([len(train.rows), len(val.rows)])
    if not all(counts):
        raise DataError(f"none of the images that a probe {'classifies' if counts[0] else 'learns from'} is valid")
    wanted = torch.cat(world.gather([val.rows]))
    figures = []
    for block in range(max(world.gather([train.values.shape[1] if len(train.rows) else 0]))):
        queries = torch.cat(world.gather([val.values[:, block].clone()] if len(val.rows) else []))
        with together(world, stop):
            own = train.values[:, block] if len(train.rows) else queries[:0]
            neighbours = nearest(own, train.rows, queries, k, world.device)
        merged = joined([Neighbours(*one) for one in world.gather([tuple(neighbours)])], k)
        first, among = num_right(merged, wanted, num_classes)
        figures.append(KnnFigures(first / len(wanted), among / len(wanted)))
    return figures


@dataclass(frozen=True)
class KnnProbe:
    """k-NN on one block's features, cls and the mean over the patches, while a model is trained."""

    data: DataConfig
    index: Index
    val_index: Index
    classes: Classes
    block: int

    def see(self, model: VisionTransformer, dtype: torch.dtype, world: World, stop: Stop) -> KnnFigures:
        """All ranks must call it, and get the same; errors as `knn`."""
        how = [self.block], "concat", world, dtype
        with together(world, stop):
            known = extract(model, self.data, self.index, self.classes.train, *how)
            asked = extract(model, self.data, self.val_index, self.classes.val, *how)
        (figures,) = knn(known, asked, len(self.classes), K, world, stop)
        return figures


def open_probe(data: DataConfig, index: Path, val_index: Path, block: int) -> KnnProbe:
    """
    Args:
        data: of the training.

    Raises:
        DataError: an index is not there, or an image has no label (66).
        ConfigError: as `classes_of`.
    """
    train, val = (open_index(path, data.levels) for path in (index, val_index))
    # DALI makes no centre crops
    return KnnProbe(data.model_copy(update={"pipeline": "torch"}), train, val, classes_of(train, val), block)


def strange(classes: Classes) -> str:
    """In words, that some classes cannot be right; empty: all can."""
    if not classes.num_strange:
        return ""
    return f"{counted(classes.num_strange, 'class')} of the held-out images without an image in training: never right"
