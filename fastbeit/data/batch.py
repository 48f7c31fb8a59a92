"""What one rank is given of a step: images, and where they come from."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a step's images."""

    images: Tensor  # [B, H, W, 3] uint8, the patch view
    token_images: Tensor | None  # [B, h, w, 3] uint8, the token view: the same box, flip and jitter
    sample: Tensor  # [B] int64, rows of the index
    epoch: Tensor  # [B] int64; with tail=wrap a batch can straddle epochs
    bad: list[tuple[int, str]] = field(default_factory=list)  # (row of the index, path and reason) of images replaced


@dataclass
class TokenViews:
    """All token views of some images, in the order of the index."""

    rows: range  # of the index
    images: Tensor  # [n, K, h, w, 3] uint8; 0 where the image is bad
    bad: list[tuple[int, str]]  # as in `Batch`, of images that none replaces


@dataclass
class LabelledBatch:
    """One rank's share of some images."""

    images: Tensor  # [B, H, W, 3] uint8
    labels: Tensor  # [B] int64, into the index's class names
    sample: Tensor  # [B] int64, rows of the index
    epoch: Tensor  # [B] int64, 0 in evaluation
    bad: list[tuple[int, str]]  # (row of the index, path and reason) of images replaced, or in evaluation left out
