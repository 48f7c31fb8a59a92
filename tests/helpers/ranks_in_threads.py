"""Several ranks as threads of one process, for what ranks do on the host."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastbeit.engine.ranks import World
from helpers.waiting import PATIENCE_S

T = TypeVar("T")


class Meeting:
    """Where ranks hand over their lists; all of them come, or all of them fail."""

    def __init__(self, size: int) -> None:
        self.lists: list[list] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, items: list) -> list:
        self.lists[rank] = items
        self.barrier.wait(PATIENCE_S)
        found = [item for items in self.lists for item in items]
        self.barrier.wait(PATIENCE_S)
        return found


@dataclass(frozen=True)
class Rank(World):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: list[float]) -> list[float]:
        gathered = self.gather([values])
        return [sum(of_all) for of_all in zip(*gathered, strict=True)]

    def gather(self, items: list) -> list:
        return self.meeting.exchange(self.rank, items)


def of_each_rank(size: int, job: Callable[[World], T]) -> list[T]:
    """What the job returns on each rank; its error, if one has it."""
    meeting = Meeting(size)
    ranks = [Rank(rank, size, torch.device("cpu"), meeting=meeting) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [*pool.map(job, ranks)]
