"""What is fine-tuned: the encoder, one feature an image, and a linear head over classes (section 2.6)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.running import Backend, Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.engine.sharded import whole
from fastbeit.model.vit import NORM_EPS, VisionTransformer
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy

HEAD_SCALE = 1e-3  # the authors': the first predictions are alike for all classes


class ClassHead(nn.Linear):
    """From features to classes, or to the loss, whose logits are never in memory at once: 21,841 classes are many."""

    def __init__(self, width: int, num_classes: int, label_smoothing: float, kernels: Kernels) -> None:
        super().__init__(width, num_classes)
        self.label_smoothing = label_smoothing
        self.backend: Backend = kernels.loss
        self.rows = kernels.loss_rows

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, labels: Tensor | None = None, others: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: [B, D].
            labels: [B] int64.
            others: [B] int64, labels of what was mixed in; with it:
            share: [B] float32, how much of an image is still its own.

        Returns:
            [B, num_classes]; with labels (summed loss, number of images whose own label is the most likely).
        """
        if labels is None:
            return F.linear(x, self.weight, self.bias)
        one, smoothing = torch.ones((), device=x.device), self.label_smoothing
        loss, num_correct = linear_cross_entropy(
            x, self.weight, self.bias, labels, one, label_smoothing=smoothing, chunk=self.rows, backend=self.backend
        )
        if others is not None and share is not None:
            # cross-entropy is linear in its target: to move a part of it to another class costs two logits an image
            own, other = (self._logit_of(x, of) for of in (labels, others))
            loss = loss + ((1 - share) * (1 - smoothing) * (own - other)).sum()
        return loss, num_correct

    def _logit_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """[B] float32: the logit of one class an image."""
        return (x.float() * self.weight[labels].float()).sum(1) + self.bias[labels].float()


class Classifier(VisionTransformer):
    """State dict as the authors' fine-tuned files: `fc_norm` or `norm`, `head`, and a bias table in each block."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        image_size: Size,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        kernels: Kernels,
        pooling: Literal["mean", "cls"] = "mean",
        label_smoothing: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        """
        Args:
            pooling: an image's feature: the mean over its patches, which is then normalised (`fc_norm`), or the
                normalised cls token (`norm`).
            label_smoothing: share of the target that all classes have in common.
            mean, std, kernels, checkpoint_blocks: as in `Beit`.
        """
        super().__init__(
            model, image_size=image_size, mean=mean, std=std, kernels=kernels, checkpoint_blocks=checkpoint_blocks
        )
        norm = nn.LayerNorm(model.width, eps=NORM_EPS)
        self.norm, self.fc_norm = (None, norm) if pooling == "mean" else (norm, None)
        self.head = ClassHead(model.width, num_classes, label_smoothing, kernels)
        self.initialise(lambda weight, std: nn.init.normal_(weight, std=std))
        self._start_ends()

    @torch.no_grad()
    def _start_ends(self) -> None:
        """The authors leave the convolution as PyTorch starts it, and scale the head down."""
        proj, head = self.patch_embed.proj, self.head
        with whole((proj.weight, proj.bias, head.weight, head.bias), written=True):
            nn.init.kaiming_uniform_(proj.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(proj.weight[0].numel())
            nn.init.uniform_(proj.bias, -bound, bound)
            head.weight.mul_(HEAD_SCALE)
            head.bias.mul_(HEAD_SCALE)

    def forward(
        self,
        pixels: Tensor,
        labels: Tensor,
        others: Tensor | None = None,
        share: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, summed over images.

        Args:
            pixels: [B, height, width, 3] float32, normalised (`patch_embed.pixels`), erased and mixed.
            labels, others, share: as in `ClassHead`.
            keep: [B, L, 2] float32 drop-path factors; None: nothing is dropped.

        Returns:
            (float32 sum, int64 number of images that are classified as their own label).
        """
        return self.head(self.features(pixels, keep), labels, others, share)

    def logits(self, images: Tensor) -> Tensor:
        """[B, num_classes] of uint8 images."""
        return self.head(self.features(self.patch_embed.pixels(images)))

    def features(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, D], what the head sees."""
        x = self.patch_embed.proj(pixels)
        x = torch.cat((self.cls_token.expand(len(x), 1, -1).to(x.dtype), x), dim=1)
        x = self.encode(x if self.pos_embed is None else x + self.pos_embed, keep)
        return self.norm(x[:, 0]) if self.norm is not None else self.fc_norm(x[:, 1:].mean(1))  # pyright: ignore


def make_classifier(config: FinetuneConfig, num_classes: int) -> Classifier:
    """The model of a fine-tuning, with the authors' start."""
    return Classifier(
        config.model,
        image_size=config.data.image_size,
        num_classes=num_classes,
        mean=config.data.mean,
        std=config.data.std,
        kernels=config.kernels.by_op,
        pooling=config.model.pooling,
        label_smoothing=config.augment.smoothing,
        checkpoint_blocks=config.engine.checkpoint_blocks,
    )
