"""What is measured between two log lines: loss, accuracy, speed, waiting; kept on the device until it is read."""

import time

import torch
from torch import Tensor

from fastbeit.engine.ranks import World


class Meter:
    """Sums over the steps since the last `read`, then means over all ranks."""

    def __init__(self, world: World, batch_size: int) -> None:
        self.world, self.batch_size = world, batch_size
        self.skipped = torch.zeros(2, device=world.device)  # updates skipped: in all, and in a row
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, right predictions
        self.grad_norm = torch.zeros((), device=self.world.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.world.device)
        self.num_steps = 0
        self.waited_s = 0.0
        self.began = time.perf_counter()

    def waited(self, seconds: float) -> None:
        self.waited_s += seconds

    def add(self, loss_sum: Tensor, num_correct: Tensor) -> None:
        """One micro-batch of this rank."""
        self.sums += torch.stack([loss_sum.double(), num_correct.double()])

    def end_step(self, count: Tensor, grad_norm: Tensor) -> None:
        """
        Args:
            count: predictions of the step, over all ranks; a scalar on the device.
            grad_norm: not finite where the update was skipped.
        """
        self.count += count
        self.num_steps += 1
        self.grad_norm = grad_norm
        bad = (~torch.isfinite(grad_norm)).float()
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad])

    def read(self) -> dict[str, float]:
        """The figures since the last call; all ranks must ask. The only place where a step waits for the device."""
        loss, num_correct = self.world.sum(self.sums.tolist())
        count = max(self.count.item(), 1)
        skipped, skipped_in_a_row = self.skipped.tolist()
        seconds = time.perf_counter() - self.began
        figures = {
            "loss": loss / count,
            "masked_accuracy": num_correct / count,
            "grad_norm": self.grad_norm.item(),
            "images_per_s": self.num_steps * self.batch_size / seconds,
            "data_wait_share": self.waited_s / seconds,
            "skipped_steps": int(skipped),
            "skipped_in_a_row": int(skipped_in_a_row),
        }
        self._clear()
        return figures
