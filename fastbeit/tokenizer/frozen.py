"""What frozen tokenizers share: the likeliest word of each place in bounded memory, fixed batches, checks of input."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

SCRATCH = 1 << 22  # scores held at once, 16 MB: more is no faster, and all of [B N, V] would be gigabytes


def likeliest_words(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """argmax over v of features . weight[v] + bias[v], in float32; of equal scores the first.

    Args:
        features: [n, C], of any floating dtype.
        weight: [V, C], float32 or of the features' dtype; products and sums are float32 either way.
        bias: float32 [V].

    Returns:
        int64 [n].
    """
    num_rows = max(1, SCRATCH // len(weight))
    if weight.dtype != torch.float32 and weight.device.type != "cpu":
        # a CPU has no such product
        scores = (torch.mm(rows, weight.T, out_dtype=torch.float32).add_(bias) for rows in features.split(num_rows))
    else:
        weight = weight.float()
        scores = (torch.addmm(bias, rows.float(), weight.T) for rows in features.split(num_rows))
    return torch.cat([some.argmax(1) for some in scores])


def in_fixed_batches(encode: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """encode(images), `size` of them at a time, the last batch filled up.

    Memory is bounded, and since the kernel of a product, and with it the order of its sums, depends on the shape alone,
    an image's tokens do not depend on the batch that it came in.
    """
    filler = images.new_zeros(-len(images) % size, *images.shape[1:])
    batches = torch.cat([images, filler]).split(size)
    return torch.cat([encode(batch) for batch in batches])[: len(images)]


class Strided(ABC):
    """The part of a `Tokenizer` that is alike in all that have one word for each square of `stride` pixels."""

    vocab_size: int
    stride: int
    device: torch.device

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        if height % self.stride or width % self.stride or min(size) < self.stride:
            fit = [max(1, round(side / self.stride)) * self.stride for side in size]
            raise ValueError(
                f"token view wants sides that are multiples of {self.stride}; got {height}x{width}; try {fit}"
            )
        return height // self.stride, width // self.stride

    def view_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.stride, grid[1] * self.stride

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """As `Tokenizer.encode`."""

    def encode_at(self, images: Tensor, places: Tensor) -> Tensor:
        return self.encode(images).gather(1, places.to(self.device))

    def checked_images(self, images: Tensor) -> Tensor:
        """Images that `encode` was given, on the tokenizer's device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images want uint8 [B, h, w, 3]; got {images.dtype} {list(images.shape)}")
        self.grid((images.shape[1], images.shape[2]))
        return images.to(self.device)

    def checked_ids(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Ids that `decode` was given, as [B, h, w] on the tokenizer's device."""
        side = int(ids.shape[1] ** 0.5)
        height, width = grid or (side, side)
        if height * width != ids.shape[1]:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fill a {height}x{width} grid; pass the tokenizer's grid(size)"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"ids want 0 to {self.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}")
        return ids.to(self.device).unflatten(1, (height, width))
