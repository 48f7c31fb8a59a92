"""The command as a process: outputs that nobody reads any more, and an end that nothing holds up."""

import contextlib
import io
import os
import sys
from typing import NoReturn, TextIO


def keep_outputs_harmless() -> None:
    """Let what is printed cost no work: a reader that is gone (`| head`), a closed terminal, a log on a full disk.

    A standard stream that was closed is opened on nothing, before a file of ours takes its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout, sys.stderr = _harmless(sys.stdout, 1), _harmless(sys.stderr, 2)


def leave(code: int) -> NoReturn:
    """End with `code`, without taking the interpreter down.

    A thread of another library may still hold what is Python's: one of gloo that frees the tensor of the last
    collective, one that decodes a file on a disk that does not answer. Python would abort the process for the one
    ("terminate called without an active exception"), and wait for the other.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Harmless(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _harmless(stream: TextIO | None, number: int) -> TextIO:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
    raw = _Harmless(number, "w", closefd=False)
    # a line at a time for a terminal, and for stderr wherever it goes, as Python has it
    by_line = number == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)
