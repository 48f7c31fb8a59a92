"""Visual tokens made ahead of time, on disk: what `fastbeit tokenize` writes and pre-training reads.

A directory; n images, K crops of each, the token view of each crop in N tokens:

    tokens.json         `Card`: what the tokens are of, and checksums of it and of each view's file; written last
    view-000.npy        uint16 [n, N]: row i holds the tokens of image i of the index in view 0, in row-by-row order;
                        plain NumPy, `np.load(..., mmap_mode="r")` reads it; all BAD where the image could not be read
    bad_samples.jsonl   those images, with their reasons; not there when all are good

While it is made there are `plan.json` (the card without hashes), `.view-000.npy.part` and `done-000.jsonl`, the chunks
of rows that rank 0 has written, and no `tokens.json`: nothing that reads tokens takes it for whole.
"""

import hashlib
import io
import json
import mmap
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field, ValidationError
from torch import Tensor

from fastbeit.checksums import Checked, check_blocks
from fastbeit.config.explain import explain
from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Count, Fraction, Levels, Positive, Section, Size
from fastbeit.data.index.reader import Index
from fastbeit.errors import DATA_MISSING, USAGE, CacheError, RunError
from fastbeit.files import read_records
from fastbeit.tokenizer.protocol import Tokenizer

CARD, PLAN, BAD_SAMPLES = "tokens.json", "plan.json", "bad_samples.jsonl"
FORMAT = 3
BAD = np.iinfo(np.uint16).max  # in place of each token of an image that could not be read
MAX_VOCAB = BAD  # words 0 to BAD - 1
AGAIN = "copy it again, or delete the directory and make the tokens again"


class Recipe(Section):
    """All that decides which token stands where, by the keys of a run: equal recipes, equal tokens."""

    seed: int
    index: str = Field(description="fingerprint")
    num_images: Count
    views: Count = Field(description="token views of an image, one a crop: data.num_crops")
    crop_scale: tuple[Positive, Positive]
    crop_ratio: tuple[Positive, Positive]
    flip: Fraction
    jitter: Fraction
    jitter_on: str
    image_size: Size = Field(description="patch view: how large it is decides how small a large photo is decoded")
    levels: Levels = Field(description="of 16-bit images")
    pipeline: str
    grid: Size = Field(description="tokens down and across")
    token_size: Size = Field(description="token view, height and width in pixels")
    tokenizer: str = Field(description="fingerprint")
    vocab_size: int = Field(ge=1, le=MAX_VOCAB)

    @property
    def num_tokens(self) -> int:
        """Of an image in one view."""
        return self.grid[0] * self.grid[1]


class Card(Section):
    """What `tokens.json` holds."""

    format: int = Field(description="version of this layout")
    recipe: Recipe
    precision: str = Field(description="dtype that the tokenizer encoded in; rounding can turn a few tokens")
    chunk_rows: Count = Field(description="rows written together while the cache was made")
    command: str = Field(description="what the user typed")
    tokenizer_path: str = Field(default="", description="where the tokenizer was, absolute; empty: the bundled one")
    num_bad: int = Field(default=0, description="images that could not be read")
    sha256: dict[str, str] = Field(default={}, description="of each view's file; empty while it is made")
    blocks: dict[str, list[int]] = Field(default={}, description="CRC-32 of each MiB of tokens of each view's file")
    checksum: str = Field(default="", description="sha256 of all that is said here but this")

    def signed(self) -> "Card":
        """The same with its checksum."""
        # a card that was written before there was the path says nothing of it
        unknown = set() if self.tokenizer_path else {"tokenizer_path"}
        text = self.model_copy(update={"checksum": ""}).model_dump_json(exclude=unknown)
        return self.model_copy(update={"checksum": hashlib.sha256(text.encode()).hexdigest()})


def view_path(folder: Path, view: int) -> Path:
    return folder / f"view-{view:03}.npy"


