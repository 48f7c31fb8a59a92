"""What a dVAE is trained for: evidence lower bound with Gumbel-softmax words (arXiv 2102.12092, section 2.1, A.2, A.3).

    loss = -log p(pixels | words) + kl_weight / 192 * KL(q(word | image) || uniform) - usage_weight / 192 * H(E q)

A mean per channel of a pixel; 192 is how many of those an 8 x 8 token stands for. Two things differ from the paper,
which trained on 250 M images: words are drawn straight-through, so that the decoder never sees a blend of words, and
the entropy H of the words that a batch uses is rewarded: a small run would otherwise leave most of them unused.
"""

import math

import torch
from torch import Tensor, nn

from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.engine.ranks import stacked
from fastbeit.tokenizer.dvae import Decoder, Encoder, one_hot, to_images, to_mapped


def logit_laplace(stats: Tensor, pixels: Tensor) -> Tensor:
    """-log p(pixels): A.3, the mean over mapped pixels [B, 3, h, w]; stats [B, 6, h, w] are a decoder's output."""
    location, log_scale = stats.chunk(2, dim=1)
    error = (torch.logit(pixels) - location).abs()
    return (error * (-log_scale).exp() + log_scale + math.log(2) + (pixels * (1 - pixels)).log()).mean()


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What is added to logits so that the largest is a draw of softmax(logits)."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def draw_words(logits: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
    """One-hot words [B, V, h, w] drawn from softmax(logits); the gradient is that of the Gumbel-softmax relaxation."""
    soft = ((logits + noise) / temperature).softmax(1)
    return one_hot(soft.argmax(1), logits.shape[1]) + (soft - soft.detach())


def usage_entropy(log_q: Tensor, world_size: int = 1) -> Tensor:
    """Entropy in nats of the words that a global batch uses, E q, with its gradient on each rank.

    Args:
        log_q: [B, V, h, w], log-probabilities at each place, of this rank's images; equally many on each.
    """
    # of logarithms: a word whose probability rounds to 0 everywhere has an infinite slope, and that times 0 is NaN
    log_share = log_q.logsumexp((0, 2, 3)) - math.log(log_q.numel() / log_q.shape[1])
    if world_size > 1:
        log_share = stacked(log_share).logsumexp(0) - math.log(world_size)
    return -(log_share.exp() * log_share).sum()


class DvaeTrainer(nn.Module):
    """Encoder and decoder with the loss between them."""

    def __init__(self, config: TokenizerTrainConfig, world_size: int = 1) -> None:
        super().__init__()
        self.config, self.world_size = config, world_size
        self.encoder, self.decoder = Encoder(config.model), Decoder(config.model)

    def forward(
        self, images: Tensor, noise: Tensor, temperature: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: uint8 [B, h, w, 3].
            noise: [B, V, h, w] over the tokens' grid, of `gumbel_noise`.
            temperature, kl_weight: [B], the same for all images of a step.

        Returns:
            loss; mean absolute error of the pixels in [0, 1] (of drawn words); [V] int64, how often each word is the
            likeliest.
        """
        config = self.config
        pixels = to_mapped(images)
        log_q = self.encoder(pixels).float().log_softmax(1)
        stats = self.decoder(draw_words(log_q, noise, temperature[:, None, None, None])).float()
        divergence = (log_q.exp() * log_q).sum(1).mean() + math.log(config.model.vocab_size)
        usage = config.objective.usage_weight * usage_entropy(log_q, self.world_size)
        loss = logit_laplace(stats, pixels) + (kl_weight[0] * divergence - usage) / (3 * config.model.stride**2)
        error = (to_images(stats.detach()).float() - images.float()).abs().mean() / 255
        return loss, error, torch.bincount(log_q.argmax(1).flatten(), minlength=config.model.vocab_size)
