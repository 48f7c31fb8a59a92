"""Optimizers of other packages: NVIDIA apex's on a GPU, DeepSpeed's on the host; what they lack is said in one line."""

import importlib
import subprocess
from typing import Any

import torch

from fastbeit.config.sections import OptimConfig
from fastbeit.engine.apex import BUILD, why_no_apex
from fastbeit.errors import USAGE, RunError

APEX = {"apex_adam": "FusedAdam", "apex_lamb": "FusedLAMB"}


def make_apex(optim: OptimConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """FusedAdam with decoupled weight decay, or FusedLAMB (1904.00962), which clips nothing itself.

    Written from apex's source; neither has run with fastbeit on a card yet.

    Raises:
        RunError: no GPU, or no NVIDIA apex that can be used.
    """
    what, name = f"optim.name={optim.name} wants", APEX[optim.name]
    if device.type != "cuda":
        raise RunError(f"{what} a CUDA GPU, and this runs on {device.type}; set optim.name=adamw", USAGE)
    if wrong := why_no_apex(name):
        remedy = "; ".join(filter(None, [wrong[1], BUILD]))
        raise RunError(f"{what} NVIDIA's apex; found: {wrong[0]}; {remedy}; or set optim.name=adamw", USAGE)
    make: Any = getattr(importlib.import_module("apex.optimizers"), name)
    # its kernel divides gradients by norm / max_grad_norm where the norm is larger: never. The engine clips
    own = {"max_grad_norm": float("inf")} if optim.name == "apex_lamb" else {}
    try:
        return make(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adam_w_mode=True, **own)
    except RuntimeError as err:
        raise RunError(f"{what} NVIDIA's apex; found: {err}; {BUILD}; or set optim.name=adamw", USAGE) from err


def make_cpu_adam(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW, vectorised for the host; its operator is compiled when it is first made, for some minutes.

    Raises:
        RunError: no DeepSpeed, or it cannot compile.
    """
    what = f"optim.name={optim.name}"
    try:
        make: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    except ImportError as err:
        raise RunError(f"{what} wants the deepspeed package ({err}); pip install deepspeed", USAGE) from err
    try:
        return make(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as err:
        reason = str(err.__cause__ or err).strip().splitlines()[0]
        raise RunError(
            f"{what}: DeepSpeed could not compile its operator ({reason}); it wants ninja (pip install ninja) and a "
            "C++ compiler; or set optim.name=adamw",
            USAGE,
        ) from err
