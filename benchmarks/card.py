"""The card under a benchmark: what it is, and clocks that time what runs on it.

python -m benchmarks.card     prints, as JSON, what numbers taken here belong to
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from fastbeit.cores import num_cores

Work = Callable[[], object]
Clock = Callable[[Work], float]  # microseconds of what it is given

# Clock cycles that a GPU spends before a timed region: the host enqueues the region meanwhile, so that its own time is
# hidden. No GPU runs above 3.2 GHz, where this is 6 ms; at the 1.98 GHz of an H100 it is 10 ms. The longest host time
# that is known is that of linear_cross_entropy by chunks of 512 rows: 0.4 ms and 38 * 37 us, 1.8 ms.
SLEEP = 20_000_000

# of nvidia-smi; what a card does not tell is None
CLOCKS = {
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def cuda_laps(work: Work, num_laps: int) -> list[float]:
    """Milliseconds of the GPU's time for each of `num_laps` calls in a row; the host waits at the end alone.

    Where the GPU waits for the host, the host's time is in them.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_laps + 1)]
    torch.cuda._sleep(SLEEP)
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def host_laps(work: Work, num_laps: int) -> list[float]:
    """The same on the CPU."""
    marks = [time.perf_counter()]
    for _ in range(num_laps):
        work()
        marks.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(marks)]


def cuda_clock(work: Work) -> float:
    """Microseconds of the GPU's time, and of the host's where the GPU waits for it."""
    return 1e3 * cuda_laps(work, 1)[0]


def cuda_peak_mib(work: Work) -> float:
    """Memory that it takes beside what is there already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment() -> dict[str, Any]:
    """What a row of numbers belongs to."""
    has_cuda = torch.cuda.is_available()
    driver, clocks = _driver_and_clocks(str(torch.cuda.get_device_properties(0).uuid) if has_cuda else "")
    return dict(
        gpu=torch.cuda.get_device_name() if has_cuda else None,
        driver=driver,
        clocks=clocks,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if has_cuda else None,
        nccl=".".join(map(str, nccl.version())) if has_cuda else None,
        cores=num_cores(),
        versions=_versions(),
        commit=next(iter(_output("git", "describe", "--always", "--dirty")), None),
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str | None]:
    # PyTorch's own word names the CUDA that it was built for
    found: dict[str, str | None] = dict(python=platform.python_version(), torch=str(torch.__version__))
    for package in ("triton", "liger-kernel", "deepspeed", "transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver_and_clocks(uuid: str) -> tuple[str | None, dict[str, float | None] | None]:
    query = ",".join(("uuid", "driver_version", *CLOCKS.values()))
    found = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    cards = [line.split(", ") for line in found]
    # PyTorch may be shown fewer cards than there are
    card = next((card for card in cards if uuid in card[0]), cards[0] if len(cards) == 1 else None)
    if card is None or len(card) != 2 + len(CLOCKS):
        return None, None
    return card[1], {name: _number(value) for name, value in zip(CLOCKS, card[2:], strict=True)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _output(*command: str) -> list[str]:
    """The lines that a command prints; none where there is no such command, or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return []
    return run.stdout.splitlines()


if __name__ == "__main__":
    print(json.dumps(environment()))
