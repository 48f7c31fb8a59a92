"""Files that are whole or not there, and their hashes."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside(path: Path) -> Path:
    """Where to write what `put_in_place` then renames to `path`."""
    return path.with_name(f".{path.name}.part")


def put_in_place(path: Path) -> None:
    """Rename the finished `aside(path)` to `path`: a reader sees the old file or the new one."""
    # without the sync a power cut can leave the new name on an empty file
    sync(aside(path))
    share(aside(path))
    os.replace(aside(path), path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the context ends well, and is gone when it does not.

    What a killed process left is replaced by the next one. `path` must not be there, or be empty.
    """
    folder = aside(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for file in folder.iterdir():
            share(file)
            sync(file)
        sync(folder)
        if path.exists():
            path.rmdir()
        folder.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors writes files that their owner alone can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
