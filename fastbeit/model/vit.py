"""The encoder: a ViT with relative-position bias, LayerScale and drop path (section 2.2, Appendix A).

Legend, used everywhere: B images, N patches (196), S = N + 1 tokens (197), T = B*S tokens flattened, D width, H heads,
K head width, F hidden width of the MLP, V visual words (8192), M mask slots an image (75), P values of a patch (768),
L blocks.

Parameters have the names and shapes of the authors' state dict. A parameter is read only in the forward of the module
that owns it (ZeRO-3), no forward draws a random number (drop path comes as an argument), and all shapes are static.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.config.sections import ModelConfig
from fastbeit_kernels.backend import Backend
from fastbeit_kernels.masked_embed import masked_embed, patchify

NORM_EPS = 1e-6  # the authors'; PyTorch's own is 1e-5
INIT_STD = 0.02
# a row of the bias starts 16 values after a multiple of 16: fused attention wants aligned rows (197 -> 208)
BIAS_ALIGNMENT = 16

Size = tuple[int, int]


def take(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of x [B, S, D] at idx [B, M], distinct in an image: [B, M, D]."""
    return x.gather(1, idx[:, :, None].expand(-1, -1, x.shape[2]))


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, together with all that makes tokens of its output: `masked_embed`."""

    def __init__(self, width: int, patch_size: Size, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(width, 3, *patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, images: Tensor, masked: Tensor, **tokens_and_pixels: Any) -> Tensor:
        return masked_embed(images, masked, self.weight, self.bias, **tokens_and_pixels, backend=self.backend)


class PatchEmbedding(nn.Module):
    """uint8 images to tokens; bytes are normalised here and nowhere before (design D4)."""

    def __init__(
        self,
        width: int,
        image_size: Size,
        patch_size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        backend: Backend,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.proj = PatchProjection(width, patch_size, backend)
        self.mean = nn.Buffer(torch.tensor(mean), persistent=False)
        self.std = nn.Buffer(torch.tensor(std), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[B, height, width, 3] uint8 to [B, N, P] float32: pixels / 255, less the mean, over the deviation."""
        self._check(images)
        return patchify((images.float() / 255 - self.mean) / self.std, self.patch_size)

    def forward(
        self, images: Tensor, masked: Tensor, cls_token: Tensor, mask_token: Tensor, positions: Tensor | None
    ) -> Tensor:
        """
        Args:
            images: [B, height, width, 3] uint8.
            masked: [B, N] bool, patches that become the mask token; their pixels are not read.
            cls_token, mask_token: [D].
            positions: [S, D] added to the tokens, or None.

        Returns:
            [B, S, D].
        """
        self._check(images)
        tokens = dict(cls_token=cls_token, mask_token=mask_token, positions=positions)
        return self.proj(images, masked, **tokens, mean=self.mean, std=self.std)

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != (*self.image_size, 3):
            raise ValueError(
                f"images want shape [B, {self.image_size[0]}, {self.image_size[1]}, 3]; got {list(images.shape)}"
            )


def relative_position_index(grid: Size) -> Tensor:
    """The row of the bias table for each pair of tokens.

    Returns:
        [S, S] int64, a row for each query. Between patches it is (dy + height - 1) * (2 * width - 1) + dx + width - 1,
        d = query - key; the table's last three rows are for cls to patch, patch to cls and cls to cls.
    """
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    num_offsets = (2 * height - 1) * (2 * width - 1)
    index = np.empty((len(y) + 1, len(y) + 1), dtype=np.int64)
    index[1:, 1:] = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    index[0, :], index[:, 0], index[0, 0] = num_offsets, num_offsets + 1, num_offsets + 2
    return torch.from_numpy(index)


def inverse_index(index: Tensor) -> Tensor:
    """Where each value of `index` stands.

    Args:
        index: any shape, values from 0 to R - 1, each at least once.

    Returns:
        [R, C] int64 places in the flattened index, C the count of the most frequent value; short rows end in numel().
    """
    values = index.flatten().numpy()
    counts = np.bincount(values)
    inverse = np.full((len(counts), counts.max()), values.size)
    # row-major order of the filled cells is that of the places sorted by value
    inverse[np.arange(counts.max()) < counts[:, None]] = np.argsort(values, kind="stable")
    return torch.from_numpy(inverse)


class GatherBias(torch.autograd.Function):
    """table [R, H], index [S, S], inverse [R, C] -> [H, S, S].

    The gradient is a gather and a sum: no atomics, always the same order.
    """

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = F.pad(grads[0].flatten(1), (0, 1))  # the zero that short rows of the inverse point at
        return grad.index_select(1, inverse.flatten()).unflatten(1, inverse.shape).sum(2).t(), None, None


def register_bias_table(module: nn.Module, grid: Size, num_heads: int) -> None:
    """Give `module` a zero table and its index under the authors' names."""
    index = relative_position_index(grid)
    module.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, num_heads))
    module.register_buffer("relative_position_index", index)
    module.register_buffer("relative_position_inverse", inverse_index(index), persistent=False)


def expand_bias_table(module: nn.Module) -> Tensor:
    """[H, S, S_pad] float32: the bias of each pair of tokens, rows padded with zeros to `BIAS_ALIGNMENT`."""
    bias = GatherBias.apply(
        module.relative_position_bias_table, module.relative_position_index, module.relative_position_inverse
    )
    return F.pad(bias, (0, -bias.shape[-1] % BIAS_ALIGNMENT))


class RelativePositionBias(nn.Module):
    """The table that all blocks share in pre-training, expanded once a step (design D8)."""

    def __init__(self, grid: Size, num_heads: int) -> None:
        super().__init__()
        register_bias_table(self, grid, num_heads)

    def forward(self) -> Tensor:
        return expand_bias_table(self)


