"""Tokens ahead of time, top to bottom:

index -> all token views of an image -> visual tokens -> two bytes each, at the image's place in each view's file
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastbeit.config.pretrain import Config
from fastbeit.data.batch import TokenViews
from fastbeit.data.index.given import index_sources, kept_or_gone
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_token_loader
from fastbeit.engine.ranks import World, start_world
from fastbeit.errors import DATA_MISSING, DONE, PREEMPTED, ConfigError, DataError
from fastbeit.plural import counted
from fastbeit.tokenizer.cache.reader import BAD, BAD_SAMPLES, FORMAT, Card, how_far, make_recipe
from fastbeit.tokenizer.cache.writer import CacheWriter, chunk_rows, is_begun, refuse_others_files
from fastbeit.tokenizer.disk import BUNDLED_NOTE, absolute, is_bundled
from fastbeit.tokenizer.precision import Chosen
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.tokenizer.source import load_run_tokenizer
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.pipeline import settle_pipeline
from fastbeit.train.rundir import hold
from fastbeit.train.stop import Stop

ENCODED_TOGETHER = 64  # crops: fills a GPU; on a CPU some ten seconds, after which it looks whether to stop
SAY_EVERY_S = 10.0
DEFAULT_FOLDER = "tokens"


def tokenize(config: Config, command: list[str]) -> int:
    """Write the tokens of `data.num_crops` crops of every image to `data.tokens`, or go on where a job stopped.

    Args:
        command: what the user typed, said again where the job stops early.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad config, data or tokenizer, or a directory that holds something else; the message says what to do.
    """
    if not config.data.num_crops:
        raise ConfigError(
            "data.num_crops=0 draws ever new crops, which cannot be kept; add data.num_crops=K, for example 8"
        )
    if config.objective != "tokens":
        raise ConfigError(f"objective={config.objective} predicts no tokens; set objective=tokens")
    if not config.data.index:
        raise ConfigError("data.index is not set; add data.index=PATH")
    folder = Path(config.data.tokens or DEFAULT_FOLDER)
    world = start_world(config.engine)
    # held-out images get no tokens
    config = config.model_copy(update={"data": config.data.model_copy(update={"val_index": ""})})
    config, pipeline = settle_pipeline(config, world, None, folder)
    with world.within_first(lambda: _claim(folder)):
        data, lines = index_sources(config.data, folder, is_begun(folder), world.from_first)
        config = config.model_copy(update={"data": data})
        index = open_index(Path(data.index), data.levels)
        if world.rank == 0:
            print(*lines, pipeline, sep="\n")
        chosen = load_run_tokenizer(config, index, world.device)
        card = Card(
            format=FORMAT,
            recipe=make_recipe(config, index, chosen.tokenizer),
            precision=chosen.precision,
            chunk_rows=chunk_rows(config.data.num_crops),
            command=shlex.join(command),
            tokenizer_path=absolute(config.tokenizer.path),
        )
        writer = CacheWriter(folder, card, world.rank)
        with Stop() as stop:
            world.barrier()
            return _tokenize(config, index, chosen, writer, world, stop)


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Hold the directory; where no token was begun, an index that was made for them does not stay."""
    with hold(folder, "data.tokens"):
        refuse_others_files(folder)
        was_begun = is_begun(folder)
        with kept_or_gone(folder, lambda: is_begun(folder) and not was_begun):
            yield


