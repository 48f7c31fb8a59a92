"""Which word is the likeliest for each place: the last projection of an encoder and its argmax, in bounded memory."""

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
        # has not run on a card yet; a CPU has no such product
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
