"""The run directory: its lock, whether it holds this run, and its `config.yaml`."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastbeit.config.read import as_saved, read_saved, save_config
from fastbeit.config.sections import Section
from fastbeit.data.index.given import INDICES, kept_or_gone
from fastbeit.errors import CANNOT_CREATE, USAGE, ConfigError, RunError, writing
from fastbeit.files import UNKNOWN, do_without, make_folder, try_out, unmake, write_whole
from fastbeit.train.checkpoint import newest_first
from fastbeit.train.settings import changes, fixed, in_words

if sys.platform != "win32":
    import fcntl

# what a training that has saved nothing can have left; `checkpoints` may be an empty folder
BEFORE_A_CHECKPOINT = (
    "config.yaml",
    "deepspeed.json",
    "log.jsonl",
    "bad_samples.jsonl",
    "tensorboard",
    "wandb",
    "checkpoints",
    "profile.json",
    INDICES,
)


@contextlib.contextmanager
def claim(out: Path, config: Section) -> Iterator[None]:
    """Make `out` this run's directory, or take it up again; while the context lasts no other process can.

    Nothing in it is written yet but the indices of sources, which go again where the start is refused; `keep_config`
    writes when every check has passed.

    Raises:
        RunError: `out` is not writable (73), holds something else or another run, or is in use (2); the disk is full
            (74).
    """
    with writing(f"out '{out}'", "choose another out", CANNOT_CREATE):
        _refuse_something_else(out)
    with hold(out, "out"):
        _refuse_another_run(out, config)
        _begun.discard(out)
        with kept_or_gone(out, lambda: out in _begun):
            yield


def keep_config(out: Path, config: Any) -> None:
    """Write the settings that are now in force; those of earlier parts of the run stay in its log and checkpoints.

    Raises:
        RunError: it cannot be written (74).
    """
    with writing(f"'{out / 'config.yaml'}'"):
        save_config(config, out / "config.yaml")
    _begun.add(out)


def keep_deepspeed_config(out: Path, configuration: dict[str, Any] | None) -> None:
    """Write what DeepSpeed is given, for the user to read; no part of the run reads it.

    Args:
        configuration: None: this part of the run has no DeepSpeed.

    Raises:
        RunError: it cannot be written (74).
    """
    with writing(f"'{out / 'deepspeed.json'}'"):
        if configuration:
            write_whole(out / "deepspeed.json", json.dumps(configuration, indent=1) + "\n")
        else:
            (out / "deepspeed.json").unlink(missing_ok=True)


_begun: set[Path] = set()  # directories of runs that this process has begun: all that is in them is kept


@contextlib.contextmanager
def hold(folder: Path, key: str) -> Iterator[None]:
    """Make a directory that is to be written; while the context lasts no other process can hold it.

    What writing takes is tried out. Where the context ends with an error, what was made here goes, if it is empty.

    Args:
        key: of the configuration, where the user chose the directory.

    Raises:
        RunError: it is not writable (73), in use (2), or the disk is full (74).
    """
    with contextlib.ExitStack() as undo:
        with writing(f"{key} '{folder}'", f"choose another {key}", CANNOT_CREATE):
            undo.callback(unmake, make_folder(folder))
            lock, is_new = _open_lock(folder / ".lock")
            undo.enter_context(lock)
            if is_new:
                undo.callback(_remove, folder / ".lock")
            # held until the file is closed or the process dies
            _lock(lock, folder, key)
            try_out(folder)
        _held.append(lock)
        try:
            yield
        finally:
            _held.remove(lock)
        undo.pop_all()
        lock.close()


_held: list[IO[str]] = []


def _let_go() -> None:
    """Close the lock in decoding processes: they outlive a killed run by seconds, and would keep it."""
    for lock in _held:
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _open_lock(path: Path) -> tuple[IO[str], bool]:
    """The file, and whether it was not there."""
    try:
        return path.open("x"), True
    except FileExistsError:
        return path.open("a"), False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _lock(file: IO[str], folder: Path, key: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a start that was refused takes its lock away
        is_taken = not (folder / ".lock").exists()
    except OSError as err:
        is_taken = err.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if not is_taken and err.errno not in UNKNOWN | {errno.ENOLCK}:
            raise
        if not is_taken:
            do_without(folder / ".lock", "locks", err, "two runs in one directory would not notice each other")
    if is_taken:
        raise RunError(f"{key} '{folder}' is in use by another run; wait for it or choose another {key}", USAGE)


def _refuse_something_else(out: Path) -> None:
    if out.is_dir() and not (out / "config.yaml").exists() and not newest_first(out / "checkpoints"):
        others = _others(out)
        if others:
            raise RunError(
                f"out '{out}' is not empty and holds no fastbeit run, but {others[0]}; choose another out", USAGE
            )


def _others(out: Path) -> list[str]:
    """What else than the beginnings of a training there is."""
    names = sorted(path.name for path in out.iterdir() if path.suffix not in (".part", ".old"))
    return [name for name in names if name != ".lock" and name not in BEFORE_A_CHECKPOINT]


def _refuse_another_run(out: Path, config: Section) -> None:
    path, is_begun = out / "config.yaml", bool(newest_first(out / "checkpoints"))
    try:
        values = read_saved(path)
    except (ConfigError, OSError, ValueError, RecursionError) as err:
        if not is_begun and (others := _others(out)):
            raise RunError(
                f"out '{out}' holds no fastbeit run, but {others[0]} and a config.yaml that cannot be read ({err}); "
                "choose another out",
                USAGE,
            ) from err
        if is_begun or path.exists():
            print(f"'{path}' cannot be read ({err}): it is written anew, and checkpoints are compared", file=sys.stderr)
        return
    try:
        old = as_saved(type(config), values)
    except ConfigError as err:
        raise RunError(
            f"out '{out}' holds another run, whose config.yaml does not fit this one: {err}; choose another out", USAGE
        ) from err
    found = fixed(changes(old, config))
    # where nothing of the run would be lost, settings may be corrected
    if found and (is_begun or _others(out)):
        raise RunError(
            f"out '{out}' holds another run: {in_words(found)}. Choose another out, or that run's settings", USAGE
        )
