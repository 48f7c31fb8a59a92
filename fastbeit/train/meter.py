"""What is measured between two log lines: sums, speed, waiting; kept on the device until it is read."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbeit.engine.cards import peak_of
from fastbeit.engine.ranks import World


def _counted(counts: Tensor, is_one: Tensor) -> Tensor:
    """[2]: how many in all, and how many in a row, one step later."""
    one = is_one.to(counts)
    return torch.stack([counts[0] + one, (counts[1] + 1) * one])


class Meter:
    """Sums over the steps since the last `read`, then over all ranks."""

    def __init__(self, world: World, batch_size: int, flops_per_image: int = 0) -> None:
        """
        Args:
            batch_size: images a step, of all ranks.
            flops_per_image: of a forward and backward; 0: not known.
        """
        self.world, self.batch_size, self.flops_per_image = world, batch_size, flops_per_image
        # as of the last `read`: updates that were skipped, steps that predicted nothing
        self.skipped_in_a_row = self.num_empty = self.empty_in_a_row = 0
        self._skipped = torch.zeros(2, device=world.device)  # updates skipped: in all, and in a row
        self._empty = torch.zeros(2, device=world.device)  # steps that predicted nothing: since `read`, and in a row
        self._clear()

    def _clear(self) -> None:
        self.num_steps = 0
        self._sums: list[Tensor] = []
        self._grad_norm = torch.zeros((), device=self.world.device)
        self._count = torch.zeros((), dtype=torch.int64, device=self.world.device)
        self._waited_s = 0.0
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Since the last `read`, by the host's clock: it has enqueued what the device may still do."""
        return time.perf_counter() - self._began

    def waited(self, seconds: float) -> None:
        self._waited_s += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in this context is no part of a step, and takes none of its time."""
        # what the device has still to do does
        self._settle()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._settle()
            self._began += time.perf_counter() - began

    def _settle(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def add(self, sums: tuple[Tensor, ...]) -> None:
        """One micro-batch of this rank: scalars, or vectors such as a histogram."""
        doubles = [one.double() for one in sums]
        self._sums = [total + one for total, one in zip(self._sums, doubles, strict=True)] if self._sums else doubles

    def end_step(self, count: Tensor, grad_norm: Tensor, overflowed: Tensor | None = None) -> None:
        """
        Args:
            count: of what the step predicted, over all ranks; a scalar on the device.
            grad_norm: not finite where the update was skipped.
            overflowed: whether it may have been for a loss scale that was too large, and is halved since: such a step
                is counted as skipped, and not among those in a row.
        """
        self._count += count
        self.num_steps += 1
        self._grad_norm = grad_norm
        self._skipped = _counted(self._skipped, ~torch.isfinite(grad_norm))
        if overflowed is not None:
            self._skipped[1] *= ~overflowed
        self._empty = _counted(self._empty, count == 0)

    def read(self) -> tuple[list[Tensor], float, dict[str, float]]:
        """Sums over all ranks, their count, and what is measured of every training; all ranks must ask.

        The only place where a step waits for the device.
        """
        totals = self.world.sum(torch.cat([one.flatten() for one in self._sums]).tolist())
        parts = torch.tensor(totals, dtype=torch.float64).split([one.numel() for one in self._sums])
        sums = [part.view(one.shape) for part, one in zip(parts, self._sums, strict=True)]
        count = max(self._count.item(), 1)
        skipped, in_a_row = self._skipped.tolist()
        self.skipped_in_a_row = int(in_a_row)
        self.num_empty, self.empty_in_a_row = map(int, self._empty.tolist())
        self._empty[0] = 0
        seconds = self.seconds()
        figures = {
            "grad_norm": self._grad_norm.item(),
            "step_ms": 1e3 * seconds / self.num_steps,
            "images_per_s": self.num_steps * self.batch_size / seconds,
            "data_wait_share": self._waited_s / seconds,
            "skipped_steps": int(skipped),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        figures |= self._spread(figures["step_ms"], figures["data_wait_share"])
        if self.world.device.type == "cuda":
            figures["peak_mib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**20
            figures |= self._rates(figures["images_per_s"], torch.cuda.get_device_name(self.world.device))
        self._clear()
        return sums, count, figures

    def _spread(self, step_ms: float, data_wait_share: float) -> dict[str, float]:
        """Of several ranks the least and the most, and whose they are."""
        if self.world.size == 1:
            return {}
        told = self.world.gather([(step_ms, data_wait_share)])
        found = {}
        for number, name in enumerate(("step_ms", "data_wait_share")):
            ranks = sorted(range(len(told)), key=lambda rank: told[rank][number])
            for word, rank in (("least", ranks[0]), ("most", ranks[-1])):
                found |= {f"{name}_{word}": told[rank][number], f"{name}_{word}_rank": rank}
        return found

    def _rates(self, images_per_s: float, gpu: str) -> dict[str, float]:
        """FLOPs of a GPU, and their share of what it could do."""
        if not self.flops_per_image:
            return {}
        rate, peak = images_per_s / self.world.size * self.flops_per_image, peak_of(gpu)
        return {"tflop_per_s": rate / 1e12} | ({"mfu": rate / peak} if peak else {})
