"""Divides the images that were found into those to train on and those to be held out.

Which are held out follows from their content and a seed, not from their names or order. Copies of an image go to one
side, so that none is met again; classes are divided alike, each to within one image of its share.
"""

import numpy as np

from fastbeit.data.index.writer import Table
from fastbeit.data.sampling import Purpose, philox
from fastbeit.errors import DataError


def hold_out(table: Table, share: float, seed: int) -> np.ndarray:
    """[n] bool: which images are held out.

    Args:
        share: of the images, in (0, 1).

    Raises:
        DataError: there are too few to hold out one and to train on one.
    """
    sizes, samples = table.columns["size"], table.columns["sample"]
    # images of one length and one sample are copies; those that are so by chance go together too
    _, first, group = np.unique(sizes << 32 | samples, return_index=True, return_inverse=True)
    counts = np.bincount(group)
    # a group that is in two classes is counted in that of its first image
    classes = table.columns["label"][first].astype(np.int64) + 1
    words = philox(seed, 0, int(Purpose.HOLD_OUT), sizes[first], samples[first])
    order = np.lexsort((words[:, 1], words[:, 0], classes))
    wanted = _wanted(np.bincount(classes, counts).astype(np.int64), share)
    chosen, left = np.zeros(len(counts), bool), dict(enumerate(wanted.tolist()))
    for one, kind, count in zip(order.tolist(), classes[order].tolist(), counts[order].tolist(), strict=True):
        if count <= left[kind]:
            left[kind] -= count
            chosen[one] = True
    held_out = chosen[group]
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{len(table)} images are too few to hold out {share:g} of them: copies of an image stay together; take "
            "more images, or another --hold-out"
        )
    return held_out


def _wanted(sizes: np.ndarray, share: float) -> np.ndarray:
    """How many images of each class are held out: what is rounded down of one is made up for by the next."""
    ends = np.floor(np.cumsum(sizes) * share + 0.5).astype(np.int64)
    # of each class one image at least is trained on
    return np.minimum(np.diff(ends, prepend=0), np.maximum(sizes - 1, 0))
