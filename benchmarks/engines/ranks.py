"""The ranks of an engine: processes that build a model once and take steps when they are asked to.

They sleep while others have their turn. Each rank has one thread, as torchrun has it.
"""

import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.engines.small import NUM_RANKS, NUM_WORDS, config_of, inputs_of
from fastbeit.engine.launch import Place
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import start_world
from fastbeit.engine.sharded import count_weights
from fastbeit.engine.zero import building, import_deepspeed
from fastbeit.errors import RunError
from fastbeit.model.beit import make_beit
from fastbeit.process import leave
from fastbeit.train import loop
from fastbeit.train.optim import make_optimizer

WARM_UP = 5  # steps: ZeRO-3 learns in the first ones what is gathered when


@dataclass(frozen=True)
class Facts:
    """Of a model, and of a rank before it has one."""

    num_tensors: int
    num_weights: int
    imports_mib: float  # peak of the resident memory once all is imported


@dataclass(frozen=True)
class Turn:
    """Medians of a turn's steps on one rank."""

    step_ms: float  # from one barrier to the next
    cpu_ms: float  # of the process, with all its threads, meanwhile
    gradient_cpu_ms: float  # of it the forward and backward, with what the engine does in them
    peak_mib: float  # of the resident memory so far


class Ranks:
    """The processes of an engine; close it."""

    def __init__(self, engine: str, micro_batches: int) -> None:
        self.engine, size = engine, NUM_RANKS[engine]
        port = _free_port()
        spawn = multiprocessing.get_context("spawn")
        self._processes, self._connections = [], []
        for rank in range(size):
            place = Place(rank, size, rank, size, "127.0.0.1", port) if size > 1 else Place()
            mine, other = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(other, engine, micro_batches, place), daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._connections.append(mine)

    def facts(self) -> Facts:
        """Of the first rank, once all are ready.

        Raises:
            RunError: a rank has failed, here and in `turn`.
        """
        return self._answers()[0]

    def turn(self, num_steps: int) -> Turn:
        """Times of the first rank; the peak is that of the rank with the largest."""
        for connection in self._connections:
            connection.send(num_steps)
        first, *others = self._answers()
        return Turn(first.step_ms, first.cpu_ms, first.gradient_cpu_ms, max(t.peak_mib for t in (first, *others)))

    def close(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            # one whose partner has failed may wait for it in a collective, for half an hour
            process.kill()
            process.join()

    def _answers(self) -> list[Any]:
        answers = {}
        while len(answers) < len(self._connections):
            for connection in wait([one for one in self._connections if one not in answers]):
                assert isinstance(connection, Connection)
                try:
                    answers[connection] = connection.recv()
                except (EOFError, ConnectionError):
                    raise RunError(f"a rank of {self.engine} has failed; its traceback stands above") from None
        return [answers[connection] for connection in self._connections]


class Training:
    """A rank's; the same batch in each step."""

    def __init__(self, engine: str, micro_batches: int, place: Place) -> None:
        if place.master_addr:
            os.environ.update(place.variables())
        config = config_of(engine, micro_batches)
        if config.engine.name == "deepspeed":
            import_deepspeed(torch.device("cpu"))
        imports_mib = peak_mib()
        self.world = start_world(config.engine)
        torch.manual_seed(config.seed)
        with building(config.engine, self.world):
            model = make_beit(config, NUM_WORDS)
        self.world.share(model)
        self.facts = Facts(len([*model.parameters()]), count_weights(model), imports_mib)
        optimizer = make_optimizer(model, config.optim)
        self.engine = make_engine(config.engine, config.optim, model, optimizer, self.world, micro_batches)
        inputs, self.count = inputs_of(config, self.world)
        self.parts = [*loop.micro_batches(inputs, micro_batches)]
        self.turn(WARM_UP)

    def turn(self, num_steps: int) -> Turn:
        laps = [self._lap() for _ in range(num_steps)]
        step_ms, cpu_ms, gradient_cpu_ms = (1e3 * median(seconds) for seconds in zip(*laps, strict=True))
        return Turn(step_ms, cpu_ms, gradient_cpu_ms, peak_mib())

    def _lap(self) -> tuple[float, float, float]:
        """Seconds: of the clock, of the CPU, and of the CPU in forward and backward."""
        self.world.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for part, is_last in self.parts:
            self.engine.accumulate(part, self.count, is_last)
        gradient = time.process_time()
        self.engine.step()
        self.world.barrier()
        return time.perf_counter() - wall, time.process_time() - cpu, gradient - cpu


def _serve(connection: Connection, engine: str, micro_batches: int, place: Place) -> None:
    training = Training(engine, micro_batches, place)
    connection.send(training.facts)
    while True:
        try:
            num_steps = connection.recv()
        except EOFError:
            leave(0)  # nobody asks any more
        connection.send(training.turn(num_steps))


def peak_mib() -> float:
    """The most memory that this process has held in RAM so far; `ru_maxrss` would count its parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RunError("/proc/self/status has no VmHWM; memory is measured on Linux alone")


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]