def npy_header(num_images: int, num_tokens: int) -> bytes:
    """The first bytes of a view's file."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (num_images, num_tokens)})
    return file.getvalue()


def wanted_of(config: Config, index: Index) -> dict[str, Any]:
    """The part of a `Recipe` that a run knows without its tokenizer."""
    data = config.data
    return {
        "seed": config.seed,
        "index": index.fingerprint,
        "num_images": len(index),
        "views": data.num_crops,
        "crop_scale": data.crop_scale,
        "crop_ratio": data.crop_ratio,
        "flip": data.flip,
        "jitter": data.jitter,
        "jitter_on": data.jitter_on,
        "levels": data.levels,
        "image_size": data.image_size,
        "pipeline": data.pipeline,
        "grid": config.grid,
    }


def make_recipe(config: Config, index: Index, tokenizer: Tokenizer) -> Recipe:
    """
    Raises:
        RunError: the tokenizer has more words than two bytes can tell apart (exit code 2).
    """
    if tokenizer.vocab_size > MAX_VOCAB:
        raise RunError(
            f"tokens are kept in two bytes, for vocabularies of at most {MAX_VOCAB} words; the tokenizer "
            f"'{config.tokenizer.path}' has {tokenizer.vocab_size}: leave data.tokens empty, or take another tokenizer",
            USAGE,
        )
    return Recipe(
        **wanted_of(config, index),
        token_size=tokenizer.view_size(config.grid),
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )


class TokenCache:
    """A finished cache, opened; `open_cache` makes one."""

    def __init__(self, folder: Path, card: Card, views: list[np.ndarray], checked: Checked) -> None:
        self.checked = checked
        self.folder, self.card, self.recipe = folder, card, card.recipe
        self.vocab_size, self.fingerprint = card.recipe.vocab_size, card.recipe.tokenizer
        self.views = views  # [n, N] uint16 each

    def read(self, sample: Tensor, view: Tensor) -> Tensor:
        """Tokens [B, N] int64 of images [B] of the index in views [B].

        Raises:
            CacheError: an image had no tokens since it could not be read when they were made, or has one that is no
                word.
        """
        tokens = np.empty((len(sample), self.recipe.num_tokens), np.int64)
        for number in view.unique().tolist():
            chosen = (view == number).numpy()
            tokens[chosen] = self.views[number][sample.numpy()[chosen]]
        bad = tokens[:, 0] == BAD
        if bad.any():
            self._refuse_bad(int(sample[int(bad.argmax())]))
        if len(tokens) and tokens.max() >= self.vocab_size:
            row = int(tokens.max(axis=1).argmax())
            raise CacheError(
                f"'{view_path(self.folder, int(view[row]))}' is damaged: image {int(sample[row])} has the token "
                f"{tokens[row].max()}, and words go from 0 to {self.vocab_size - 1}; {AGAIN}"
            )
        return torch.from_numpy(tokens)

    def _refuse_bad(self, sample: int) -> None:
        reasons = read_bad_samples(self.folder)
        raise CacheError(
            f"data.tokens '{self.folder}' has no tokens of image {sample}, which could not be read when they were made "
            f"({reasons.get(sample, 'not listed')}) and now can; make the tokens again"
        )


def read_bad_samples(folder: Path) -> dict[int, str]:
    """Row of the index, and path and reason, of the images without tokens."""
    lines, _ = read_records(folder / BAD_SAMPLES)
    return {line["sample"]: line["reason"] for line in lines if {"sample", "reason"} <= line.keys()}


def open_cache(folder: Path) -> TokenCache:
    """Map the views of a finished cache; of a large one a sample of tokens is compared with their checksums.

    Raises:
        CacheError: there is none (exit code 66), it is not finished, or a file is missing, cut short, damaged or
            another (78).
    """
    if not (folder / CARD).is_file():
        raise _not_finished(folder)
    card = read_card(folder / CARD)
    shape = card.recipe.num_images, card.recipe.num_tokens
    header = npy_header(*shape)
    views = []
    for number in range(card.recipe.views):
        path = view_path(folder, number)
        check_view(path, header, len(header) + 2 * shape[0] * shape[1])
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # samples come in random order: what stands beside one is not wanted
        if sys.platform != "win32":
            mapped.madvise(mmap.MADV_RANDOM)
        views.append(np.frombuffer(mapped, "<u2", offset=len(header)).reshape(shape))
    names = [view_path(folder, number).name for number in range(card.recipe.views)]
    checked = check_blocks(dict(zip(names, views, strict=True)), card.blocks)
    if checked.damaged:
        name, place = checked.damaged
        raise CacheError(
            f"'{folder / name}' is damaged: the MiB of tokens from byte {place} on differs from its checksum; {AGAIN}"
        )
    return TokenCache(folder, card, views, checked)


def check_view(path: Path, header: bytes, num_bytes: int) -> None:
    """
    Raises:
        CacheError: the file is missing, has another size, or begins in another way.
    """
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
        found_bytes = path.stat().st_size
    except OSError as err:
        raise CacheError(f"'{path}' cannot be read: {err.strerror}; {AGAIN}") from err
    if found_bytes != num_bytes:
        raise CacheError(f"'{path}' wants {num_bytes} bytes, has {found_bytes}: it was cut short or replaced; {AGAIN}")
    if found != header:
        raise CacheError(f"'{path}' wants to begin with {header!r}, found {found!r}; {AGAIN}")


def read_card(path: Path) -> Card:
    """
    Raises:
        CacheError: the file is damaged or of another version.
    """
    try:
        text = path.read_bytes()
        version = _version(text)
        if version != FORMAT:
            raise CacheError(
                f"'{path}' has format {version}, wanted {FORMAT}; make the tokens again: fastbeit tokenize"
            )
        card = Card.model_validate_json(text)
        if card.signed() != card:
            raise CacheError(f"'{path}' is damaged: it differs from its own checksum; {AGAIN}")
        return card
    except OSError as err:
        raise CacheError(f"'{path}' cannot be read: {err.strerror}; {AGAIN}") from None
    except ValidationError as err:
        raise CacheError(f"'{path}': {explain(err, Card)[0]}; copy it again, or make the tokens again") from None


def pipeline_of(folder: Path) -> str | None:
    """The pipeline that made the views of the tokens in a directory, finished or not; None: there are none.

    Raises:
        CacheError: the file that says so is damaged or of another version.
    """
    card = next((path for path in (folder / CARD, folder / PLAN) if path.is_file()), None)
    return read_card(card).recipe.pipeline if card else None


def _version(text: bytes) -> Any:
    """What a card says of its format; `FORMAT` where it says nothing, for then more is wrong with it."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        return FORMAT
    return card.get("format", FORMAT) if isinstance(card, dict) else FORMAT


