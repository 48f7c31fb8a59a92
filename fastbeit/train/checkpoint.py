"""A checkpoint is complete and verified, or it is not there.

`step-000123/` holds `model.safetensors` (whole, whatever the ranks), `optimizer.safetensors` (moments by parameter
name), `state.json`, and a MANIFEST with each file's size and sha256. It is written beside its place, synced to disk
and renamed. Nothing in it is a pickle.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from fastbeit.config.read import as_saved
from fastbeit.engine.protocol import Engine
from fastbeit.engine.ranks import World
from fastbeit.engine.sharded import load_state as load_weights
from fastbeit.engine.sharded import state_of
from fastbeit.engine.streamed import Tensors, take_part
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, USAGE, ConfigError, RunError, writing
from fastbeit.files import UNFINISHED, move_folder, sha256, share, sync, write_whole
from fastbeit.train.ema import PREFIX, Average
from fastbeit.train.settings import Changes, changes, compared, fixed, in_words
from fastbeit.train.tensor_file import Renamed, TensorFile, write_tensors

MANIFEST = "MANIFEST.json"
BEST = "best.json"  # of a folder of checkpoints, where there is a best: its step, and what it was judged by
VERSION = 1  # of this layout
ALIASES = "latest", "best"  # of a checkpoint, after the path of a run
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FILES = {MODEL, OPTIMIZER, "state.json"}


class Saver:
    """A training's checkpoints: the one that it goes on from, and those that it makes.

    Args:
        origin: what the training is made from, by name; a checkpoint of another origin is refused.
        config: the training's settings, a `Section`; a checkpoint made with others that decide what is computed is
            refused.

    Raises:
        RunError: there are checkpoints and none is usable, or they are of another training (exit code 78).
    """

    def __init__(self, folder: Path, origin: dict[str, Any], config: Any, num_steps: int, world: World) -> None:
        self.folder, self.origin, self.config, self.keep, self.world = folder, origin, config, config.log.keep, world
        self.last_checkpoint, self.problems = find_checkpoint(folder)
        self._state: dict[str, Any] = load_state(self.last_checkpoint) if self.last_checkpoint else {}
        self._changes: Changes = self._compare(num_steps) if self.last_checkpoint else {}
        self.first_step = self.last_step = self._state.get("step", 0)
        self.seconds_before: float = self._state.get("seconds", 0.0)
        self.schedule: list[int] | None = self._state.get("schedule")  # steps and warmup that it was made under
        self.fit: dict[str, Any] | None = self._state.get("fit")  # of micro-batches; None: auto chose nothing
        self._weights: Mapping[str, Tensor] = _open(self.last_checkpoint, MODEL) if self.last_checkpoint else {}
        # known to verify; the first stays while this training lasts
        self._good: set[Path] = {self.last_checkpoint} if self.last_checkpoint else set()
        self._resumed = self._good.copy()
        self._best = _read_best(folder)

    def load_weights(self, model: nn.Module) -> None:
        """Load the last checkpoint's weights, if there is one; the next two do so with average and moments."""
        if self.last_checkpoint:
            with self._fitting("weights"):
                load_weights(
                    model, Renamed(self._weights, {name: name for name in self._weights if not name.startswith(PREFIX)})
                )

    def load_average(self, average: Average) -> None:
        if self.last_checkpoint:
            with self._fitting("averaged weights"):
                average.load(self._weights, self.world.rank)
        self._weights = {}

    def load_moments(self, engine: Engine) -> None:
        if self.last_checkpoint:
            with self._fitting("moments"):
                engine.load_optimizer_state(_open(self.last_checkpoint, OPTIMIZER))

    def changes(self, ran: dict[str, Any]) -> Changes:
        """What is another than when the checkpoint was made: settings, and what of `ran` was saved with it."""
        return self._changes | compared(self._state.get("versions", {}) | self._state.get("ran", {}), ran)

    def save(self, step: int, engine: Engine, model: nn.Module, average: Average, known: dict[str, Any]) -> None:
        """Write a checkpoint of this step; all ranks must call it.

        Raises:
            RunError: the disk is full or not writable (74); on all ranks.
        """
        weights, moments, error = state_of(model) | average.weights(), engine.optimizer_state(), None
        if self.world.rank:
            take_part(weights)
            take_part(moments)
        else:
            state = {**self.origin, "config": self.config.model_dump(mode="json"), **known}
            try:
                self._written(save_checkpoint(self.folder, step, weights, moments, state))
            except RunError as err:
                error = err
        if error := self.world.agree(stop=False, save=False, bad=[], error=error).error:
            raise error
        self.last_checkpoint, self.last_step = self.folder / _name(step), step

    def _written(self, path: Path) -> None:
        self._good.add(path)
        best = {self.folder / _name(self._best["step"])} if self._best else set()
        prune(self.folder, self.keep, self._good, {path, *self._resumed, *best})

    def judge(self, step: int, figure: str, value: float, judged_by: str | None) -> None:
        """Of the checkpoint of this step; the best one stays when older ones are dropped, of equals the first.

        Args:
            judged_by: fingerprint of the images; what others said of earlier checkpoints does not compare.

        Raises:
            RunError: the mark cannot be written (exit code 74).
        """
        kind = {"figure": figure, "judged_by": judged_by}
        if self._best and self._best.items() >= kind.items() and not value > self._best["value"]:
            return
        self._best = {"step": step, "value": value, **kind}
        if self.world.rank == 0:
            with writing(f"'{self.folder / BEST}'"):
                write_whole(self.folder / BEST, json.dumps(self._best) + "\n")

    def _compare(self, num_steps: int) -> Changes:
        state, path = self._state, self.last_checkpoint
        for name, fingerprint in self.origin.items():
            if state.get(name) != fingerprint:
                raise RunError(
                    f"'{path}' was made with another {name} (fingerprint {state.get(name)}, now "
                    f"{fingerprint}); go back to that {name}, or choose another out",
                    CHECKPOINT_UNUSABLE,
                )
        remedy = "remove that folder if it does not belong there, or choose another out"
        settings = state.get("config")
        try:
            found = changes(as_saved(type(self.config), settings if isinstance(settings, dict) else {}), self.config)
        except ConfigError as err:
            raise RunError(f"'{path}' was made with other settings: {err}; {remedy}", CHECKPOINT_UNUSABLE) from err
        if wrong := fixed(found):
            raise RunError(f"'{path}' was made with other settings: {in_words(wrong)}; {remedy}", CHECKPOINT_UNUSABLE)
        if state["step"] > num_steps:
            raise RunError(
                f"'{path}' is of step {state['step']}, and optim.steps or optim.epochs now ask for {num_steps}: fewer "
                f"than were taken. Ask for at least {state['step']} steps, or choose another out",
                USAGE,
            )
        return found

    @contextlib.contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """An error in this context is one of a checkpoint that does not fit the model."""
        try:
            yield
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except (RuntimeError, KeyError, StopIteration) as err:
            problem = (str(err) or type(err).__name__).splitlines()[0]
            raise RunError(
                f"'{self.last_checkpoint}': its {what} do not fit this model ({problem}): it was made by another "
                "version; use that one, or choose another out",
                CHECKPOINT_UNUSABLE,
            ) from err


