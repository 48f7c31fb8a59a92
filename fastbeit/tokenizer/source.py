"""Where the visual tokens of a run's batches come from: nowhere, from a tokenizer on the fly, or from a cache."""

from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Size
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index
from fastbeit.data.loader import make_token_loader
from fastbeit.data.sampling import crop_of
from fastbeit.data.to_device import move
from fastbeit.errors import USAGE, RunError
from fastbeit.masking import Slots
from fastbeit.tokenizer.cache.reader import TokenCache, check_cache, open_cache
from fastbeit.tokenizer.disk import absolute, load_tokenizer
from fastbeit.tokenizer.precision import DTYPES, Chosen, choose_tokenizer, encoding_dtype
from fastbeit.tokenizer.protocol import Tokenizer

NUM_COMPARED = 64  # images on which a tokenizer's precision is tried


class TokenSource(Protocol):
    """What a run knows of its visual tokens; all None when it regresses pixels."""

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def fingerprint(self) -> str | None:
        """Of the tokenizer that made the tokens, now or for a cache."""
        ...

    @property
    def tokenizer_path(self) -> str:
        """Where that tokenizer was then, absolute; empty: it is the bundled one, or nobody knows."""
        ...

    @property
    def token_size(self) -> Size | None:
        """Height and width of the token view that batches must have; None: they need none."""
        ...

    def tokens(self, batch: Batch, slots: Slots) -> Tensor | None:
        """[B, M] int64 on the device: the visual tokens of a batch in the slots that are predicted."""
        ...

    @property
    def agreement(self) -> float | None:
        """Share of the tokens that are those of fp32, on a few images; None: not known here."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """For images that are not in the batches; do not keep it."""
        ...


def open_token_source(config: Config, index: Index, device: torch.device) -> TokenSource:
    """
    Raises:
        RunError: the tokenizer or the cache cannot be used, or the cache holds other tokens than the run wants.
    """
    if config.objective != "tokens":
        return NoTokens()
    if not config.data.tokens:
        return EncodedTokens(load_run_tokenizer(config, index, device), config, device)
    return CachedTokens(open_cache(Path(config.data.tokens)), config, index, device)


def load_run_tokenizer(config: Config, index: Index, device: torch.device) -> Chosen:
    """A run's tokenizer, in a precision that gives nearly the tokens of fp32; alike on all ranks and in all jobs."""

    @cache
    def load(dtype: torch.dtype) -> Tokenizer:
        return load_tokenizer(config.tokenizer.path, device, dtype)

    precision, images = config.tokenizer.precision, torch.empty(0)
    if encoding_dtype(precision, device) != torch.float32:
        images = _some_views(config, index, load(torch.float32).view_size(config.grid))
    return choose_tokenizer(load, precision, device, images)


def _some_views(config: Config, index: Index, token_size: Size) -> Tensor:
    """Token views [n, h, w, 3] uint8 of images from all over the index."""
    data = config.data.model_copy(update={"num_crops": 1, "num_workers": 0})
    rows = range(0, len(index), max(1, len(index) // NUM_COMPARED))[:NUM_COMPARED]
    (made,) = make_token_loader(data, index, token_size=token_size, seed=config.seed, rows=[rows], together=len(rows))
    bad = {i for i, _ in made.bad}
    return made.images[[place for place, i in enumerate(rows) if i not in bad], 0]


class NoTokens:
    vocab_size = fingerprint = token_size = agreement = None
    tokenizer_path = ""

    def tokens(self, batch: Batch, slots: Slots) -> None:
        return None

    def tokenizer(self) -> None:
        return None

    def __str__(self) -> str:
        return "none, pixels are regressed"


class EncodedTokens:
    """A tokenizer looks at the token view of each batch."""

    def __init__(self, chosen: Chosen, config: Config, device: torch.device) -> None:
        self._tokenizer, self._device = chosen.tokenizer, device
        self.agreement, self._line = chosen.agreement, chosen.line
        self.vocab_size, self.fingerprint = self._tokenizer.vocab_size, self._tokenizer.fingerprint
        self.token_size = self._tokenizer.view_size(config.grid)
        self.tokenizer_path = absolute(config.tokenizer.path)

    def tokens(self, batch: Batch, slots: Slots) -> Tensor:
        assert batch.token_images is not None
        return self._tokenizer.encode_at(move(batch.token_images, self._device), slots.predict_idx)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def __str__(self) -> str:
        return f"of {self.vocab_size} words, made on the fly by tokenizer {self.fingerprint[:16]}; {self._line}"


class CachedTokens:
    """A cache knows what the tokenizer would say; the tokenizer itself is wanted for held-out images alone."""

    token_size = agreement = None

    def __init__(self, cache: TokenCache, config: Config, index: Index, device: torch.device) -> None:
        self._cache, self._config, self._device = cache, config, device
        self.vocab_size, self.fingerprint = cache.vocab_size, cache.fingerprint
        self.tokenizer_path = absolute(config.tokenizer.path) or cache.card.tokenizer_path
        check_cache(cache, config, index)
        if config.data.val_index or config.tokenizer.path:
            # now, not after the first thousand steps
            chosen = load_run_tokenizer(config, index, device)
            self._check(chosen.tokenizer)
            self._dtype = DTYPES[chosen.precision]

    def tokens(self, batch: Batch, slots: Slots) -> Tensor:
        tokens = self._cache.read(batch.sample, crop_of(batch.epoch, self._config.data.num_crops))
        return move(tokens, self._device).gather(1, slots.predict_idx)

    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self._config.tokenizer.path, self._device, self._dtype)
        self._check(tokenizer)
        return tokenizer

    def _check(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            RunError: tokenizer.path is another one than the cache was made by (exit code 2).
        """
        if tokenizer.fingerprint != self.fingerprint:
            path = self._config.tokenizer.path
            place = f"'{path}'" if path else "(empty: the bundled one)"
            raise RunError(
                f"data.tokens '{self._cache.folder}' was made by tokenizer {self.fingerprint[:16]}..., but "
                f"tokenizer.path {place} is {tokenizer.fingerprint[:16]}...; set tokenizer.path to "
                "the one that made the tokens"
                + ("" if path else ", which validation wants, or data.val_index to nothing"),
                USAGE,
            )

    def __str__(self) -> str:
        return (
            f"of {self.vocab_size} words, from data.tokens '{self._cache.folder}', made by tokenizer "
            f"{self.fingerprint[:16]} in {self._cache.card.precision}; {self._cache.checked}"
        )


def visual_tokens(tokenizer: Tokenizer | None, batch: Batch, device: torch.device) -> Tensor | None:
    """[B, N] int64: what is to be predicted of a batch; None for pixels, which need no tokenizer."""
    if tokenizer is None or batch.token_images is None:
        return None
    return tokenizer.encode(move(batch.token_images, device))
