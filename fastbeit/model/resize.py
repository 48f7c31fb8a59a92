"""Another resolution: relative-position tables and position embeddings of one grid of patches, made to fit another.

A table is resized as the authors' fine-tuning does it. The old table's values keep their place near the centre, and
move outwards farther off: their distances grow as a geometric series 1 + q + q^2 + ..., whose q is sought so that the
old grid's last offset comes to lie on the new grid's. Between them a cubic spline is laid. Plain interpolation blurs
what adjacent patches mean to one another, and costs accuracy on ADE20K
(https://github.com/microsoft/unilm/issues/376).

The authors take `scipy.interpolate.interp2d`, which SciPy 1.14 removed. A spline on a grid is linear in its values, and
its two axes do not mix: so it is one matrix for each axis here, which equals SciPy's to rounding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.sections import Size

Q_RANGE, Q_PRECISION = (1.01, 1.5), 1e-6  # the authors'
CLS_ROWS = 3  # of a table: cls to patch, patch to cls, cls to cls
SHARED_TABLE, BLOCK_TABLE = "rel_pos_bias.relative_position_bias_table", "attn.relative_position_bias_table"


def resize_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """The relative-position bias for another grid.

    Args:
        table: [(2 * height - 1) * (2 * width - 1) + 3, H] of the grid `old`; the last three rows are those of cls.
        old, new: patches down and across. Axes are resized apart, so grids need not be square; the authors' are.

    Returns:
        The table of the grid `new`, of the same dtype. The rows of cls are the same bits; so is all of it where the
        grids are equal. A smaller grid gets the middle of the old table, as with the authors.

    Raises:
        ValueError: the table is not of the grid `old`.
    """
    sizes = [2 * side - 1 for side in old]
    if len(table) != sizes[0] * sizes[1] + CLS_ROWS:
        raise ValueError(
            f"a table of a {old[0]}x{old[1]} grid has {sizes[0] * sizes[1] + CLS_ROWS} rows; got {len(table)}"
        )
    if old == new:
        return table
    down, across = (torch.from_numpy(_axis(2 * a - 1, 2 * b - 1)) for a, b in zip(old, new, strict=True))
    patches = table[:-CLS_ROWS].double().cpu().unflatten(0, sizes)  # [offsets down, offsets across, H]
    resized = torch.einsum("yi,xj,ijh->yxh", down, across, patches).flatten(0, 1)
    return torch.cat((resized.to(table), table[-CLS_ROWS:]))


def resize_positions(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Position embeddings for another grid: bicubic; that of cls is kept.

    Args:
        positions: [1, S, D] of the grid `old`, cls first.

    Returns:
        [1, S, D] of the grid `new`.

    Raises:
        ValueError: they are not of the grid `old`.
    """
    if positions.shape[1] != old[0] * old[1] + 1:
        raise ValueError(
            f"positions of a {old[0]}x{old[1]} grid are {old[0] * old[1] + 1} with cls; got {positions.shape[1]}"
        )
    if old == new:
        return positions
    patches = positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, height, width]
    resized = F.interpolate(patches, new, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)


def resize_weights(weights: dict[str, Tensor], old: Size, new: Size) -> dict[str, Tensor]:
    """A state dict for another grid: tables and positions resized; indices, which follow from the grid, left out."""
    resized = {}
    for name, tensor in weights.items():
        if name.endswith("relative_position_index"):
            continue
        if name.endswith("relative_position_bias_table"):
            tensor = resize_table(tensor, old, new)
        elif name == "pos_embed":
            tensor = resize_positions(tensor, old, new)
        resized[name] = tensor
    return resized


def share_out(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A state dict in which each block has a copy of the table that all share; it computes the same, exactly.

    A state dict without a shared table is given back as it is. Indices of the shared table are left out.
    """
    if SHARED_TABLE not in weights:
        return weights
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("rel_pos_bias.")}
    return own | {f"blocks.{i}.{BLOCK_TABLE}": weights[SHARED_TABLE].clone() for i in range(depth)}


def _axis(old: int, new: int) -> np.ndarray:
    """[new, old] weights that turn values at the offsets of one axis into those at the new ones; both are odd."""
    if old == new:
        return np.eye(old)
    places = _places(old, new)
    offsets = np.arange(-(new // 2), new // 2 + 1, dtype=float)
    # outside of the old table its border is repeated
    return _spline(places, np.clip(offsets, places[0], places[-1]))


def _places(old: int, new: int) -> np.ndarray:
    """Where, in offsets of the new grid, those of the old one lie."""
    powers = np.arange(old // 2)
    low, high = Q_RANGE
    q = low
    while high - low > Q_PRECISION:
        q = (low + high) / 2
        if np.sum(q**powers) > new // 2:
            high = q
        else:
            low = q
    distances = np.cumsum(q**powers)
    return np.concatenate((-distances[::-1], [0.0], distances))


def _spline(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[len(at), len(x)] weights of the cubic spline through values at x; its first and last two pieces are one each.

    Of fewer than four values the polynomial through them.
    """
    degree = min(3, len(x) - 1)
    inner = x[2:-2] if degree == 3 else x[:0]
    knots = np.concatenate((np.full(degree + 1, x[0]), inner, np.full(degree + 1, x[-1])))
    # values at x are basis(x) @ coefficients, so values at `at` are basis(at) @ inverse(basis(x)) @ values
    return np.linalg.solve(_basis(knots, degree, x).T, _basis(knots, degree, at).T).T


def _basis(knots: np.ndarray, degree: int, at: np.ndarray) -> np.ndarray:
    """[len(at), len(knots) - degree - 1]: the B-splines on these knots, by the recursion of Cox and de Boor."""
    spans = len(knots) - 1
    # the piece that each place lies in; the last place belongs to the last piece
    piece = np.clip(np.searchsorted(knots, at, side="right") - 1, degree, spans - degree - 1)
    values = (piece[:, None] == np.arange(spans)).astype(float)
    for k in range(1, degree + 1):
        rising = np.zeros((len(at), spans - k))
        for i in range(spans - k):
            before, after = knots[i + k] - knots[i], knots[i + k + 1] - knots[i + 1]
            if before:
                rising[:, i] += (at - knots[i]) / before * values[:, i]
            if after:
                rising[:, i] += (knots[i + k + 1] - at) / after * values[:, i + 1]
        values = rising
    return values