def _tokenize(config: Config, index: Index, chosen: Chosen, writer: CacheWriter, world: World, stop: Stop) -> int:
    folder, recipe, tokenizer = writer.folder, writer.card.recipe, chosen.tokenizer
    if world.rank == 0:
        print(
            f"{counted(recipe.num_images, 'image')} x {counted(recipe.views, 'crop')} x "
            f"{counted(recipe.num_tokens, 'token')}: "
            f"{writer.num_bytes:,} bytes in '{folder}'; {counted(world.size, 'rank')} on {world.device.type}",
        )
        print(chosen.line, *([BUNDLED_NOTE] if is_bundled(tokenizer.fingerprint) else []), sep="\n", flush=True)
    # rank 0 lists the pending chunks for all: a later look would find chunks that this job has just written
    pending = world.gather(writer.begin() if world.rank == 0 else [])
    mine = pending[world.rank :: world.size]
    loader = make_token_loader(
        config.data,
        index,
        token_size=recipe.token_size,
        seed=config.seed,
        rows=[writer.chunks[chunk] for chunk in mine],
        together=max(1, ENCODED_TOGETHER // recipe.views),
    )
    bad_samples = BadSamples(folder / BAD_SAMPLES, len(index), writes=world.rank == 0)
    num_written = 0
    with contextlib.closing(loader), Progress(writer, pending, world) as progress:
        views = stop.until_wanted(loader)
        if world.rank == 0:
            bad_samples.add(writer.bad())
        for turn in range(-(-len(pending) // world.size)):
            # ---- a chunk on each rank; in the last turn some may have none -------------------------------------------
            made = _encode(writer.chunks[mine[turn]], views, tokenizer, stop, progress) if turn < len(mine) else None
            if made:
                writer.write(mine[turn], *made)
                num_written += 1
            # ----------------------------------------------------------------------------------------------------------

            bad = world.gather(made[1] if made else [])
            if world.rank == 0:
                bad_samples.add(bad)
                if bad_samples.error:
                    raise bad_samples.error
            if world.sum([stop.wanted])[0]:
                break

    is_whole = world.sum([num_written])[0] == len(pending)
    if world.rank == 0 and is_whole:
        _refuse_all_bad(bad_samples, len(index))
        writer.finish()
    world.barrier()
    world.leave()
    if world.rank == 0:
        if is_whole:
            print(f"tokens: {folder}{'' if pending else ' (were finished before)'}")
        else:
            print(f"stopped, saved: {how_far(folder)}", file=sys.stderr)
    return DONE if is_whole else PREEMPTED


def _encode(
    rows: range, views: Iterator[TokenViews], tokenizer: Tokenizer, stop: Stop, progress: "Progress"
) -> tuple[np.ndarray, list[tuple[int, str]]] | None:
    """Tokens [rows, K, N] uint16 of a chunk, and its bad images; None when a stop is wanted before its end."""
    parts, bad, done = [], [], rows.start
    while done < rows.stop:
        made = next(views, None)
        if made is None:
            return None
        crops = made.images.flatten(0, 1).split(ENCODED_TOGETHER)
        tokens = torch.cat([tokenizer.encode(some) for some in crops]).unflatten(0, made.images.shape[:2])
        part = tokens.cpu().numpy().astype(np.uint16)
        part[[i - done for i, _ in made.bad]] = BAD
        parts.append(part)
        bad += made.bad
        done = made.rows.stop
        progress.advance(tokens.shape[0] * tokens.shape[1])
    return np.concatenate(parts), bad


def _refuse_all_bad(bad_samples: BadSamples, num_images: int) -> None:
    if len(bad_samples) == num_images:
        raise DataError(f"none of the {num_images} images is valid; see '{bad_samples.path}'", DATA_MISSING)


class Progress:
    """What rank 0 says for all: a bar with img/s and the time left, or a line now and then where no terminal looks on.

    An image is a crop here, as in training. Ranks go side by side: what rank 0 does, each of them does.
    """

    def __init__(self, writer: CacheWriter, pending: list[int], world: World) -> None:
        recipe = writer.card.recipe
        self.num_ranks, self.speaks = world.size, world.rank == 0
        self.total = recipe.num_images * recipe.views
        self.first = self.total - sum(len(writer.chunks[chunk]) for chunk in pending) * recipe.views
        self.done, self.began, self.said = self.first, time.perf_counter(), time.perf_counter()
        self.bar = tqdm(
            total=self.total,
            initial=self.first,
            unit="img",
            dynamic_ncols=True,
            disable=not (self.speaks and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, num_crops: int) -> None:
        more = min(num_crops * self.num_ranks, self.total - self.done)
        self.done += more
        self.bar.update(more)
        now = time.perf_counter()
        if self.speaks and self.bar.disable and now - self.said > SAY_EVERY_S:
            self.said = now
            rate = (self.done - self.first) / (now - self.began)
            left_s = (self.total - self.done) / rate
            print(
                f"{self.done:,}/{self.total:,} img  {rate:.1f} img/s  ETA {tqdm.format_interval(left_s)}",
                file=sys.stderr,
                flush=True,
            )
