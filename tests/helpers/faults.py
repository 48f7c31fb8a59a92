"""File systems that do not know a call, or have no room: faults put into `os` and `fcntl`."""

import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest

from fastbeit import files


def refuse(
    monkeypatch: pytest.MonkeyPatch, call: Any, number: int, when: Callable[..., bool] = lambda *args: True
) -> None:
    """Have a function of `os` or `fcntl` fail with this error, for the arguments that `when` is true of."""

    @functools.wraps(call)
    def refused(*args: Any, **options: Any) -> Any:
        if when(*args):
            raise OSError(number, os.strerror(number))
        return call(*args, **options)

    monkeypatch.setattr(fcntl if call.__name__ == "flock" else os, call.__name__, refused)
    monkeypatch.setattr(files, "_said", set())  # what was said before in this process


def is_folder(place: Any, *_: Any) -> bool:
    """Of an open file, or of a path."""
    return stat.S_ISDIR(os.fstat(place).st_mode) if isinstance(place, int) else os.path.isdir(place)


def is_there(source: Any, target: Any) -> bool:
    return os.path.isfile(target)


def odd_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre, CIFS and gcsfuse are at their worst, all at once."""
    refuse(monkeypatch, fcntl.flock, errno.ENOSYS)
    refuse(monkeypatch, os.chmod, errno.EPERM)
    refuse(monkeypatch, os.fsync, errno.EINVAL, is_folder)
    refuse(monkeypatch, os.replace, errno.EEXIST, is_there)
    refuse(monkeypatch, os.rename, errno.EMFILE, is_folder)
