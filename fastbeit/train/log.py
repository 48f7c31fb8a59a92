"""Logs: `log.jsonl`, TensorBoard, Weights & Biases, and a progress bar, or lines where stderr is no terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fastbeit.errors import RunError, writing
from fastbeit.files import append_line, read_records, write_whole
from fastbeit.train.board import Board
from fastbeit.train.wandb_board import Asking, WandbBoard


class RunLog:
    """JSON lines, TensorBoard when installed, Weights & Biases when asked for, and a progress bar (plain lines when no
    terminal looks on).

    Args:
        out: the run directory; None on a rank that keeps silent.
        config: of the run, which may ask for Weights & Biases.

    Raises:
        RunError: `log.jsonl` cannot be written (74).
    """

    def __init__(self, out: Path | None, first_step: int, num_steps: int, config: Asking | None = None) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self.began = time.perf_counter()
        self.error: RunError | None = None  # of writing: raised by the loop, which saves first
        self.problem = ""  # with what was there
        self.path = out and out / "log.jsonl"
        self._before: list[dict[str, Any]] = []  # what was written by earlier parts of the run
        if self.path:
            with writing(f"'{self.path}'"):
                self._before, self.problem = _forget_after(self.path, first_step)
        is_watched = out is not None and sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not is_watched)
        # what an earlier part of the run wrote past the checkpoint is hidden
        self.board = Board(out / "tensorboard", first_step + 1, self.say) if out else None
        self.wandb = None
        if out and config and config.log.wandb:
            self.wandb = WandbBoard(config, out, first_step, self.say)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.close(failed=exception[0] is not None)

    def write(self, record: dict[str, Any]) -> None:
        """One line; `step` and perhaps `event` name it, units stand in the keys."""
        if self.path and not self.error:
            try:
                with writing(f"'{self.path}'", "make room, and run the same command again"):
                    append_line(self.path, json.dumps(record))
            except RunError as err:
                self.error = err
        prefix = f"{record['event']}/" if "event" in record else ""
        figures = {prefix + key: value for key, value in record.items() if isinstance(value, int | float)}
        for board in filter(None, (self.board, self.wandb)):
            board.add_figures(figures, record["step"])

    def lacks(self, step: int, event: str) -> bool:
        """Whether an earlier part of the run left no such line; never on a rank that keeps silent."""
        return self.path is not None and not any(
            line["step"] == step and line.get("event") == event for line in self._before
        )

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """[height, width, 3] uint8, on TensorBoard and Weights & Biases."""
        for board in filter(None, (self.board, self.wandb)):
            board.add_picture(name, pixels, step)

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
        if self.path:
            self.bar.write(text, file=sys.stderr)
            sys.stderr.flush()


def _forget_after(path: Path, step: int) -> tuple[list[dict[str, Any]], str]:
    """Drop the lines of steps that an interrupted run took past its last checkpoint: they are taken again.

    Returns:
        The records that stay, and which lines could not be read, in words.
    """
    records, problem = read_records(path)
    stay = [one for one in records if isinstance(number := one.get("step"), int) and step > 0 and number <= step]
    if problem or len(stay) < len(records):
        write_whole(path, "".join(json.dumps(one) + "\n" for one in stay))
    else:
        path.touch()
    return stay, problem