class Done(NamedTuple):
    """A chunk of rows that a journal says is on disk."""

    bad: list[tuple[int, str]]  # images that could not be read
    sums: list[int]  # CRC-32 of its rows in each view's file


def read_journals(folder: Path) -> dict[int, Done]:
    """The chunks that are on disk while a cache is made, by number."""
    done = {}
    for path in sorted(folder.glob("done-*.jsonl")):
        # of the line that a kill cut short, or a disk damaged, the chunk will be made again
        for entry in read_records(path)[0]:
            try:
                bad = [(int(sample), str(reason)) for sample, reason in entry["bad"]]
                done[int(entry["chunk"])] = Done(bad, [int(one) for one in entry["crc32"]])
            except (KeyError, TypeError, ValueError):
                continue
    return done


def _not_finished(folder: Path) -> CacheError:
    if not (folder / PLAN).is_file():
        what = "holds no tokens" if folder.is_dir() else "does not exist"
        return CacheError(
            f"data.tokens '{folder}' {what}; make them: fastbeit tokenize CONFIG data.num_crops=K data.tokens={folder}",
            DATA_MISSING,
        )
    return CacheError(f"data.tokens '{folder}' is not finished: {how_far(folder)}")


def how_far(folder: Path) -> str:
    """What there is of a cache that is being made, and how to go on."""
    plan = read_card(folder / PLAN)
    num_chunks = -(-plan.recipe.num_images // plan.chunk_rows)
    num_done = len(read_journals(folder))
    return f"{num_done} of {num_chunks} chunks ({num_done / num_chunks:.0%}) are made; to go on: {plan.command}"


def check_cache(cache: TokenCache, config: Config, index: Index) -> None:
    """Make sure that a cache holds the tokens that a run would make itself, with the same tokenizer.

    Fewer crops than the cache has are fine: the first K of them are what data.num_crops=K draws.

    Raises:
        RunError: it holds others (exit code 2), with each value that differs.
    """
    wanted, num_crops = wanted_of(config, index), cache.recipe.views
    if not config.data.num_crops:
        raise RunError(
            f"data.tokens '{cache.folder}' holds tokens of {num_crops} crops of each image, and data.num_crops=0 draws "
            f"new ones; set data.num_crops={num_crops}, or leave data.tokens empty",
            USAGE,
        )
    wanted["views"] = max(num_crops, config.data.num_crops)
    found = cache.recipe.model_dump()
    changes = differences({name: found[name] for name in wanted}, wanted)
    if changes:
        raise RunError(
            f"data.tokens '{cache.folder}' holds other tokens than this run wants: {changes}. Make tokens for this run "
            "(fastbeit tokenize), or take the settings that these were made with",
            USAGE,
        )


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Names and values that differ between what a cache was made with and what is wanted."""
    return "; ".join(
        f"{KEYS.get(name, f'data.{name}')} is {_show(there[name])} there, {_show(value)} here"
        for name, value in here.items()
        if there[name] != value
    )


KEYS = {
    "seed": "seed",
    "views": "data.num_crops",
    "tokenizer": "tokenizer",
    "grid": "grid of patches",
    "precision": "tokenizer.precision",
} | {name: name.replace("_", " ") for name in ("num_images", "token_size", "vocab_size")}


def _show(value: Any) -> str:
    # a fingerprint is told from another by its beginning
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 16 else str(value)
