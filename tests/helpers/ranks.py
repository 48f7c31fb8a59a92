"""Several ranks, by the real launchers, on a CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers.waiting import finished


def deepspeed() -> list[str]:
    """The launcher takes one and the same port each time, unless it is told another."""
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]


def torchrun(num_ranks: int = 2) -> list[str]:
    return ["torchrun", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]


def srun(*options: str) -> list[str]:
    """A stand-in: there is no SLURM here."""
    return [sys.executable, str(Path(__file__).with_name("srun.py")), *options, sys.executable, "-m"]


def environment() -> dict[str, str]:
    env = os.environ | dict(DS_ACCELERATOR="cpu", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    return env | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}")


def launched(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What has ended; an error of it is a failure of the test."""
    done = finished(command, env=environment(), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]
