"""Ranks: who there is, and how they talk on the host."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbeit.config.sections import EngineConfig
from fastbeit.cores import num_cores
from fastbeit.errors import USAGE, DataError, RunError


@dataclass(frozen=True)
class Verdict:
    """What all ranks do in this step; the same on each of them."""

    stops: bool  # somebody was asked to stop
    saves: bool  # somebody was asked to save
    bad: list[tuple[int, str]]  # images that all ranks replaced: row of the index, path and reason
    error: DataError | None  # the first rank's that has no data


@dataclass(frozen=True)
class World:
    """The ranks of a run, and how they talk on the host (gloo, so that no device waits)."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    def sum(self, values: list[float]) -> list[float]:
        """Add each value over the ranks; exact for integers below 2**53."""
        if self.host_group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def add(self, values: Tensor) -> Tensor:
        """Add a tensor over the ranks, in place and on their devices: no host waits."""
        if self.host_group is not None:
            dist.all_reduce(values)
        return values

    def gather(self, items: list) -> list:
        """The ranks' lists, one after the other."""
        if self.host_group is None:
            return items
        parts: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items, group=self.host_group)
        return [item for part in parts for item in part]

    def agree(self, stop: bool, save: bool, bad: list[tuple[int, str]], error: DataError | None) -> Verdict:
        """One verdict for all, of what each rank was asked and what it met; costs one collective where all is well."""
        stops, saves, met = self.sum([stop, save, bool(bad) or error is not None])
        reports = self.gather([(bad, error and (str(error), error.exit_code))]) if met else []
        errors = [DataError(*told) for _, told in reports if told]
        return Verdict(bool(stops), bool(saves), [one for bad, _ in reports for one in bad], next(iter(errors), None))

    def share(self, model: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        if self.host_group is not None:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        self.sum([0])

    def leave(self) -> None:
        """Leave the process group; call it last, and not after an error."""
        if self.host_group is not None:
            dist.destroy_process_group()


def device_of(engine: EngineConfig, local_rank: int = 0) -> torch.device:
    """The device of a rank, by the number that it has on its machine."""
    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise RunError("engine.device=cuda, but PyTorch sees no CUDA device; set engine.device=cpu", USAGE)
    return torch.device("cuda", local_rank) if has_cuda and engine.device != "cpu" else torch.device("cpu")


def start_world(engine: EngineConfig) -> World:
    """Join the ranks that the `deepspeed` launcher or torchrun started; without a launcher there is one."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _LAUNCHER.items())
    device = device_of(engine, local_rank)
    on_cuda = device.type == "cuda"
    if engine.name == "single" and size > 1:
        raise RunError(f"engine.name=single runs on one rank, but {size} were started; set engine.name=ddp", USAGE)
    if on_cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
        torch.set_num_threads(max(1, num_cores() // local_size))
    if "RANK" not in os.environ:
        return World(rank, size, device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    host_group = dist.new_group(backend="gloo")
    assert isinstance(host_group, dist.ProcessGroup)  # of all ranks, so this one is in it
    return World(rank, size, device, host_group)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # each rank's loss depends on what all of them gave
        if torch.is_grad_enabled():
            raise RuntimeError("a gradient over ranks has no second derivative: leave create_graph=True out")
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def stacked(x: Tensor) -> Tensor:
    """[size, *x.shape]: the tensor of each rank, with its gradient from all of them; torch's own warns from 2.13 on."""
    stack: Any = _Stack.apply(x)
    return stack


_LAUNCHER = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
