"""Several ranks, by the real launchers, on a CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers.waiting import finished


def deepspeed() -> list[str]:
    """The launcher takes one and the same port each time, unless it is told another."""
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(_free_port()), "--module"]


def torchrun() -> list[str]:
    return ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"]


def launched(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What has ended; an error of it is a failure of the test."""
    env = os.environ | dict(DS_ACCELERATOR="cpu", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = finished(command, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]
