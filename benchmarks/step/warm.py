"""Compilation: from nothing, and again with the compilers' caches."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Row
from benchmarks.step.variants import Case

CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
TOO_LONG_S = 300


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Nothing is compiled yet for this process and those that it starts; a folder that is set already is left.

    The first variant's first step then has all there is to compile, later ones what those before left to do.
    """
    # a compiler's process may be writing still
    with tempfile.TemporaryDirectory(prefix="fastbeit-compiled-", ignore_cleanup_errors=True) as folder:
        ours = {name: str(Path(folder, name)) for name in CACHES if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]


def warm_start(case: Case) -> Row:
    """Seconds of the first step in another process that finds what this one compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, "-m", "benchmarks.step", "--steps", "1", "--json", str(file)]
        command += ["--size", case.size, "--variants", case.variant.name]
        command += ["--batch", str(case.batch), "--device", case.device]
        command += ["--set", *case.settings] if case.settings else []
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        try:
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, timeout=TOO_LONG_S, check=False)
        except subprocess.TimeoutExpired:
            return dict(no_warm_start=f"none in {TOO_LONG_S} s")
        row = json.loads(file.read_text())["rows"][0] if file.exists() else {}
    if "first_step_s" not in row:
        return dict(no_warm_start=row.get("error", "the other process ended early"))
    return dict(warm_start_s=row["first_step_s"])
