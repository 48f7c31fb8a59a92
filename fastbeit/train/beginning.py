"""What trainings of the encoder find out and say before they begin."""

from pathlib import Path

import torch

from fastbeit.config.running import EngineConfig
from fastbeit.engine.protocol import compiles, compute_dtype
from fastbeit.engine.sharded import shares_weights
from fastbeit.errors import RunError
from fastbeit.model.kernels import Before
from fastbeit.train.checkpoint import find_checkpoint, load_state


def kernels_before(folder: Path) -> Before | None:
    """What the checkpoint that will be gone on from says of its kernels; the loop opens it again, and verifies it."""
    try:
        last, _ = find_checkpoint(folder)
        return Before(last.name, load_state(last).get("kernels")) if last else None
    except (RunError, OSError):  # none is usable, or another run has just removed it: the loop says so on all ranks
        return None


def how(engine: EngineConfig, device: torch.device) -> str:
    """A line of what is compiled, and of the precision."""
    compiled = "each block" if compiles(engine, device) else "nothing"
    why = "as set"
    if engine.compile == "auto":
        why = "auto: ZeRO-3 gathers weights in hooks" if shares_weights(engine) else f"auto: on {device.type}"
    precision = str(compute_dtype(engine, device)).removeprefix("torch.")
    return f"compiled: {compiled} ({why}); activations in {precision}"
