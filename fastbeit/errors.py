"""Errors for the user: each has a message and an exit code that a scheduler understands."""

import contextlib
import errno
from collections.abc import Iterator

DONE = 0
USAGE = 2
DATA_LIMIT = 65
DATA_MISSING = 66
CANNOT_CREATE = 73
CANNOT_WRITE = 74
PREEMPTED = 75
CHECKPOINT_UNUSABLE = 78


class RunError(Exception):
    """What was wanted, what was found, what to do; the command prints it on one line and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def writing(what: str, remedy: str = "make room or mend permissions", exit_code: int = CANNOT_WRITE) -> Iterator[None]:
    """Inside this context an `OSError` is one of writing `what`: a `RunError`, of code 74 where the disk is full."""
    try:
        yield
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = err.strerror or str(err)
        raise RunError(f"{what} cannot be written: {reason}; {remedy}", CANNOT_WRITE if full else exit_code) from err


class ConfigError(RunError):
    """The configuration cannot be run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)


class DataError(RunError):
    """The data cannot be used: missing (exit code 66) or too much of it bad (65)."""

    def __init__(self, message: str, exit_code: int = DATA_MISSING) -> None:
        super().__init__(message, exit_code)


class WorkerError(RunError):
    """A process that reads and decodes for this one has died."""


class BadImage(Exception):
    """The bytes are not an image that can be used; the message is the reason, without the path."""


class TokenizerError(RunError):
    """The files of a tokenizer cannot be used: damaged or others (exit code 78), or not there (66)."""

    def __init__(self, message: str, exit_code: int = CHECKPOINT_UNUSABLE) -> None:
        super().__init__(message, exit_code)


class WeightsError(RunError):
    """A model's weights cannot be used: damaged, of an unknown kind, or not all there (exit code 78)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, CHECKPOINT_UNUSABLE)


class CacheError(RunError):
    """A cache of tokens cannot be used: damaged or not finished (exit code 78), or not there (66)."""

    def __init__(self, message: str, exit_code: int = CHECKPOINT_UNUSABLE) -> None:
        super().__init__(message, exit_code)
