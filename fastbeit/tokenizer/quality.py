"""What a tokenizer is worth: how well its words give images back, and how many of them are in use.

A dead word is a class that no patch ever has.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbeit.tokenizer.protocol import Tokenizer

MIN_SHARE = 0.5  # of the words; when fewer are in use a warning is due
MIN_TOKENS = 10  # a word; fewer cannot show which words are in use


@dataclass(frozen=True)
class WordUsage:
    """How often each word stands in some images."""

    histogram: Tensor  # [V] int64

    @property
    def num_in_use(self) -> int:
        return int((self.histogram > 0).sum())

    @property
    def perplexity(self) -> float:
        """So many words, all used alike, would have the same entropy."""
        share = self.histogram / self.histogram.sum().clamp(min=1)
        return math.exp(torch.special.entr(share).sum().item())

    def warning(self) -> str | None:
        """What to tell the user when the codebook collapses."""
        num_words = len(self.histogram)
        if self.num_in_use >= MIN_SHARE * num_words or self.histogram.sum() < MIN_TOKENS * num_words:
            return None
        return (
            f"WARNING: only {self.num_in_use} of {num_words} words are in use. Tokens that hardly differ are easy to "
            "predict and teach little: raise objective.usage_weight, lower optim.lr, or set a smaller model.vocab_size"
        )


def word_usage(tokenizer: Tokenizer, images: Iterable[Tensor]) -> WordUsage:
    """Words of uint8 batches [B, h, w, 3]."""
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for batch in images:
        histogram += torch.bincount(tokenizer.encode(batch).flatten(), minlength=len(histogram)).cpu()
    return WordUsage(histogram)


def verdict(figures: dict[str, float], num_words: int, bundled: dict[str, float]) -> str:
    """What the figures of a tokenizer mean, in a line or two.

    Args:
        bundled: those of the bundled tokenizer on the same images; empty: not measured.
    """
    line = (
        f"on held-out images a pixel is off by {figures['mean_abs_error']:.1%} of the range on average, and "
        f"{figures['words_in_use']} of {num_words} words are in use, with the variety of "
        f"{figures['word_perplexity']:.0f} used alike"
    )
    if not bundled:
        return line
    is_better = figures["mean_abs_error"] < bundled["mean_abs_error"]
    beside = (
        f"the bundled tokenizer: {bundled['mean_abs_error']:.1%}, {bundled['words_in_use']} words in use, variety "
        f"{bundled['word_perplexity']:.0f}"
    )
    said = (
        "this one shows these images better"
        if is_better
        else "this one shows these images worse: train longer (optim.steps), or keep the bundled one (tokenizer.path=)"
    )
    return f"{line}\n{beside}; {said}"


@dataclass(frozen=True)
class Quality:
    """Of a tokenizer on some images."""

    mean_abs_error: float  # of pixels in [0, 1]
    psnr_db: float  # of the mean squared error over all pixels
    usage: WordUsage

    def figures(self) -> dict[str, float]:
        return {
            "mean_abs_error": self.mean_abs_error,
            "psnr_db": self.psnr_db,
            "words_in_use": self.usage.num_in_use,
            "word_perplexity": self.usage.perplexity,
        }

    @staticmethod
    def line(figures: dict[str, float]) -> str:
        return (
            f"MAE {figures['mean_abs_error']:.4f}  PSNR {figures['psnr_db']:.2f} dB  "
            f"words in use {figures['words_in_use']}  perplexity {figures['word_perplexity']:.0f}"
        )


def measure_quality(tokenizer: Tokenizer, images: Iterable[Tensor]) -> Quality:
    """Encode and decode uint8 batches [B, h, w, 3]."""
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    absolute, squared, count = 0.0, 0.0, 0
    for batch in images:
        ids = tokenizer.encode(batch)
        histogram += torch.bincount(ids.flatten(), minlength=len(histogram)).cpu()
        decoded = tokenizer.decode(ids, tokenizer.grid((batch.shape[1], batch.shape[2]))).cpu()
        error = (decoded.double() - batch.cpu().double()) / 255
        absolute, squared, count = (
            absolute + error.abs().sum().item(),
            squared + error.square().sum().item(),
            count + error.numel(),
        )
    mean_squared = max(squared / count, 1e-12)
    return Quality(absolute / count, -10 * math.log10(mean_squared), WordUsage(histogram))