def save_checkpoint(folder: Path, step: int, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXX` whole or not at all; other ranks `take_part` in what is streamed.

    Raises:
        RunError: the disk is full or not writable (exit code 74); what was there before stays.
    """
    final = folder / _name(step)
    aside = folder / f".tmp-{final.name}.{os.getpid()}"
    unwritten = [model, optimizer]
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name in (MODEL, OPTIMIZER):
            write_tensors(aside / name, unwritten.pop(0))
        (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}, indent=1))
        for path in aside.iterdir():
            share(path)
            sync(path)
        sync(aside)
        # the same step again: after a resume from an older checkpoint, when this one did not verify
        _remove(final)
        move_folder(aside, final)
    except (OSError, SafetensorError) as err:
        for tensors in unwritten:
            take_part(tensors)
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"checkpoint of step {step} cannot be written to '{folder}': {err}", CANNOT_WRITE) from err
    return final


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    Raises:
        RunError: there are checkpoints and none is usable (exit code 78).
    """
    problems = []
    candidates = newest_first(folder)
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
    """A checkpoint's directory from itself, a run, its `checkpoints` folder, or a path ending in `latest` or `best`.

    It is verified. A run stands for its newest; `best` is that of a fine-tuning with held-out images.
    """
    path, name = Path(path), Path(path).name
    if name in ALIASES:
        path = path.parent
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if name == "best":
        best = _read_best(path)
        if best is None:
            raise RunError(
                f"no best checkpoint in '{path}': it was not judged by held-out images; `latest` is the newest",
                CHECKPOINT_UNUSABLE,
            )
        path = path / _name(best["step"])
    if not path.name.startswith("step-"):
        found, _ = find_checkpoint(path)
        if found is None:
            raise RunError(f"no checkpoint in '{path}'; wanted a run directory or a step-XXXXXX", CHECKPOINT_UNUSABLE)
        return found
    problem = _find_damage(path)
    if problem is not None:
        raise RunError(f"'{path}' is not usable: {problem}", CHECKPOINT_UNUSABLE)
    return path


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _read_best(folder: Path) -> dict[str, Any] | None:
    """What `Saver.judge` wrote; None: nothing, or of a checkpoint that is no longer there."""
    try:
        best = json.loads((folder / BEST).read_text())
        is_whole = isinstance(best["figure"], str) and isinstance(best["value"], float)
        return best if is_whole and (folder / _name(best["step"])).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load_model(path: Path) -> dict[str, Tensor]:
    return dict(_open(path, MODEL))


def load_optimizer(path: Path) -> dict[str, Tensor]:
    return dict(_open(path, OPTIMIZER))


def load_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def _open(path: Path, name: str) -> TensorFile:
    return TensorFile(path / name)


def _find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if type(manifest["version"]) is not int or manifest["version"] != VERSION:
            return f"it is of version {manifest['version']}, this fastbeit reads version {VERSION}"
        files = manifest["files"]
        for name, wanted in files.items():
            if name not in FILES:
                return f"the manifest names '{name}', which is no file of a checkpoint"
            if (size := (path / name).stat().st_size) != wanted["bytes"]:
                return f"{name} has {size} bytes, the manifest says {wanted['bytes']}"
            if sha256(path / name) != wanted["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
        if missing := FILES - set(files):
            return f"{sorted(missing)} not in the manifest"
        step, wanted = load_state(path)["step"], path.name.removeprefix("step-")
        if type(step) is not int or step != int(wanted):
            return f"state.json says step {step}, which is not that of its name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        return f"manifest or file unreadable ({type(err).__name__}: {err})"
    return None


def prune(folder: Path, keep: int, good: set[Path], stay: set[Path]) -> None:
    """Drop what is older than the newest `keep` that verify.

    Args:
        good: those known to verify; others are looked at, and added if they do.
        stay: not dropped, whatever is newer.
    """
    num_good, unfinished = 0, [mark.parent for mark in folder.glob(f"step-*/{UNFINISHED}")]
    for path in newest_first(folder):
        if num_good == keep:
            if path not in stay:
                _remove(path)
        elif path in good or _find_damage(path) is None:
            good.add(path)
            num_good += 1
    for left in [*folder.glob(".tmp-step-*"), *unfinished]:
        shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    """At once, as far as names go: a kill in the middle must not leave a half that is taken for damage."""
    gone = path.with_name(f".tmp-{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(gone)
    for left in path, gone:
        shutil.rmtree(left, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, good and bad, but not those that are being moved there."""
    steps = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    steps = [path for path in steps if not (path / UNFINISHED).exists()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
