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
from fastbeit.tokenizer.dvae import Decoder, Encoder, one_hot, to_images, to_mapped


def logit_laplace(stats: Tensor, pixels: Tensor) -> Tensor:
    """-log p(pixels): A.3, the mean over mapped pixels [B, 3, h, w]; stats [B, 6, h, w] are a decoder's output."""
    location, log_scale = stats.chunk(2, dim=1)
    error = (torch.logit(pixels) - location).abs()
    return (error * (-log_scale).exp() + log_scale + math.log(2) + (pixels * (1 - pixels)).log()).mean()


def draw_words(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One-hot words [B, V, h, w] drawn from softmax(logits); the gradient is that of the Gumbel-softmax relaxation."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = ((logits + noise) / temperature).softmax(1)
    return one_hot(soft.argmax(1), logits.shape[1]) + (soft - soft.detach())


def usage_entropy(log_q: Tensor) -> Tensor:
    """Entropy in nats of the words that a batch uses, E q; log_q [B, V, h, w]: log-probabilities at each place."""
    # of logarithms: a word whose probability rounds to 0 everywhere has an infinite slope, and that times 0 is NaN
    log_share = log_q.logsumexp((0, 2, 3)) - math.log(log_q.numel() / log_q.shape[1])
    return -(log_share.exp() * log_share).sum()


class DvaeTrainer(nn.Module):
    """Encoder and decoder with the loss between them."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config.architecture), Decoder(config.architecture)

    def forward(self, images: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: uint8 [B, h, w, 3].
            step: decides the temperature and the weight of the KL term.
            generator: of the words that are drawn; on the images' device.

        Returns:
            loss, mean absolute error of the pixels in [0, 1] (of drawn words), words [B, h, w] (the likeliest).
        """
        config = self.config
        pixels = to_mapped(images)
        with autocast(config.precision, pixels.device):
            logits = self.encoder(pixels)
        log_q = logits.float().log_softmax(1)
        words = draw_words(log_q, config.temperature_at(step), generator)
        with autocast(config.precision, pixels.device):
            stats = self.decoder(words)
        divergence = (log_q.exp() * log_q).sum(1).mean() + math.log(config.vocab_size)
        weighted = config.kl_weight_at(step) * divergence - config.usage_weight * usage_entropy(log_q)
        loss = logit_laplace(stats.float(), pixels) + weighted / (3 * config.architecture.stride**2)
        error = (to_images(stats.detach()).float() - images.float()).abs().mean() / 255
        return loss, error, log_q.argmax(1)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Convolutions in bf16 where that is wanted, or where there is a GPU and nothing is said."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
