"""The encoder: a ViT with relative-position bias, LayerScale and drop path (section 2.2, Appendix A).

Legend, used everywhere: B images, N patches (196), S = N + 1 tokens (197), T = B*S tokens flattened, D width, H heads,
K head width, F hidden width of the MLP, V visual words (8192), M mask slots an image (75), P values of a patch (768),
L blocks.

Parameters have the names and shapes of the authors' state dict. A parameter is read only in the forward of the module
that owns it (ZeRO-3), no forward draws a random number (drop path comes as an argument), and all shapes are static.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbeit.config.running import Backend, Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.engine.sharded import whole
from fastbeit.model.attention import Attention, RelativePositionBias, take
from fastbeit_kernels.masked_embed import masked_embed, patchify

NORM_EPS = 1e-6  # the authors'; PyTorch's own is 1e-5
INIT_STD = 0.02


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, together with all that makes tokens of its output: `masked_embed`.

    Of images that are normalised, and mixed perhaps, and of which nothing is hidden, the convolution alone.
    """

    def __init__(self, width: int, patch_size: Size, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(width, 3, *patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, images: Tensor, masked: Tensor | None = None, **tokens_and_pixels: Any) -> Tensor:
        if masked is None:
            return F.linear(patchify(images, self.weight.shape[2:]), self.weight.flatten(1), self.bias)
        return masked_embed(images, masked, self.weight, self.bias, **tokens_and_pixels, backend=self.backend)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, height, width, 3] uint8 to the same in float32: pixels / 255, less the mean [3], over the deviation [3]."""
    return (images.float() / 255 - mean) / std


class PatchEmbedding(nn.Module):
    """uint8 images to tokens; bytes are normalised here and nowhere before."""

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

    def patches(self, images: Tensor) -> Tensor:
        """[B, height, width, 3] uint8 to [B, N, P] float32: pixels / 255, less the mean, over the deviation."""
        return patchify(self.pixels(images), self.patch_size)

    def pixels(self, images: Tensor) -> Tensor:
        """[B, height, width, 3] uint8 to the same in float32, normalised."""
        self._check(images)
        return normalise(images, self.mean, self.std)

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

    def __init__(self, model: ModelConfig, table_grid: Size | None, kernels: Kernels) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(model.width, eps=NORM_EPS)
        self.attn = Attention(model.width, model.num_heads, table_grid, kernels.attention, kernels.attention_mib)
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
            slots: [B, M] tokens that are wanted; all that follows the attention is done for them alone.

        Returns:
            [B, M or S, D].
        """
        keep_attn, keep_mlp = (None, None) if keep is None else keep
        branch = self.attn(self.norm1(x), bias, slots)
        x = residual_scale(x if slots is None else take(x, slots), branch, self.gamma_1, keep_attn)
        return residual_scale(x, self.mlp(self.norm2(x)), self.gamma_2, keep_mlp)

    def compile_whole(self) -> None:
        """Let torch.compile make one graph of it."""
        # dynamic=False: shapes are static, and a short batch gets a graph of its own. xformers stays outside of it
        self.compile(dynamic=False, fullgraph=self.attn.backend != "xformers")


def cut_normal_(x: Tensor, std: float) -> None:
    """Fill with normal numbers of deviation `std` cut at -std and std, as BERT does: what is left deviates by 0.54 std.

    By the inverse of the distribution. nn.init.trunc_normal_ draws again until all fit: 30 s of CPU for BEiT-B, not 2.
    """
    share = math.erf(math.sqrt(0.5))  # of a normal distribution within one deviation
    x.uniform_(-share, share).erfinv_().mul_(math.sqrt(2) * std).clamp_(-std, std)


class VisionTransformer(nn.Module):
    """Patch embedding, cls token, positions and blocks; what follows the last block is the subclass's."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        image_size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        kernels: Kernels,
        checkpoint_blocks: bool = False,
    ) -> None:
        """
        Args:
            checkpoint_blocks: keep each block's input alone for the backward, which computes the rest again.
        """
        super().__init__()
        self.checkpoint_blocks = checkpoint_blocks
        grid = image_size[0] // model.patch_size[0], image_size[1] // model.patch_size[1]
        self.patch_embed = PatchEmbedding(model.width, image_size, model.patch_size, mean, std, kernels.masked_embed)
        self.cls_token = nn.Parameter(torch.empty(1, 1, model.width))
        positions = torch.empty(1, grid[0] * grid[1] + 1, model.width)
        self.pos_embed = nn.Parameter(positions) if model.absolute_position else None
        shared = model.relative_position == "shared"
        self.rel_pos_bias = RelativePositionBias(grid, model.num_heads) if shared else None
        table_grid = grid if model.relative_position == "per_block" else None
        self.blocks = nn.ModuleList([Block(model, table_grid, kernels) for _ in range(model.depth)])

    def embed(self, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """[B, S, D] tokens: cls, then the patches, `mask_token` [D] in place of the masked ones (section 2.3)."""
        positions = None if self.pos_embed is None else self.pos_embed.squeeze(0)
        return self.patch_embed(images, masked, self.cls_token.flatten(), mask_token, positions)

    def encode(self, x: Tensor, keep: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, S, D] tokens, cls first.
            keep: [B, L, 2] drop-path factors, 0 or 1 / (1 - rate); None: nothing is dropped.
            slots: [B, M] tokens that are wanted, cls being 0, distinct in an image; None: all.

        Returns:
            [B, M or S, D], not normalised.
        """
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            inputs = x, bias, None if keep is None else keep[:, i].T, slots if i == last else None
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return x

    def block_outputs(self, images: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """What comes out of some blocks, of images of which nothing is hidden; blocks after the last are not run.

        Args:
            images: [B, height, width, 3] uint8.
            blocks: from 0 to L - 1.

        Returns:
            By block [B, S, D], cls first, not normalised.
        """
        x = self.patch_embed.proj(self.patch_embed.pixels(images))
        x = torch.cat((self.cls_token.expand(len(x), 1, -1).to(x.dtype), x), dim=1)
        x = x if self.pos_embed is None else x + self.pos_embed
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        found = {}
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = block(x, bias, None)
            if i in blocks:
                found[i] = x
        return found

    def compile_blocks(self) -> None:
        """Let torch.compile make one graph of each block: two in all, for the last block has slots."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_whole()

    @torch.no_grad()
    def initialise(self, fill: Callable[[Tensor, float], Any] = cut_normal_) -> None:
        """The authors' start: weights normal, in pre-training cut at one deviation; biases and tables zero.

        What writes to the residual stream is divided by sqrt(2 * i) in block i, counted from 1 (section 2.5).
        """
        for name, parameter in self.named_parameters():
            with whole([parameter], written=True):
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif parameter.ndim > 1 and not name.endswith("relative_position_bias_table"):
                    fill(parameter, INIT_STD)
        blocks = (module for module in self.modules() if isinstance(module, Block))
        for i, block in enumerate(blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                with whole([weight], written=True):
                    weight.div_(math.sqrt(2 * i))
