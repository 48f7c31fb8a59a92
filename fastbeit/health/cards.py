"""The graphics cards, and what drives them: CUDA, cuDNN, NCCL, the driver."""

import subprocess
from pathlib import Path

import torch
from torch.cuda import nccl

from fastbeit.health.finding import Finding, one_line, told
from fastbeit.model.kernels import OLDEST

DRIVER = Path("/proc/driver/nvidia/version")  # of the kernel's module


def cards() -> list[Finding]:
    """A row each for driver, CUDA, cuDNN and NCCL, and one for each card."""
    driver = driver_version()
    found = [_driver(driver), _cuda(driver)]
    if not torch.version.cuda:
        return found
    cudnn = torch.backends.cudnn.version()
    found.append(Finding("cuDNN", "runs" if cudnn else "absent", str(cudnn or "")))
    if torch.distributed.is_nccl_available():
        found.append(Finding("NCCL", "runs", ".".join(map(str, nccl.version()))))
    else:
        found.append(Finding("NCCL", "absent", why="not in this PyTorch", fix="only several GPUs want it"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*found, *(_card(i) for i in range(count))]


def driver_version() -> str | None:
    """The NVIDIA driver's; None: there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return said[0] if said else None
    except (OSError, subprocess.SubprocessError):
        return one_line(DRIVER.read_text().splitlines()[0]) if DRIVER.exists() else None


def _driver(found: str | None) -> Finding:
    if found:
        return Finding("driver", "runs", found)
    return Finding("driver", "absent", why="no NVIDIA driver", fix="without a GPU: nothing to do, all runs on the CPU")


def _cuda(driver: str | None) -> Finding:
    built = torch.version.cuda
    if not built:
        with_card = "pip install the build for CUDA: https://pytorch.org/get-started/locally"
        fix = with_card if driver else "without a card: engine.device=cpu, or auto"
        return Finding("CUDA", "absent", why="this PyTorch is built without CUDA", fix=fix)
    if torch.cuda.is_available():
        return Finding("CUDA", "runs", built)
    try:
        torch.cuda.init()
        why = "PyTorch sees no card"
    except Exception as err:  # whatever it is, it is the reason
        why = told(err)
    fix = "a driver for this CUDA, or a PyTorch built for an older one; see also CUDA_VISIBLE_DEVICES"
    return Finding("CUDA", "wrong", built, why, fix)


def _card(number: int) -> Finding:
    card = torch.cuda.get_device_properties(number)
    capability = card.major, card.minor
    what = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
    if not torch.version.hip and capability < OLDEST:
        why = f"older than {OLDEST[0]}.{OLDEST[1]}: no Triton kernels, no bfloat16"
        return Finding(
            f"card {number}", "wrong", what, why, "plain PyTorch in float32 runs (kernels.backend=reference)"
        )
    return Finding(f"card {number}", "runs", what)
