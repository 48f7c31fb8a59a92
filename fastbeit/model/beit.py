"""BEiT: the encoder sees a masked image and predicts what was there (sections 2.3 and 2.4; equation 1)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.config.pretrain import Config
from fastbeit.config.running import Backend, Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.masking import UNUSED
from fastbeit.model.attention import take
from fastbeit.model.vit import NORM_EPS, VisionTransformer
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy


class Head(nn.Module):
    """From tokens to what is predicted, or to the loss of it."""

    def __init__(self, width: int, num_outputs: int, backend: Backend, rows: int | None = None) -> None:
        """
        Args:
            rows: whose logits are in memory at once; None: as many as `linear_cross_entropy` chooses.
        """
        super().__init__()
        self.backend: Backend = backend
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(num_outputs, width))
        self.bias = nn.Parameter(torch.empty(num_outputs))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: [..., D].
            labels: [...] int64 visual tokens, or `UNUSED`.

        Returns:
            [..., num_outputs]; with labels, whose loss needs no logits in memory: (summed loss, number of right ones).
        """
        if labels is None:
            return F.linear(x, self.weight, self.bias)
        one = torch.ones((), device=x.device)
        return linear_cross_entropy(
            x.flatten(0, -2), self.weight, self.bias, labels.flatten(), one, chunk=self.rows, backend=self.backend
        )


class Beit(VisionTransformer):
    """The model that is pre-trained; state dict as the authors' (190 entries for BEiT-B)."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        image_size: Size,
        num_outputs: int,
        mean: Sequence[float],
        std: Sequence[float],
        kernels: Kernels,
        objective: Literal["tokens", "pixels"] = "tokens",
        checkpoint_blocks: bool = False,
    ) -> None:
        """
        Args:
            num_outputs: V visual words; for pixels the values of a patch, 3 * height * width.
            mean, std: of a channel, for pixels in [0, 1].
            kernels: which implementation runs each fused operator.
            objective: what `forward` gives the loss of.
            checkpoint_blocks: as in `VisionTransformer`.
        """
        super().__init__(
            model, image_size=image_size, mean=mean, std=std, kernels=kernels, checkpoint_blocks=checkpoint_blocks
        )
        num_values = 3 * model.patch_size[0] * model.patch_size[1]
        if objective == "pixels" and num_outputs != num_values:
            raise ValueError(
                f"num_outputs of the pixel objective is {num_values}, the values of a patch; got {num_outputs}"
            )
        self.objective = objective
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.width))
        self.norm = nn.LayerNorm(model.width, eps=NORM_EPS)
        self.lm_head = Head(model.width, num_outputs, kernels.loss, kernels.loss_rows)
        self.initialise()

    def forward(
        self, images: Tensor, masked: Tensor, predict_idx: Tensor, targets: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, summed over predicted patches, so that its mean can be taken over ranks and micro-batches.

        tokens: cross-entropy. pixels: mean squared error over a patch's pixels, normalised as the encoder sees them
        (Table 4).

        Args:
            images: [B, height, width, 3] uint8.
            masked: [B, N] bool, patches that the encoder does not see.
            predict_idx: [B, M] int64, patches to predict, distinct in an image.
            targets: [B, M] int64, their visual tokens; `UNUSED` in slots that the loss leaves out. For pixels any other
                value means a slot in use: what is regressed is read from `images`.
            keep: [B, L, 2] float32 drop-path factors of (image, block, branch); None: nothing is dropped.

        Returns:
            (float32 sum over the slots in use, int64 number of right tokens; 0 for pixels).
        """
        x = self._features(images, masked, predict_idx, keep)
        if self.objective == "tokens":
            return self.lm_head(x, targets)
        pixels = take(self.patch_embed.patches(images), predict_idx)
        errors = (self.lm_head(x).float() - pixels).square().mean(2)
        loss_sum = torch.where(targets != UNUSED, errors, 0.0).sum()
        return loss_sum, torch.zeros((), dtype=torch.int64, device=images.device)

    def logits(
        self, images: Tensor, masked: Tensor, predict_idx: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """[B, M, num_outputs]: predictions for the patches `predict_idx`, None: for all N. The rest as in `forward`."""
        return self.lm_head(self._features(images, masked, predict_idx, keep))

    def _features(self, images: Tensor, masked: Tensor, predict_idx: Tensor | None, keep: Tensor | None) -> Tensor:
        x = self.embed(images, masked, self.mask_token.flatten())
        if predict_idx is None:
            return self.norm(self.encode(x, keep)[:, 1:])
        return self.norm(self.encode(x, keep, slots=predict_idx + 1))  # the cls token is token 0


def num_outputs(config: Config, vocab_size: int | None) -> int:
    """V visual words; where pixels are regressed, the values of a patch."""
    height, width = config.model.patch_size
    return 3 * height * width if vocab_size is None else vocab_size


def make_beit(config: Config, vocab_size: int | None) -> Beit:
    """The model of a run, with the authors' start; `vocab_size` is of no use to the pixel objective."""
    return Beit(
        config.model,
        image_size=config.data.image_size,
        num_outputs=num_outputs(config, vocab_size),
        mean=config.data.mean,
        std=config.data.std,
        objective=config.objective,
        kernels=config.kernels.by_op,
        checkpoint_blocks=config.engine.checkpoint_blocks,
    )
