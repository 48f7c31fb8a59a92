"""Files that are whole or not there, on whatever file system: what one does not know is done without, and said once."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# how file systems say that they do not know a call: CIFS and gcsfuse EINVAL and EPERM, Lustre ENOSYS, NFS ENOTSUP;
# gcsfuse says EMFILE for a folder that it would have to rename file by file
UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM}
UNKNOWN_OF_FOLDERS = UNKNOWN | {errno.EMFILE, errno.EACCES, errno.EISDIR, errno.EBADF, errno.EXDEV}
UNFINISHED = ".unfinished"  # in a folder that is being filled where folders cannot be renamed


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    if not path.is_dir():
        with path.open("r+b") as file:
            sync_open(file)
    elif sys.platform != "win32":
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as err:
            if err.errno not in UNKNOWN_OF_FOLDERS:
                raise
            do_without(path, "fsync of folders", err, "a power cut may cost what was written last")


def sync_open(file: IO[bytes]) -> None:
    """The same of an open file that was flushed."""
    try:
        os.fsync(file.fileno())
    except OSError as err:
        if err.errno not in UNKNOWN:
            raise
        do_without(Path(file.name), "fsync of files", err, "a power cut may cost what was written last")


def aside(path: Path) -> Path:
    """Where to write what `put_in_place` then renames to `path`."""
    return path.with_name(f".{path.name}.part")


def put_in_place(path: Path) -> None:
    """Rename the finished `aside(path)` to `path`: a reader sees the old file or the new one."""
    # without the sync a power cut can leave the new name on an empty file
    sync(aside(path))
    share(aside(path))
    _replace(aside(path), path)
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by way of `aside(path)`, which does not stay where that fails."""
    try:
        aside(path).write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside(path).unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line; one that a kill or a full disk has cut short before stays alone on its own."""
    with path.open("a+b", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        data = b"\n" * (file.read(1) not in (b"", b"\n")) + line.encode() + b"\n"
        while data:
            data = data[file.write(data) :]


def read_records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The objects of a file of JSON lines, and which lines are none, in words; empty: all are."""
    records, numbers = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        try:
            record = json.loads(line) if line else {}
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            numbers.append(number)
        elif record:
            records.append(record)
    if not numbers:
        return records, ""
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return records, f"line {numbers[0]}{more} of '{path}' cannot be read: passed over"


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
        move_folder(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors writes files that their owner alone can read."""
    umask = os.umask(0)
    os.umask(umask)
    try:
        path.chmod(0o666 & ~umask)
    except OSError as err:
        if err.errno not in UNKNOWN:
            raise
        do_without(path, "chmod", err, "files keep the permissions that it gives them")


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as err:
        if err.errno not in UNKNOWN | {errno.EEXIST} or not target.is_file():
            raise
        # the old one steps aside, and goes when the new one is there: what cannot be renamed at all is not lost
        old = target.with_name(f".{target.name}.old")
        old.unlink(missing_ok=True)
        os.rename(target, old)
        os.rename(source, target)
        old.unlink()
        do_without(target, "renaming over a file", err, "a kill in the moment between leaves the old one as .NAME.old")


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder of files; where folders cannot be renamed, `target` holds `UNFINISHED` until all are there."""
    try:
        os.rename(source, target)
    except OSError as err:
        if err.errno not in UNKNOWN_OF_FOLDERS:
            raise
        target.mkdir()
        (target / UNFINISHED).touch()
        for path in source.iterdir():
            os.rename(path, target / path.name)
        sync(target)
        (target / UNFINISHED).unlink()
        source.rmdir()
        do_without(target, "renaming a folder", err, "its files are renamed one by one")
    sync(target.parent)


def try_out(folder: Path) -> None:
    """Do in a corner of `folder` all that writing a run takes, and leave nothing.

    Raises:
        OSError: something that cannot be done without does not work.
    """
    trial = folder / f".trial.{os.getpid()}"
    try:
        for name in "first", "second":
            (trial / name).mkdir(parents=True)
            for _ in range(2):
                write_whole(trial / name / "file", name)
            append_line(trial / name / "file", name)
        move_folder(trial / "first", trial / "third")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def try_to_write(path: Path) -> None:
    """Find out whether `path` can be written, before hours are spent on what is to stand there; leaves nothing.

    Raises:
        OSError: it cannot, or it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    made = make_folder(path.parent)
    try:
        aside(path).touch()
        aside(path).unlink()
    finally:
        unmake(made)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; gives those that were not there, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def unmake(folders: list[Path]) -> None:
    """Remove what `make_folder` made, up to the first folder that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def do_without(path: Path, what: str, err: OSError, meaning: str) -> None:
    """Say, once a process, what the file system does not know, and what that means."""
    if what not in _said:
        _said.add(what)
        reason = err.strerror or err
        print(f"the file system of '{path.parent}' has no {what} ({reason}): {meaning}", file=sys.stderr)


_said: set[str] = set()
