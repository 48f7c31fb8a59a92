"""Makes a cache of tokens so that after a kill, on any rank, only the unfinished chunks are made again.

Each view's file has its whole size from the start. A chunk of rows is written into all of them and synced to disk; then
its line goes into the journal of its rank, with checksums. What no journal names, or is not what it says, is made
again, with the same tokens. When all is there, the files get their names, and `tokens.json` comes last.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

from fastbeit.checksums import block_sums
from fastbeit.data.index.given import INDICES
from fastbeit.errors import CANNOT_WRITE, USAGE, CacheError, RunError
from fastbeit.files import append_line, aside, put_in_place, sha256, sync, sync_open, write_whole
from fastbeit.tokenizer.cache.reader import (
    BAD_SAMPLES,
    CARD,
    PLAN,
    Card,
    check_view,
    differences,
    npy_header,
    open_cache,
    read_card,
    read_journals,
    view_path,
)

CHUNK_CROPS = 2048  # made together: some minutes of one CPU core at the most, and seldom enough synced for a GPU
# without it NFS may write back a whole page, and with it undo what another node wrote beside
SYNCED = os.O_DSYNC if sys.platform != "win32" else 0


def chunk_rows(num_crops: int) -> int:
    return max(1, CHUNK_CROPS // num_crops)


def is_begun(folder: Path) -> bool:
    """Whether a directory holds tokens, or the beginnings of some."""
    return (folder / CARD).exists() or (folder / PLAN).exists()


def refuse_others_files(folder: Path) -> None:
    """
    Raises:
        RunError: a directory in which no tokens were begun holds something else (exit code 2).
    """
    # a kill before the plan was there leaves parts of ours
    ours = {".lock", INDICES}
    others = [path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".part"]
    if others and not is_begun(folder):
        raise RunError(
            f"data.tokens '{folder}' is not empty and holds no tokens, but {others[0]}; choose another directory", USAGE
        )


class CacheWriter:
    """One rank's hand in a cache; `begin` and `finish` are for rank 0 alone, which holds the directory."""

    def __init__(self, folder: Path, card: Card, rank: int) -> None:
        self.folder, self.card, self.rank = folder, card, rank
        self.header = npy_header(card.recipe.num_images, card.recipe.num_tokens)
        self.row_bytes = 2 * card.recipe.num_tokens
        self.view_bytes = len(self.header) + card.recipe.num_images * self.row_bytes
        self.num_bytes = self.view_bytes * card.recipe.views
        self.chunks = [
            range(start, min(start + card.chunk_rows, card.recipe.num_images))
            for start in range(0, card.recipe.num_images, card.chunk_rows)
        ]

    def begin(self) -> list[int]:
        """Make the files, or find those of an earlier job; gives the chunks that are still to be made.

        Raises:
            RunError: the directory holds something else, or tokens of another recipe (exit code 2); there is no room
                (74) or no permission (73); a file is damaged (78).
        """
        if (self.folder / CARD).exists():
            self._refuse_another(read_card(self.folder / CARD))
            open_cache(self.folder)
            self._tidy()
            return []
        if not (self.folder / PLAN).exists():
            refuse_others_files(self.folder)
            self._make_files()
            return list(range(len(self.chunks)))
        plan = read_card(self.folder / PLAN)
        self._refuse_another(plan)
        if plan.chunk_rows != self.card.chunk_rows:
            raise CacheError(f"'{self.folder}' was begun by another version; delete the directory and begin again")
        for view in range(self.card.recipe.views):
            check_view(self._part(view), self.header, self.view_bytes)
        parts = [np.memmap(self._part(view), np.uint8, "r", len(self.header)) for view in range(plan.recipe.views)]
        done = read_journals(self.folder)
        return [
            number
            for number, rows in enumerate(self.chunks)
            if number not in done or done[number].sums != [self._sum(part, rows) for part in parts]
        ]

    def _sum(self, part: np.ndarray, rows: range) -> int:
        return zlib.crc32(part[rows.start * self.row_bytes : rows.stop * self.row_bytes].data)

    def write(self, chunk: int, tokens: np.ndarray, bad: list[tuple[int, str]]) -> None:
        """Put the tokens [rows, K, N] uint16 of a chunk on disk, then say so.

        Raises:
            RunError: the disk is full or not writable (exit code 74).
        """
        start = len(self.header) + self.chunks[chunk].start * self.row_bytes
        try:
            sums = []
            for view in range(self.card.recipe.views):
                rows = np.ascontiguousarray(tokens[:, view]).data.cast("B")
                _write_at(self._part(view), start, rows)
                sums.append(zlib.crc32(rows))
            line = json.dumps({"chunk": chunk, "bad": bad, "crc32": sums})
            _append_line(self.folder / f"done-{self.rank:03}.jsonl", line)
        except OSError as err:
            raise RunError(
                f"tokens cannot be written to '{self.folder}': {err.strerror}; what is there stays: make room, and "
                f"run the same command again: {self.card.command}",
                CANNOT_WRITE,
            ) from err

    def bad(self) -> list[tuple[int, str]]:
        """The images that could not be read, of the chunks written so far, in order."""
        return sorted({entry for done in read_journals(self.folder).values() for entry in done.bad})

    def finish(self) -> None:
        """Give the files their names; a second time, after a kill in the middle, it does the rest.

        Raises:
            RunError: the disk is full or not writable (exit code 74).
        """
        if (self.folder / CARD).exists():
            return
        bad = self.bad()
        views = [view_path(self.folder, view) for view in range(self.card.recipe.views)]
        try:
            for path in views:
                if aside(path).exists():
                    put_in_place(path)
            if bad:
                lines = (json.dumps({"sample": sample, "reason": reason}) + "\n" for sample, reason in bad)
                write_whole(self.folder / BAD_SAMPLES, "".join(lines))
            hashes = {path.name: sha256(path) for path in views}
            blocks = {path.name: block_sums(np.memmap(path, np.uint8, "r", len(self.header))) for path in views}
            card = self.card.model_copy(update={"num_bad": len(bad), "sha256": hashes, "blocks": blocks})
            write_whole(self.folder / CARD, card.signed().model_dump_json(indent=1) + "\n")
            self._tidy()
        except OSError as err:
            raise RunError(f"tokens cannot be written to '{self.folder}': {err}", CANNOT_WRITE) from err

    def _part(self, view: int) -> Path:
        """Where a view is written; a kill while files got their names can have left it at its end."""
        path = view_path(self.folder, view)
        return path if path.exists() else aside(path)

    def _make_files(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if self.num_bytes > free:
            raise RunError(
                f"tokens in '{self.folder}' want {self.num_bytes:,} bytes, and the disk has {free:,} free; take "
                "another data.tokens, or fewer data.num_crops",
                CANNOT_WRITE,
            )
        try:
            for view in range(self.card.recipe.views):
                with aside(view_path(self.folder, view)).open("wb") as file:
                    file.write(self.header)
                    file.truncate(self.view_bytes)
            write_whole(self.folder / PLAN, self.card.signed().model_dump_json(indent=1) + "\n")
        except OSError as err:
            raise RunError(f"tokens cannot be written to '{self.folder}': {err}", CANNOT_WRITE) from err

    def _refuse_another(self, card: Card) -> None:
        there, here = ({"precision": c.precision, **c.recipe.model_dump()} for c in (card, self.card))
        changes = differences(there, here)
        if changes:
            raise RunError(
                f"data.tokens '{self.folder}' holds tokens of another recipe: {changes}. Choose another directory, or "
                "that recipe's settings",
                USAGE,
            )

    def _tidy(self) -> None:
        for path in [self.folder / PLAN, *self.folder.glob("done-*.jsonl")]:
            path.unlink(missing_ok=True)


def _write_at(path: Path, start: int, data: memoryview) -> None:
    with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | SYNCED)) as file:
        file.seek(start)
        file.write(data)
        file.flush()
        sync_open(file)


def _append_line(path: Path, line: str) -> None:
    append_line(path, line)
    sync(path)
