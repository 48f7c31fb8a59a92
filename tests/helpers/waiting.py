"""Waiting for another process: until something is so. Seconds end a test that hangs, and decide nothing else."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PATIENCE_S = 600  # where a start takes ten seconds alone, it has taken a minute and a half beside other work


def wait_until(process: subprocess.Popen, reached: Callable[[], object], pause_s: float = 0.005) -> None:
    """Return once `reached()` is true; fail, with what the process said, when it ends before or nothing comes of it."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        ended = process.poll() is not None
        if ended and reached():
            return
        if ended or time.monotonic() > deadline:
            process.kill()
            said = process.communicate()[1]
            pytest.fail(f"the process {f'ended with {process.returncode}' if ended else 'hangs'}: {said}")
        time.sleep(pause_s)


@contextlib.contextmanager
def started(command: list, **options: Any) -> Iterator[subprocess.Popen]:
    """A process of a test, which does not outlive it."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(command: list, patience_s: float = PATIENCE_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that has ended, and what it said."""
    return subprocess.run(command, capture_output=True, text=True, timeout=patience_s, **options)
