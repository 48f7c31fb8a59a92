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
    with tempfile.TemporaryDirectory(prefix="fastbeit-compiled-") as folder:
        ours = {name: str(Path(folder, name)) for name in CACHES if name not in os.environ}
        os.environ.update(ours)
        yield
        for name in ours:
            del os.environ[name]


def warm_start(case: Case) -> Row:
    """Seconds of the first step in another process that finds what this one compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, "-m", "benchmarks.step", "--steps", "1", "--json", str(file)]
        command += ["--size", case.size, "--variants", case.variant.name, "--batch", str(case.batch)]
        command += ["--set", *case.settings] if case.settings else []
        paths = os.pathsep.join(filter(None, sys.path))
        env = os.environ | dict(PYTHONPATH=paths)
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, timeout=TOO_LONG_S, check=False)
        (row,) = json.loads(file.read_text())["rows"] if file.exists() else [{}]
    return dict(warm_start_s=row.get("first_step_s"))
