"""What a cache of tokens holds, in figures: how frequent each word is, and the loss of a model that sees no image."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fastbeit.errors import CacheError
from fastbeit.tokenizer.cache.reader import BAD, TokenCache, npy_header, view_path

ROWS_AT_ONCE = 1 << 14
TOP_WORDS = 10
BAR_WIDTH, NUM_BARS = 40, 12


@dataclass(frozen=True)
class Census:
    """Of all tokens in a cache."""

    histogram: np.ndarray  # [V] int64
    num_bad_rows: int  # images x views without tokens

    @property
    def entropy(self) -> float:
        """In nats: the loss of a model that knows how frequent the words are, and sees no image."""
        share = self.histogram[self.histogram > 0] / max(1, self.histogram.sum())
        return float(-(share * np.log(share)).sum())


def take_census(cache: TokenCache) -> Census:
    """Read a cache once, from end to end.

    Raises:
        CacheError: a view's file is not the one that was written.
    """
    histogram = np.zeros(BAD + 1, np.int64)
    num_bad_rows = 0
    for number, view in enumerate(cache.views):
        digest = hashlib.sha256(npy_header(*view.shape))
        for start in range(0, len(view), ROWS_AT_ONCE):
            rows = np.ascontiguousarray(view[start : start + ROWS_AT_ONCE])
            digest.update(rows.data)
            histogram += np.bincount(rows.reshape(-1), minlength=len(histogram))
            num_bad_rows += int((rows[:, 0] == BAD).sum())
        path = view_path(cache.folder, number)
        wanted = cache.card.sha256.get(path.name, "nothing")
        if digest.hexdigest() != wanted:
            raise CacheError(
                f"'{path}' wants sha256 {wanted[:16]}..., as tokens.json says; found {digest.hexdigest()[:16]}...: it "
                "was damaged or replaced; copy it again, or delete the directory and make the tokens again"
            )
    return Census(histogram[: cache.vocab_size], num_bad_rows)


def describe(cache: TokenCache) -> str:
    """A page to read; errors as in `take_census`."""
    census, recipe, card = take_census(cache), cache.recipe, cache.card
    in_use = int((census.histogram > 0).sum())
    num_bytes = sum(view.nbytes for view in cache.views)
    lines = {
        "images": f"{recipe.num_images:,}, {card.num_bad} of them bad (bad_samples.jsonl), index {recipe.index[:16]}",
        "crops": f"{recipe.views} an image, {recipe.grid[0]}x{recipe.grid[1]} tokens each; {census.num_bad_rows} bad",
        "size": f"{num_bytes:,} bytes, {num_bytes // recipe.num_images:,} an image, {2 * recipe.num_tokens} a crop",
        "tokenizer": f"{recipe.tokenizer}, {recipe.vocab_size} words, {card.precision}",
        "recipe": f"seed {recipe.seed}, crop_scale {_pair(recipe.crop_scale)}, crop_ratio {_pair(recipe.crop_ratio)}, "
        f"flip {recipe.flip}, jitter {recipe.jitter} on {recipe.jitter_on}, pipeline {recipe.pipeline}, "
        f"token view {recipe.token_size[0]}x{recipe.token_size[1]}",
        "made by": card.command,
        "words": f"{in_use} of {recipe.vocab_size} in use, perplexity {math.exp(census.entropy):.1f}",
        "entropy": f"{census.entropy:.4f} nats a token: the baseline to beat, of a model that sees no image; "
        f"ln {recipe.vocab_size} = {math.log(recipe.vocab_size):.4f}",
        "files": "are those that were written (sha256 of all)",
    }
    return "\n".join([*(f"{name:<10} {text}" for name, text in lines.items()), "", *_chart(census.histogram)])


def _chart(histogram: np.ndarray) -> list[str]:
    """The most frequent words, and how frequent words of lower rank are."""
    order = np.argsort(-histogram, kind="stable")
    share = histogram[order] / max(1, histogram.sum())
    top = ", ".join(f"{word} ({part:.2%})" for word, part in zip(order[:TOP_WORDS], share, strict=False))
    lines = [f"most frequent words: {top}", "share of a word, by rank:"]
    edges = np.unique(np.geomspace(1, len(share) + 1, NUM_BARS + 1).astype(int))
    for first, end in zip(edges, edges[1:], strict=False):
        mean = share[first - 1 : end - 1].mean()
        ranks = f"{first}" if end == first + 1 else f"{first} to {end - 1}"
        lines.append(f"  {ranks:>14}  {mean:>9.4%}  {'#' * round(BAR_WIDTH * mean / max(share[0], 1e-12))}")
    return lines


def _pair(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4g} to {bounds[1]:.4g}"
