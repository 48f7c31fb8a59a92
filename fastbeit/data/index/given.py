"""What a user names as images: an index is taken as it is; of a folder, archives, tables or a list one is made first.

    RUN/indices/train.idx          of `data.index`; val.idx of `data.val_index`
    RUN/indices/train.idx.source   what it was made of; written before it
    RUN/indices/train.idx.skipped  what was left out of it

A run that goes on takes its index again and does not look at the source: its checkpoints hang on that index.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastbeit.config.sections import DataConfig, Levels
from fastbeit.data.index.checked import checked_path
from fastbeit.data.index.reader import Index, is_index, open_index
from fastbeit.data.index.scan import Division, build_index
from fastbeit.data.index.sources import WANTED, is_pattern
from fastbeit.data.index.summary import Summary, write_skipped
from fastbeit.errors import CANNOT_CREATE, USAGE, RunError, writing
from fastbeit.files import write_whole

D = TypeVar("D", bound=DataConfig)
INDICES = "indices"  # in a run directory
NAMES = {"index": "train.idx", "val_index": "val.idx"}  # there, by the key of `DataConfig`
WORDS = {"index": "images", "val_index": "held-out images"}


def index_sources(
    data: D, run: Path, is_begun: bool, on_first: Callable[[Callable[[], Any]], Any]
) -> tuple[D, list[str]]:
    """The settings with index files in place of sources, which are indexed into `run`; all ranks must call it.

    Args:
        run: the run directory, held by rank 0; `kept_or_gone` takes back what a start made that is then refused.
        is_begun: whether something in `run` was computed from its indices, so that they must stay as they are.
        on_first: gives all ranks what rank 0 makes, as `World.from_first` does.

    Returns:
        And lines for the log: what was indexed, or was taken again.

    Raises:
        DataError: a source is nothing that is read, or holds no image (66).
        RunError: `run` has an index of another source (2); it cannot be written (73, 74).
    """
    sources = {key: path for key in NAMES if (path := getattr(data, key)) and not _is_an_index(Path(path))}
    found = on_first(lambda: {key: _own_index(key, Path(path), run, is_begun) for key, path in sources.items()})
    own = {key: str(run / INDICES / NAMES[key]) for key in sources}
    return data.model_copy(update=own), list(found.values())


@contextlib.contextmanager
def indexed_for_now(data: D) -> Iterator[D]:
    """The same for a job without a directory of its own: the indices go when the context ends."""
    with tempfile.TemporaryDirectory(prefix="fastbeit-") as folder:
        yield index_sources(data, Path(folder), False, lambda make: make())[0]


@contextlib.contextmanager
def opened(source: Path, levels: Levels) -> Iterator[Index]:
    """The images of a source for the time of a job; what was left out of them is said.

    Args:
        levels: of 16-bit images, as `data.levels`.

    Raises:
        DataError: there is no image in it (66).
        ConfigError: these levels would leave next to nothing of its images.
    """
    if _is_an_index(source):
        yield open_index(source, levels)
        return
    with tempfile.TemporaryDirectory(prefix="fastbeit-") as folder:
        path = Path(folder) / NAMES["index"]
        print(list_images(source, path), file=sys.stderr)
        yield open_index(path, levels)


@contextlib.contextmanager
def kept_or_gone(run: Path, is_kept: Callable[[], bool]) -> Iterator[None]:
    """In this context a start indexes sources; where an error ends it before anything `is_kept`, they go again."""
    folder = run / INDICES
    there = set(folder.glob("*"))
    try:
        yield
    except BaseException:
        if not is_kept():
            with contextlib.suppress(OSError):
                for path in set(folder.glob("*")) - there:
                    path.unlink()
                folder.rmdir()
        raise


def missing(data: DataConfig, run: Path) -> list[str]:
    """A line for each path of these settings that leads nowhere, and of which `run` has no index."""
    lines = []
    for key, name in NAMES.items():
        path = Path(getattr(data, key) or ".")
        is_named_so = path.suffix == ".idx"
        if path.exists() or not is_named_so and (is_pattern(path) or (run / INDICES / name).exists()):
            continue
        how = f"make it with `fastbeit index SOURCE -o {path}`" if is_named_so else f"wanted an index, or {WANTED}"
        lines.append(f"data.{key}: '{path}' does not exist; {how}")
    return lines


def list_images(source: Path, output: Path, division: Division | None = None) -> Summary:
    """`build_index`, and beside the index a list of what was left out of it, and why.

    Raises:
        DataError: as `build_index`.
        RunError: an index (73) or the list (74) cannot be written.
    """
    summary = build_index(source, output, division=division)
    listed = skipped_path(output)
    with writing(f"'{listed}'"):
        # what was checked of an earlier index says nothing of this one, even where it is the same: a file may be
        # repaired
        for path in (listed, *map(checked_path, summary.written)):
            path.unlink(missing_ok=True)
        if summary.skipped:
            write_skipped(listed, summary.skipped)
    return summary


def skipped_path(output: Path) -> Path:
    return output.with_name(output.name + ".skipped")


def _is_an_index(path: Path) -> bool:
    """One that is damaged, gone or unreadable is told as such when it is opened, not as a source."""
    try:
        return path.suffix == ".idx" or is_index(path)
    except OSError:
        return True


def _own_index(key: str, source: Path, run: Path, is_begun: bool) -> str:
    """Make the index of a source, or find the one that there is; a line for the log."""
    output = run / INDICES / NAMES[key]
    card, wanted = output.with_name(output.name + ".source"), os.fsencode(os.path.abspath(source))
    if output.exists():
        begun_with = card.read_bytes() if card.exists() else b""
        if begun_with == wanted:
            made = f"{WORDS[key]}: '{output}', made of '{source}' when the run began"
            return f"{made}; what came there since is not looked for"
        if is_begun:
            raise RunError(
                f"'{run}' was begun with the {WORDS[key]} of '{os.fsdecode(begun_with)}', and now '{source}' is named; "
                "name the former, or choose another directory",
                USAGE,
            )
    with writing(f"'{card}'", exit_code=CANNOT_CREATE):
        output.parent.mkdir(exist_ok=True)
        # in this order: after a kill no index has the name of another source beside it
        output.unlink(missing_ok=True)
        write_whole(card, wanted)
    summary = list_images(source, output)
    found = str(summary).replace("\n", "\n  ")
    listed = f"\n  listed in '{skipped_path(output)}'" if summary.skipped else ""
    return f"{WORDS[key]}: '{output}' was made of '{source}': {found}{listed}"
