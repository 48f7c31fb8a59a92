"""A run directory and what a run says in it: `config.yaml`, `log.jsonl`, `tensorboard/`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from fastbeit.config.read import save_config, translate
from fastbeit.config.sections import Section
from fastbeit.errors import CANNOT_CREATE, USAGE, RunError

if sys.platform != "win32":
    import fcntl

# what may differ between the parts of one run: who runs it and what it says, not what it computes
FREE_SECTIONS = ("engine", "log", "profile")
FREE_FIELDS = {
    "data": ("index", "val_index", "tokens", "num_workers"),
    "optim": ("accumulate",),
    "tokenizer": ("path",),
}


@contextlib.contextmanager
def claim(out: Path, config: Section) -> Iterator[None]:
    """Make `out` this run's directory, or take it up again; while the context lasts no other process can.

    Raises:
        RunError: `out` is not writable (73), holds something else or another run, or is in use (2).
    """
    try:
        if out.is_dir() and not (out / "config.yaml").exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise RunError(f"out '{out}' is not empty and holds no fastbeit run; choose another out", USAGE)
    except OSError as err:
        raise RunError(f"out '{out}' cannot be read: {err.strerror}; choose another out", CANNOT_CREATE) from err
    with hold(out, "out"):
        if (out / "config.yaml").exists():
            _refuse_another_run(out, config)
        else:
            save_config(config, out / "config.yaml")
        yield


@contextlib.contextmanager
def hold(folder: Path, key: str) -> Iterator[None]:
    """Make a directory that is to be written; while the context lasts no other process can hold it.

    Args:
        key: of the configuration, where the user chose the directory.

    Raises:
        RunError: it is not writable (73) or in use (2).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as err:
        raise RunError(
            f"{key} '{folder}' cannot be written: {err.strerror}; choose another {key}", CANNOT_CREATE
        ) from err
    with lock:
        # held until the file is closed or the process dies
        _lock(lock, folder, key)
        _held.append(lock)
        try:
            yield
        finally:
            _held.remove(lock)


_held: list[IO[str]] = []


def _let_go() -> None:
    """Close the lock in decoding processes: they outlive a killed run by seconds, and would keep it."""
    for lock in _held:
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[str], folder: Path, key: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise RunError(
            f"{key} '{folder}' is in use by another run; wait for it or choose another {key}", USAGE
        ) from err


def _refuse_another_run(out: Path, config: Section) -> None:
    old, new = yaml.safe_load((out / "config.yaml").read_text()), config.model_dump(mode="json")
    old = translate(old, type(config)) if isinstance(old, dict) else old
    changes = [f"{key} was {was}, now {now}" for key, was, now in _differences(old, new)]
    if changes:
        raise RunError(
            f"out '{out}' holds another run: {'; '.join(changes)}. Choose another out, or that run's settings",
            USAGE,
        )


def _differences(old: Any, new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = []
    for section, now in new.items():
        was = old.get(section) if isinstance(old, dict) else None
        if section in (*FREE_SECTIONS, "out"):
            continue
        if not isinstance(now, dict):
            found += [(section, was, now)] if was != now else []
            continue
        for key, value in now.items():
            before = was.get(key) if isinstance(was, dict) else None
            if before != value and key not in FREE_FIELDS.get(section, ()):
                found.append((f"{section}.{key}", before, value))
    return found