class QKV(nn.Module):
    """Queries, keys and values in one matrix product; rows of the weight: q, k, v, in each the heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention. Keys have no bias: the softmax would cancel it."""

    def __init__(self, width: int, num_heads: int, table_grid: Size | None) -> None:
        """
        Args:
            table_grid: patches down and across for a bias table of this block's own; None: no such table.
        """
        super().__init__()
        self.num_heads = num_heads
        self.has_table = table_grid is not None
        self.qkv = QKV(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if table_grid is not None:
            register_bias_table(self, table_grid, num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None, slots: Tensor | None) -> Tensor:
        """
        Args:
            x: [B, S, D].
            bias: [H, S, S_pad] float32, added to the scaled scores; ignored by a block with its own table.
            slots: [B, M] tokens whose output is wanted; None: all.

        Returns:
            [B, M or S, D].
        """
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = (
            self.qkv(x, qkv_bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [B, H, S, K]
        if self.has_table:
            bias = expand_bias_table(self)
        if bias is not None:
            # cast before the slice, so that rows stay aligned; to B images, as the fused backward wants its gradient
            bias = bias.to(q.dtype)[..., : x.shape[1]].expand(len(x), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return self.proj(out if slots is None else take(out, slots))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def residual_scale(x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """x + keep * gamma * branch: LayerScale (2103.17239) and drop path (1603.09382).

    Args:
        gamma: [D]; None: no LayerScale.
        keep: [B], 0 or 1 / (1 - rate); None: nothing is dropped.
    """
    if gamma is not None:
        branch = gamma * branch
    if keep is not None:
        branch = keep[:, None, None] * branch
    return x + branch


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, model: ModelConfig, table_grid: Size | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(model.width, eps=NORM_EPS)
        self.attn = Attention(model.width, model.num_heads, table_grid)
        self.norm2 = nn.LayerNorm(model.width, eps=NORM_EPS)
        self.mlp = Mlp(model.width, model.mlp_width)
        scale = torch.full((model.width,), model.layer_scale)
        self.gamma_1 = nn.Parameter(scale) if model.layer_scale else None
        self.gamma_2 = nn.Parameter(scale.clone()) if model.layer_scale else None

    def forward(self, x: Tensor, bias: Tensor | None, keep: Tensor | None, slots: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, S, D].
            bias: as in `Attention`.
            keep: [2, B], factors of the two branches.
            slots: [B, M] tokens that are wanted; all that follows the attention is done for them alone (design D7).

        Returns:
            [B, M or S, D].
        """
        keep_attn, keep_mlp = (None, None) if keep is None else keep
        branch = self.attn(self.norm1(x), bias, slots)
        x = residual_scale(x if slots is None else take(x, slots), branch, self.gamma_1, keep_attn)
        return residual_scale(x, self.mlp(self.norm2(x)), self.gamma_2, keep_mlp)


def cut_normal_(x: Tensor, std: float) -> None:
    """Fill with normal numbers of deviation `std` cut at -std and std, as BERT does: what is left deviates by 0.54 std.

    By the inverse of the distribution. nn.init.trunc_normal_ draws again until all fit: 30 s of CPU for BEiT-B, not 2.
    """
    share = math.erf(math.sqrt(0.5))  # of a normal distribution within one deviation
    x.uniform_(-share, share).erfinv_().mul_(math.sqrt(2) * std).clamp_(-std, std)


class VisionTransformer(nn.Module):
    """Patch embedding, cls token, positions and blocks; what follows the last block is the subclass's."""

    def __init__(
        self, model: ModelConfig, *, image_size: Size, mean: Sequence[float], std: Sequence[float], backend: Backend
    ) -> None:
        super().__init__()
        grid = image_size[0] // model.patch_size[0], image_size[1] // model.patch_size[1]
        self.patch_embed = PatchEmbedding(model.width, image_size, model.patch_size, mean, std, backend)
        self.cls_token = nn.Parameter(torch.empty(1, 1, model.width))
        positions = torch.empty(1, grid[0] * grid[1] + 1, model.width)
        self.pos_embed = nn.Parameter(positions) if model.absolute_position else None
        shared = model.relative_position == "shared"
        self.rel_pos_bias = RelativePositionBias(grid, model.num_heads) if shared else None
        table_grid = grid if model.relative_position == "per_block" else None
        self.blocks = nn.ModuleList([Block(model, table_grid) for _ in range(model.depth)])

    def embed(self, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """[B, S, D] tokens: cls, then the patches, `mask_token` [D] in place of the masked ones (section 2.3)."""
        positions = None if self.pos_embed is None else self.pos_embed.squeeze(0)
        return self.patch_embed(images, masked, self.cls_token.flatten(), mask_token, positions)

    def encode(self, x: Tensor, keep: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, S, D] tokens, cls first.
            keep: [L, 2, B] drop-path factors, 0 or 1 / (1 - rate); None: nothing is dropped.
            slots: [B, M] tokens that are wanted, cls being 0, distinct in an image; None: all.

        Returns:
            [B, M or S, D], not normalised.
        """
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, bias, None if keep is None else keep[i], slots if i == last else None)
        return x

    @torch.no_grad()
    def initialise(self) -> None:
        """The authors' start of pre-training: weights normal, cut at one deviation; biases and tables zero.

        What writes to the residual stream is divided by sqrt(2 * i) in block i, counted from 1 (section 2.5).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1 and not name.endswith("relative_position_bias_table"):
                cut_normal_(parameter, INIT_STD)
        blocks = (module for module in self.modules() if isinstance(module, Block))
        for i, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.div_(math.sqrt(2 * i))
