"""TensorBoard, where it is installed: an extra, which never ends a training. What goes wrong is said once."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Board:
    """Figures and pictures for TensorBoard; nothing, when it is not installed or its file cannot be written.

    Args:
        folder: where its file goes.
        purge_step: what earlier parts of a run wrote from this step on is hidden.
        say: what goes wrong is told to it.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._writer: Any = None
        self._quiet = _QuietThreads()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with self._as_an_extra():
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add_figures(self, figures: Mapping[str, float], step: int) -> None:
        with self._as_an_extra():
            for name, value in figures.items() if self._writer else ():
                self._writer.add_scalar(name, value, step)

    def add_picture(self, name: str, pixels: Tensor, step: int) -> None:
        """[height, width, 3] uint8."""
        with self._as_an_extra():
            if self._writer:
                self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        with self._as_an_extra():
            if self._writer:
                self._writer.close()
        self._quiet.end()

    @contextlib.contextmanager
    def _as_an_extra(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # of whatever kind: a training of days does not hang on a picture of it
            self._writer = None
            self._say(f"no TensorBoard from here on, '{self._folder}': {err}")


class _QuietThreads:
    """TensorBoard's thread that writes also raises what it hands over; its traceback is not shown."""

    def __init__(self) -> None:
        self._before = threading.excepthook
        threading.excepthook = self._hear

    def _hear(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._before(args)

    def end(self) -> None:
        if threading.excepthook == self._hear:
            threading.excepthook = self._before
