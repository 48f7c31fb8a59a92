"""Weights & Biases, where `log.wandb` asks for it: gets what TensorBoard gets, and like it never ends a training."""

import contextlib
import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastbeit.config.running import LogConfig
from fastbeit.errors import ConfigError
from fastbeit.files import write_whole

# of wandb, unless set: the progress bar is not sent; and what could not be sent when a training ends is given up after
# so many seconds. It stays on disk.
SETTINGS = {"WANDB_CONSOLE": "off", "WANDB_FINISH_TIMEOUT": "60"}


def check_wandb(log: LogConfig) -> None:
    """
    Raises:
        ConfigError: it is asked for, and not installed.
    """
    # a folder of this name, as wandb makes them, is found too, but has no file
    if log.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise ConfigError(
            f"log.wandb={log.wandb} wants the wandb package, which is not installed; pip install wandb, or leave it out"
        )


class Asking(Protocol):
    """The settings of a run."""

    @property
    def log(self) -> LogConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class WandbBoard:
    """Figures, pictures and settings for a project of Weights & Biases; what goes wrong is said once.

    A run that is resumed goes on in the same run there, by the name in `out/wandb/id`; one that begins anew gets
    another. Whether it is sent at once is wandb's business (`WANDB_MODE`).

    Args:
        config: sent whole; `config.log.wandb` is the project.
        out: the run directory, in whose `wandb` folder wandb keeps what it sends.
        say: what goes wrong is told to it.
    """

    def __init__(self, config: Asking, out: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = out / "wandb", say
        self._run: Any = None
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        with self._as_an_extra():
            self._wandb = importlib.import_module("wandb")
            self._run = self._wandb.init(
                project=config.log.wandb,
                dir=str(out),
                id=_run_id(self._folder, first_step),
                resume="allow",
                config=config.model_dump(mode="json"),
            )
            # wandb's own steps only rise, and those of a run that is resumed go back to its checkpoint
            self._run.define_metric("*", step_metric="step")

    def add_figures(self, figures: Mapping[str, float], step: int) -> None:
        with self._as_an_extra():
            if self._run:
                self._run.log({**figures, "step": step})

    def add_picture(self, name: str, pixels: Tensor, step: int) -> None:
        """[height, width, 3] uint8."""
        with self._as_an_extra():
            if self._run:
                self._run.log({name: self._wandb.Image(pixels.cpu().numpy()), "step": step})

    def close(self, failed: bool) -> None:
        with self._as_an_extra():
            if self._run:
                self._run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _as_an_extra(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:
            # the package's errors have no common kind, and an extra never ends a training
            self._run = None
            what = (str(err) or type(err).__name__).splitlines()[0]
            self._say(f"no Weights & Biases from here on: {what}; wandb sync sends what is left in '{self._folder}'")


def _run_id(folder: Path, first_step: int) -> str:
    """Of the run there: kept where this run has steps already, else a new one."""
    path = folder / "id"
    if first_step and path.is_file() and (found := path.read_text().strip()):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    made = uuid.uuid4().hex[:16]
    write_whole(path, made)
    return made
