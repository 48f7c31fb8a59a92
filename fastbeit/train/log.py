"""Logs: `log.jsonl`, TensorBoard, and a progress bar, or lines where stderr is no terminal."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm


class RunLog:
    """JSON lines, TensorBoard when installed, and a progress bar (plain lines when no terminal looks on).

    Args:
        out: the run directory; None on a rank that keeps silent.
    """

    def __init__(self, out: Path | None, first_step: int, num_steps: int) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self.began = time.perf_counter()
        self.file = self.board = None
        self._before: list[dict[str, Any]] = []  # what was written by earlier parts of the run
        if out:
            self._before = _forget_after(out / "log.jsonl", first_step)
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

    def lacks(self, step: int, event: str) -> bool:
        """Whether an earlier part of the run left no such line; never on a rank that keeps silent."""
        return self.file is not None and not any(
            line["step"] == step and line.get("event") == event for line in self._before
        )

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """[height, width, 3] uint8, on TensorBoard."""
        if self.board:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def show(self, step: int, text: str) -> None:
        """Beside the bar, or on a line where no terminal looks on."""
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


def _forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps that an interrupted run took past its last checkpoint: they are taken again.

    Returns:
        The records that stay.
    """
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    records = [json.loads(line) for line in lines]
    path.write_text("".join(line for line, one in zip(lines, records, strict=True) if one["step"] <= step))
    return [one for one in records if one["step"] <= step]


def _open_tensorboard(folder: Path, first_step: int):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # what an earlier part of the run wrote past the checkpoint is hidden
    return SummaryWriter(str(folder), purge_step=first_step + 1)
