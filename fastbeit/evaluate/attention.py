"""Where a model looks: the self-attention of a block's heads, from chosen patches (the paper's Figure 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.errors import ConfigError
from fastbeit.model.vit import Block, VisionTransformer


@dataclass(frozen=True)
class Reference:
    """Whose attention is looked at, as a user says it."""

    points: tuple[Size, ...] | None = None  # row and column of patches, from 0; None: centre and thirds of the grid
    block: int | None = None  # from 0; None: the last

    def resolved(self, grid: Size, depth: int) -> tuple[tuple[Size, ...], int]:
        """Points and block of a model of so many patches down and across, and so many blocks.

        Raises:
            ConfigError: it has no such patch, or no such block.
        """
        height, width = grid
        for row, column in self.points or ():
            if not (0 <= row < height and 0 <= column < width):
                raise ConfigError(
                    f"--points {row},{column} is no patch of a grid of {height} x {width}: rows are 0 to {height - 1}, "
                    f"columns 0 to {width - 1}"
                )
        block = depth - 1 if self.block is None else self.block
        if not 0 <= block < depth:
            raise ConfigError(f"--block {block}: the model has blocks 0 to {depth - 1}")
        middles = (height // 3, width // 3), (height // 2, width // 2), (2 * height // 3, 2 * width // 3)
        # of a small grid some are the same
        return self.points or tuple(dict.fromkeys(middles)), block


UNCHOSEN = Reference()


def grid_of(model: VisionTransformer) -> Size:
    """Patches down and across."""
    (height, width), (patch_height, patch_width) = model.patch_embed.image_size, model.patch_embed.patch_size
    return height // patch_height, width // patch_width


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor, points: tuple[Size, ...], block: int) -> Tensor:
    """How much each head attends to each patch, from some patches, of images of which nothing is masked.

    Args:
        images: [B, height, width, 3] uint8.
        points: row and column of the patches whose queries are taken.
        block: from 0.

    Returns:
        [B, points, H, down, across] float32 probabilities. What is missing to 1 goes to the cls token.
    """
    height, width = grid_of(model)
    masked = torch.zeros(len(images), height * width, dtype=torch.bool, device=images.device)
    tokens = model.embed(images, masked, torch.zeros_like(model.cls_token.flatten()))
    queries = torch.tensor([1 + row * width + column for row, column in points], device=images.device)
    return attention(model, tokens, block)[:, :, queries, 1:].transpose(1, 2).unflatten(3, (height, width))


@torch.no_grad()
def attention(model: VisionTransformer, x: Tensor, block: int) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) of one block, [B, H, S, S] float32; a row for each query.

    Args:
        x: [B, S, D] tokens, as `model.encode` takes them.
        block: from 0.
    """
    bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
    *before, last = list(model.blocks)[: block + 1]
    for one in before:
        x = one(x, bias, None)
    assert isinstance(last, Block)
    qkv, bias = last.attn.operands(last.norm1(x), bias)
    q, k, _ = qkv.float().permute(2, 0, 3, 1, 4)  # each [B, H, S, K]
    scores = q @ k.transpose(2, 3) * k.shape[3] ** -0.5
    return (scores if bias is None else scores + bias[..., : scores.shape[3]]).softmax(3)
