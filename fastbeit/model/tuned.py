"""What `fastbeit doctor --tune` found to be fastest: a table in the user's cache, by device, versions and shapes.

A table that cannot be used is passed over and said. It holds times, not results: without it a run is slower at most.
"""

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import fastbeit
from fastbeit.config.finetune import VitConfig
from fastbeit.config.running import KernelsConfig
from fastbeit.engine.memory import expected_room, fewest, footprint
from fastbeit.engine.protocol import compiles, compute_dtype
from fastbeit.errors import CANNOT_CREATE, writing
from fastbeit.files import write_whole

FORMAT = "fastbeit-tuned-1"
UNUSABLE = OSError, ValueError, KeyError, TypeError, RecursionError  # what a table of any content raises
TUNED = "attention", "attention_mib", "loss_rows"  # settings of `kernels`

Key = dict[str, Any]
Choices = dict[str, Any]  # by setting of TUNED; None: the operator's own choice


@dataclass(frozen=True)
class Found:
    """What a table says of a run."""

    choices: Choices
    why: str  # where they come from; without choices, why there are none


def table_path() -> Path:
    """In the user's cache (XDG Base Directory Specification)."""
    # os.path: a user without a home is no reason to fail
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastbeit" / "tuned.json"


def key_of(config: VitConfig, num_outputs: int, num_ranks: int, device: torch.device) -> Key:
    """What times hang on: the device, what compiles for it, and the shapes of a step.

    Args:
        num_outputs: V visual words; for pixels the values of a patch.
    """
    on_cuda, model = device.type == "cuda", config.model
    versions = {"torch": str(torch.__version__), "triton": _version("triton"), "fastbeit": fastbeit.__version__}
    shapes = {
        "images": micro_batch(config, num_outputs, num_ranks, device),
        "patches": config.num_patches,
        "slots": config.num_slots,
        "outputs": num_outputs,
        "width": model.width,
        "heads": model.num_heads,
        "mlp_width": model.mlp_width,
        "relative_position": model.relative_position,
        "objective": config.objective,
        "dtype": str(compute_dtype(config.engine, device)).removeprefix("torch."),
        "compiled": compiles(config.engine, device),
        "checkpoint_blocks": config.engine.checkpoint_blocks,
    }
    where = {"device": device_name(device), "cuda": torch.version.cuda, "hip": torch.version.hip}
    return (where if on_cuda else {"device": where["device"]}) | versions | shapes


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def micro_batch(config: VitConfig, num_outputs: int, num_ranks: int, device: torch.device) -> int:
    """Images that a rank computes at once: with optim.accumulate=auto as the formula says for this card, alone."""
    images = config.optim.batch_size // num_ranks
    if config.optim.accumulate != "auto":
        return images // config.optim.accumulate
    if device.type != "cuda":
        return images
    itemsize = compute_dtype(config.engine, device).itemsize
    step = footprint(config, num_outputs=num_outputs, token_size=None, num_ranks=num_ranks, itemsize=itemsize)
    memory_gib = torch.cuda.get_device_properties(device).total_memory // 2**30
    return images // fewest(images, step, expected_room(memory_gib))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_up(path: Path, key: Key) -> Found:
    """What the table has for just this key."""
    try:
        entries = _read(path)
    except FileNotFoundError:
        return Found({}, "nothing was tuned on this machine")
    except UNUSABLE as err:
        return Found({}, f"'{path}' is passed over: {' '.join(str(err).split())}")
    others = [_changes(entry["key"], key) for entry in entries]
    if [] in others:
        return Found(entries[others.index([])]["choices"], f"as tuned, '{path}'")
    nearest = f"; the nearest: {', '.join(min(others, key=len))}" if others else ""
    return Found({}, f"'{path}' has nothing for this device, these versions and shapes{nearest}")


def write_table(path: Path, key: Key, choices: Choices, times_ms: dict[str, float]) -> None:
    """Put an entry beside those of other keys, in place of this key's. A table that cannot be read is begun anew.

    Args:
        times_ms: what the choices were made from, for whoever looks.

    Raises:
        RunError: the table cannot be written (73; 74: the disk is full).
    """
    try:
        others = [entry for entry in _read(path) if entry["key"] != key]
    except UNUSABLE:
        others = []
    entries = [*others, {"key": key, "choices": choices, "times_ms": times_ms}]
    with writing(f"what was tuned, '{path}',", "set XDG_CACHE_HOME", CANNOT_CREATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        UNUSABLE: it is not there, damaged, or of another version.
    """
    table = json.loads(path.read_text())
    if table["format"] != FORMAT:
        raise ValueError(f"format {table['format']}, wanted {FORMAT}")
    for entry in table["entries"]:
        if set(entry["choices"]) != set(TUNED) or not isinstance(entry["key"], dict):
            raise ValueError(f"an entry chooses {', '.join(entry['choices'])}, wanted {', '.join(TUNED)}")
        try:
            KernelsConfig.model_validate(entry["choices"])
        except ValidationError as err:
            raise ValueError(err.errors()[0]["msg"]) from None
    return table["entries"]


def _changes(before: Key, now: Key) -> list[str]:
    names = {**before, **now}
    return [f"{name} {before.get(name)}, here {now.get(name)}" for name in names if before.get(name) != now.get(name)]
