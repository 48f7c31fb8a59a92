"""How many FLOPs an image takes: formulas of the configuration, which give what PyTorch counts.

FLOPs of products of matrices, a multiplication and an addition each; a backward has twice those of its forward, but the
first layer, which no gradient leaves. Letters as in model/vit.py:

    attention of a block     6 S D^2 + 4 S^2 D          q, k, v; scores; weighted sum
    the rest of a block      T (2 D^2 + 4 D F)          T = S tokens; of the last block those of the M slots
    embedding, head          2 N P D, 2 M D V           an embedding has one backward, of its weights

The authors' last block works on all tokens.
"""

import math

from fastbeit.config.finetune import VitConfig
from fastbeit.config.sections import Size
from fastbeit.config.tokenizer import Architecture


def step_flops(config: VitConfig, num_outputs: int, authors: bool = False) -> int:
    """Of an image, forward and backward, without recomputation.

    Args:
        num_outputs: V, or P where pixels are regressed.
        authors: their way.
    """
    model = config.model
    D, F, N, M = model.width, model.mlp_width, config.num_patches, config.num_slots
    S, P = N + 1, 3 * math.prod(model.patch_size)
    attention, rest = 6 * S * D * D + 4 * S * S * D, 2 * D * D + 4 * D * F
    blocks = model.depth * attention + (model.depth - 1) * S * rest + (S if authors else M) * rest
    return 3 * (blocks + 2 * config.num_predictions * D * num_outputs) + 2 * (2 * N * P * D)


def tokenizer_flops(arch: Architecture, view: Size) -> int:
    """Of the forward of a dVAE's encoder on an image of this height and width, all of its tokens."""
    pixels = math.prod(view)
    flops = _conv(pixels, 3, arch.n_hid, 7)
    n_in = arch.n_hid
    for width in arch.widths:
        for _ in range(arch.n_blk_per_group):
            inner = width // 4
            flops += _conv(pixels, n_in, width, 1) if n_in != width else 0
            flops += _conv(pixels, n_in, inner, 3) + 2 * _conv(pixels, inner, inner, 3) + _conv(pixels, inner, width, 1)
            n_in = width
        pixels //= 4
    return flops + _conv(4 * pixels, n_in, arch.vocab_size, 1)  # there is no pooling after the last group


def _conv(pixels: int, n_in: int, n_out: int, kernel: int) -> int:
    return 2 * pixels * n_in * n_out * kernel**2
