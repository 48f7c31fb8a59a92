"""Which visual words images use: a dead word is a class that no patch ever has."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbeit.tokenizer.dvae import Tokenizer

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
            "predict and teach little: raise usage_weight, lower lr, or take a smaller vocab_size"
        )


def word_usage(tokenizer: Tokenizer, images: Iterable[Tensor]) -> WordUsage:
    """Words of uint8 batches [B, h, w, 3]."""
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for batch in images:
        histogram += torch.bincount(tokenizer.encode(batch).flatten(), minlength=len(histogram)).cpu()
    return WordUsage(histogram)
