"""A checkpoint is complete and verified, or it is not there.

`step-000123/` holds `model.safetensors` (whole, whatever the ranks), `optimizer.safetensors` (moments by parameter
name), `state.json`, and a MANIFEST with each file's size and sha256. It is written beside its place, synced to disk
and renamed. Nothing in it is a pickle.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbeit.engine.protocol import Engine
from fastbeit.engine.ranks import World
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, RunError
from fastbeit.files import sha256, share, sync
from fastbeit.train.ema import PREFIX, Average

MANIFEST = "MANIFEST.json"
VERSION = 1  # of this layout


class Saver:
    """A training's checkpoints: the one that it goes on from, and those that it makes.

    Args:
        origin: what the training is made from, by name; a checkpoint of another origin is refused.

    Raises:
        RunError: there are checkpoints and none is usable, or they are of another origin (exit code 78).
    """

    def __init__(self, folder: Path, origin: dict[str, Any], keep: int, world: World) -> None:
        self.folder, self.origin, self.keep, self.world = folder, origin, keep, world
        self.last_checkpoint, self.problems = find_checkpoint(folder)
        state: dict[str, Any] = load_state(self.last_checkpoint) if self.last_checkpoint else {}
        for name, fingerprint in origin.items() if state else ():
            if state.get(name) != fingerprint:
                raise RunError(
                    f"'{self.last_checkpoint}' was made with another {name} (fingerprint {state.get(name)}, now "
                    f"{fingerprint}); go back to that {name}, or choose another out",
                    CHECKPOINT_UNUSABLE,
                )
        self.first_step = self.last_step = state.get("step", 0)
        self.seconds_before: float = state.get("seconds", 0.0)
        self.fit: dict[str, Any] | None = state.get("fit")  # of micro-batches to memory; None: auto chose nothing
        self._weights = load_model(self.last_checkpoint) if self.last_checkpoint else {}

    def load_weights(self, model: nn.Module) -> None:
        """Load the last checkpoint's weights, if there is one; the next two do so with average and moments."""
        if self.last_checkpoint:
            own = {name: tensor for name, tensor in self._weights.items() if not name.startswith(PREFIX)}
            model.load_state_dict(own)

    def load_average(self, average: Average) -> None:
        if self.last_checkpoint:
            average.load(self._weights)
        self._weights = {}

    def load_moments(self, engine: Engine) -> None:
        if self.last_checkpoint:
            engine.load_optimizer_state(load_optimizer(self.last_checkpoint))

    def save(self, step: int, engine: Engine, model: nn.Module, average: Average, known: dict[str, Any]) -> None:
        """Write a checkpoint of this step; all ranks must call it."""
        moments = engine.optimizer_state()
        if self.world.rank == 0:
            weights = model.state_dict() | average.weights()
            save_checkpoint(self.folder, step, weights, moments, {**self.origin, **known}, self.keep)
        self.world.barrier()
        self.last_checkpoint, self.last_step = self.folder / f"step-{step:06d}", step


def save_checkpoint(
    folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-XXXXXX` whole or not at all, then drop all but the newest `keep`.

    Raises:
        RunError: the disk is full or not writable (exit code 74); what was there before stays.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f".tmp-{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in model.items()}, aside / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}, indent=1))
        for path in aside.iterdir():
            share(path)
            sync(path)
        sync(aside)
        if final.exists():
            # the same step again: after a resume from an older checkpoint, when this one did not verify
            shutil.rmtree(final)
        aside.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as err:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"checkpoint of step {step} cannot be written to '{folder}': {err}", CANNOT_WRITE) from err
    _prune(folder, keep)
    return final


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    Raises:
        RunError: there are checkpoints and none is usable (exit code 78).
    """
    problems = []
    candidates = _newest_first(folder)
    for candidate in candidates:
        problem = _find_damage(candidate)
        if problem is None:
            return candidate, problems
        problems.append(f"{candidate.name}: {problem}")
    if candidates:
        raise RunError(
            f"none of the checkpoints in '{folder}' is usable ({'; '.join(problems)}); restore one or change out",
            CHECKPOINT_UNUSABLE,
        )
    return None, problems


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint's directory from itself, a run, its `checkpoints` folder, or a path ending in `latest`; verified."""
    path = Path(path)
    if path.name == "latest":
        path = path.parent
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if not path.name.startswith("step-"):
        found, _ = find_checkpoint(path)
        if found is None:
            raise RunError(f"no checkpoint in '{path}'; wanted a run directory or a step-XXXXXX", CHECKPOINT_UNUSABLE)
        return found
    problem = _find_damage(path)
    if problem is not None:
        raise RunError(f"'{path}' is not usable: {problem}", CHECKPOINT_UNUSABLE)
    return path


def load_model(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def load_optimizer(path: Path) -> dict[str, Tensor]:
    return load_file(path / "optimizer.safetensors")


def load_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def _find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            return f"it is of version {manifest['version']}, this fastbeit reads version {VERSION}"
        files = manifest["files"]
        for name, wanted in files.items():
            if (size := (path / name).stat().st_size) != wanted["bytes"]:
                return f"{name} has {size} bytes, the manifest says {wanted['bytes']}"
            if sha256(path / name) != wanted["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
        missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - set(files)
        return f"{sorted(missing)} not in the manifest" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        return f"manifest or file unreadable ({err})"


def _prune(folder: Path, keep: int) -> None:
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".tmp-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
