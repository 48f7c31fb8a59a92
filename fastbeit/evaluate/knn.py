"""Classes by the nearest neighbours in a space of features, as DINO counts them (arXiv 2104.14294, section 4.1).

The class of an image is voted for by the k training images whose features have the greatest cosine s with its own,
each with the weight exp(s / temperature).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

K, TEMPERATURE = 20, 0.07
QUERIES, TRAIN = 256, 1 << 16  # images of each side whose cosines are in memory at once: 64 MiB
TOP = 5


class Neighbours(NamedTuple):
    """The nearest training images of m images, the nearest first."""

    cosine: Tensor  # [m, k]
    rows: Tensor  # [m, k] int64, their classes

    def best(self, k: int) -> "Neighbours":
        found = self.cosine.topk(min(k, self.cosine.shape[1]), dim=1)
        return Neighbours(found.values, self.rows.gather(1, found.indices))


def nearest(train: Tensor, rows: Tensor, queries: Tensor, k: int, device: torch.device) -> Neighbours:
    """
    Args:
        train: [n, F], of any length each; without rows there are no neighbours.
        rows: [n] int64, their classes.
        queries: [m, F].

    Returns:
        Of k or, where there are fewer, n neighbours.
    """
    found = []
    for some in queries.split(QUERIES):
        unit = F.normalize(some.to(device), dim=1)
        parts = [Neighbours(unit.new_empty(len(unit), 0), rows.new_empty(len(unit), 0, device=device))]
        for others, classes in zip(train.split(TRAIN), rows.split(TRAIN), strict=True):
            cosine = unit @ F.normalize(others.to(device), dim=1).T
            parts.append(Neighbours(cosine, classes.to(device).expand(len(unit), -1)).best(k))
        best = joined(parts, k)
        found.append(Neighbours(best.cosine.cpu(), best.rows.cpu()))
    return Neighbours(*(torch.cat(one) for one in zip(*found, strict=True)))


def joined(parts: list[Neighbours], k: int) -> Neighbours:
    """The k nearest among those of several parts of the training images."""
    return Neighbours(*(torch.cat(one, dim=1) for one in zip(*parts, strict=True))).best(k)


def votes(neighbours: Neighbours, num_classes: int) -> Tensor:
    """[m, C]; less a common factor of an image, without which they would be millions."""
    cosine, rows = neighbours
    weights = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
    return weights.new_zeros(len(cosine), num_classes).scatter_add_(1, rows, weights)


def num_right(neighbours: Neighbours, wanted: Tensor, num_classes: int) -> tuple[int, int]:
    """Of how many images the class [m] has the most votes, and of how many it is among the five with the most."""
    first = among = 0
    for start in range(0, len(wanted), QUERIES):
        some = slice(start, start + QUERIES)
        scores = votes(Neighbours(neighbours.cosine[some], neighbours.rows[some]), num_classes)
        hits = scores.topk(min(TOP, num_classes), dim=1).indices == wanted[some, None]
        first, among = first + int(hits[:, 0].sum()), among + int(hits.sum())
    return first, among
