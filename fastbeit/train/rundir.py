"""The run directory: its `config.yaml`, its lock, and whether it holds this run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastbeit.config.read import load_saved, save_config
from fastbeit.config.sections import Section
from fastbeit.errors import CANNOT_CREATE, USAGE, ConfigError, RunError

if sys.platform != "win32":
    import fcntl

# what may differ between the parts of one run: who runs it and what it says, not what it computes
FREE_SECTIONS = ("out", "engine", "kernels", "log", "profile")
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
    try:
        old = load_saved(type(config), out / "config.yaml")
    except ConfigError as err:
        raise RunError(
            f"out '{out}' holds another run, whose config.yaml does not fit this one: {err}; choose another out", USAGE
        ) from err
    changes = [f"{key} was {was}, now {now}" for key, was, now in _differences(old, config)]
    if changes:
        raise RunError(
            f"out '{out}' holds another run: {'; '.join(changes)}. Choose another out, or that run's settings",
            USAGE,
        )


def _differences(old: Section, new: Section) -> list[tuple[str, Any, Any]]:
    """Key, old and new value, of what decides what a run computes."""
    before, after = _flat(old), _flat(new)
    return [(key, before[key], now) for key, now in after.items() if before[key] != now and not _is_free(key)]


def _flat(config: Section) -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _is_free(key: str) -> bool:
    section, _, field = key.partition(".")
    return section in FREE_SECTIONS or field in FREE_FIELDS.get(section, ())
