"""Which packages there are, whether each can be imported and used, and how to get it."""

import importlib
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root

from fastbeit.config.pretrain import Config
from fastbeit.engine.apex import why_no_apex
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.zero import FLOOR
from fastbeit.health.finding import Finding, told
from fastbeit.model.attention import check_attention

Wrong = tuple[str, str]  # why, and how to get it; the latter may be empty: as in HOW_TO_GET

STALE_S = 600  # age of a lock that no compilation still holds; DeepSpeed's longest takes some minutes

# as in pyproject.toml, and of DeepSpeed what a training refuses too
LEAST = {"torch": (2, 11), "triton": (3, 6), "deepspeed": FLOOR, "numpy": (1, 26), "safetensors": (0, 5)}
HOW_TO_GET = {
    "torch": "pip install 'torch>=2.11', of the build for your CUDA: https://pytorch.org/get-started/locally",
    "triton": "pip install 'triton>=3.6' (Linux)",
    "deepspeed": "pip install 'deepspeed>=0.19.8' (Linux); only engine.name=deepspeed wants it",
    "xformers": "pip install xformers, of the release that was built for your PyTorch; only "
    "kernels.attention=xformers wants it",
    "nvidia.dali": f"pip install 'nvidia-dali-cuda{'120' if (torch.version.cuda or '').startswith('12') else '130'}"
    ">=2.2'; without it data.pipeline=torch decodes",
    "wandb": "pip install wandb; only log.wandb wants it",
    "apex": "only optim.name=apex_adam and apex_lamb want it, built from its source: docs/optimizers.md",
    "simplejpeg": "pip install 'simplejpeg>=1.8'",
    "numpy": "pip install 'numpy>=1.26'",
    "safetensors": "pip install 'safetensors>=0.5'",
}


def package(name: str, config: Config, device: torch.device) -> Finding:
    """Import a package of `HOW_TO_GET`, and try what fastbeit wants of it."""
    fix = HOW_TO_GET[name]
    if not is_there(name):
        return Finding(name, "absent", why="not installed", fix=fix)
    found = ""
    try:
        module = importlib.import_module(name)
        found = str(getattr(module, "__version__", ""))
        wrong = too_old(name, found) or (LOOKS[name](module, config, device) if name in LOOKS else None)
    except BaseException as err:  # an import may raise anything, SystemExit too
        return Finding(name, "wrong", found, told(err), fix)
    return Finding(name, "wrong", found, wrong[0], wrong[1] or fix) if wrong else Finding(name, "runs", found)


def is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def too_old(name: str, found: str) -> Wrong | None:
    least = LEAST.get(name, ())
    numbers = tuple(map(int, re.findall(r"\d+", found)[: len(least)]))
    if numbers and numbers < least:
        return f"older than {'.'.join(map(str, least))}", ""
    return None


def _apex(module: Any, config: Config, device: torch.device) -> Wrong | None:
    return why_no_apex()


def _xformers(module: Any, config: Config, device: torch.device) -> Wrong | None:
    model, dtype = config.model, compute_dtype(config.engine, device)
    shape = config.num_patches + 1, model.num_heads, model.width // model.num_heads
    why = check_attention("xformers", device, dtype, *shape)
    return (why, "") if why else None


def _dali(module: Any, config: Config, device: torch.device) -> Wrong | None:
    """A pipeline of one number, on the run's device."""
    fn, pipeline = (importlib.import_module(f"nvidia.dali.{name}") for name in ("fn", "pipeline"))
    on_cuda = device.type == "cuda"
    made = pipeline.Pipeline(batch_size=1, num_threads=1, device_id=(device.index or 0) if on_cuda else None)
    with made:
        made.set_outputs(fn.constant(idata=1, device="gpu" if on_cuda else "cpu"))
    made.build()
    made.run()
    return None


def _deepspeed(module: Any, config: Config, device: torch.device) -> Wrong | None:
    locks = ", ".join(f"'{path}'" for path in stale_locks(extensions_folder(), time.time()))
    if not locks:
        return None
    return "a compilation that was killed left a lock, on which DeepSpeed waits for ever", f"delete {locks}"


def _wandb(module: Any, config: Config, device: torch.device) -> Wrong | None:
    return None if hasattr(module, "init") else ("a folder of this name, as wandb makes them, is no package", "")


def extensions_folder() -> Path:
    """Where PyTorch, and DeepSpeed through it, compiles extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def stale_locks(folder: Path, now: float) -> list[Path]:
    """Locks that no compilation still holds."""
    return sorted(path for path in folder.rglob("lock") if now - path.stat().st_mtime > STALE_S)


LOOKS: dict[str, Callable[[Any, Config, torch.device], Wrong | None]] = {
    "apex": _apex,
    "xformers": _xformers,
    "nvidia.dali": _dali,
    "deepspeed": _deepspeed,
    "wandb": _wandb,
}


def python() -> Finding:
    found = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "runs", found)
    return Finding("python", "wrong", found, "not tested", "install Python 3.11, 3.12 or 3.13")
