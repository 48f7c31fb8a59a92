"""What one rank is given of a step: images, and where they come from."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a step's images, whatever the job."""

    images: Tensor  # [B, H, W, 3] uint8, the patch view, or the one that is classified
    token_images: Tensor | None  # [B, h, w, 3] uint8, the token view: the same box, flip and jitter
    sample: Tensor  # [B] int64, rows of the index
    epoch: Tensor  # [B] int64; with tail=wrap a batch can straddle epochs; 0 in evaluation
    # images that others took the place of, or that evaluation left out: row of the index, path and reason
    bad: list[tuple[int, str]] = field(default_factory=list)
    labels: Tensor | None = None  # [B] int64, into the index's class names; None: the job wants none


@dataclass
class TokenViews:
    """All token views of some images, in the order of the index."""

    rows: range  # of the index
    images: Tensor  # [n, K, h, w, 3] uint8; 0 where the image is bad
    bad: list[tuple[int, str]]  # as in `Batch`, of images that none replaces
