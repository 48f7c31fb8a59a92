"""A run directory and what a run says in it: `config.yaml`, `log.jsonl`, `tensorboard/` (design D12)."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from torch import Tensor
from tqdm import tqdm

from fastbeit.config.sections import Section, save_config
from fastbeit.errors import CANNOT_CREATE, USAGE, RunError

if sys.platform != "win32":
    import fcntl

# what may differ between the parts of one run: who runs it and what it says, not what it computes
FREE_SECTIONS = ("engine", "log", "profile")
FREE_FIELDS = {
    "data": ("index", "val_index", "tokens", "num_workers"),
    "optim": ("accumulate",),
    "tokenizer": ("path",),
}


@contextlib.contextmanager
def claim(out: Path, config: Section) -> Iterator[None]:
    """Make `out` this run's directory, or take it up again; while the context lasts no other process can.

    Raises:
        RunError: `out` is not writable (73), holds something else or another run, or is in use (2).
    """
    try:
        if out.is_dir() and not (out / "config.yaml").exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise RunError(f"out '{out}' is not empty and holds no fastbeit run; choose another out", USAGE)
    except OSError as err:
        raise RunError(f"out '{out}' cannot be read: {err.strerror}; choose another out", CANNOT_CREATE) from err
    with hold(out, "out"):
        if (out / "config.yaml").exists():
            _refuse_another_run(out, config)
        else:
            save_config(config, out / "config.yaml")
        yield


@contextlib.contextmanager
def hold(folder: Path, key: str) -> Iterator[None]:
    """Make a directory that is to be written; while the context lasts no other process can hold it.

    Args:
        key: of the configuration, where the user chose the directory.

    Raises:
        RunError: it is not writable (73) or in use (2).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as err:
        raise RunError(
            f"{key} '{folder}' cannot be written: {err.strerror}; choose another {key}", CANNOT_CREATE
        ) from err
    with lock:
        # held until the file is closed or the process dies
        _lock(lock, folder, key)
        _held.append(lock)
        try:
            yield
        finally:
            _held.remove(lock)


_held: list[IO[str]] = []


def _let_go() -> None:
    """A decoding process outlives a training process that was killed, by seconds; the lock must not."""
    for lock in _held:
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[str], folder: Path, key: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise RunError(
            f"{key} '{folder}' is in use by a run that is alive; wait for it or choose another {key}", USAGE
        ) from err


def _refuse_another_run(out: Path, config: Section) -> None:
    old, new = yaml.safe_load((out / "config.yaml").read_text()), config.model_dump(mode="json")
    changes = [f"{key} was {was}, now {now}" for key, was, now in _differences(old, new)]
    if changes:
        raise RunError(
            f"out '{out}' holds another run: {'; '.join(changes)}. Choose another out, or that run's settings",
            USAGE,
        )


def _differences(old: Any, new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = []
    for section, now in new.items():
        was = old.get(section) if isinstance(old, dict) else None
        if section in (*FREE_SECTIONS, "out"):
            continue
        if not isinstance(now, dict):
            found += [(section, was, now)] if was != now else []
            continue
        for key, value in now.items():
            before = was.get(key) if isinstance(was, dict) else None
            if before != value and key not in FREE_FIELDS.get(section, ()):
                found.append((f"{section}.{key}", before, value))
    return found


class RunLog:
    """JSON lines, TensorBoard when installed, and a progress bar (plain lines when no terminal looks on).

    Args:
        out: the run directory; None on a rank that keeps silent.
    """

    def __init__(self, out: Path | None, first_step: int, num_steps: int) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self.began = time.perf_counter()
        self.file = self.board = None
        if out:
            _forget_after(out / "log.jsonl", first_step)
            self.file = (out / "log.jsonl").open("a", buffering=1)
            self.board = _open_tensorboard(out / "tensorboard", first_step)
        is_watched = out is not None and sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not is_watched)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line; `step` and perhaps `event` name it, units stand in the keys."""
        if self.file:
            self.file.write(json.dumps(record) + "\n")
        if self.board:
            prefix = f"{record['event']}/" if "event" in record else ""
            for key, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(prefix + key, value, record["step"])

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """[height, width, 3] uint8, on TensorBoard."""
        if self.board:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def show(self, step: int, figures: dict[str, float]) -> None:
        """The same for the eye: beside the bar, or on a line where no terminal looks on."""
        text = (
            f"loss {figures['loss']:.4f}  masked accuracy {figures['masked_accuracy']:.4f}  "
            f"{figures['images_per_s']:.1f} img/s  waiting for data {figures['data_wait_share']:.0%}"
        )
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left_s = (time.perf_counter() - self.began) / max(step - self.first_step, 1) * (self.num_steps - step)
            self.say(f"step {step}/{self.num_steps}  {text}  ETA {tqdm.format_interval(left_s)}")

    def advance(self) -> None:
        self.bar.update()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.file:
            self.bar.write(text, file=sys.stderr)
            sys.stderr.flush()


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that an interrupted run took past its last checkpoint: they are taken again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _open_tensorboard(folder: Path, first_step: int):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # what an earlier part of the run wrote past the checkpoint is hidden
    return SummaryWriter(str(folder), purge_step=first_step + 1)


class Stop:
    """Signals, as wishes that the loop reads: SIGTERM and SIGINT stop, SIGUSR1 saves."""

    def __init__(self) -> None:
        self.wanted = False
        self.save_wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in self._signals():
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signals(self) -> list[int]:
        # another thread than the main one may not listen, and Windows knows no SIGUSR1
        if threading.current_thread() is not threading.main_thread():
            return []
        return [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]

    def _hear(self, number: int, frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self.wanted and number == signal.SIGINT:
                raise KeyboardInterrupt  # asked twice: now
            self.wanted = True
        else:
            self.save_wanted = True
