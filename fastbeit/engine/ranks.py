"""Ranks: who there is, and how they talk on the host."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.cores import num_cores
from fastbeit.engine.launch import find_place
from fastbeit.engine.sharded import is_sharded
from fastbeit.errors import USAGE, RunError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective; PyTorch's and DeepSpeed's own are others for each backend
WORD_EVERY_S = 1.0  # far below the time-out of a collective, which is minutes


@dataclass(frozen=True)
class Verdict:
    """What all ranks do in this step; the same on each of them."""

    stops: bool  # somebody was asked to stop
    saves: bool  # somebody was asked to save
    bad: list[tuple[int, str]]  # images that all ranks replaced: row of the index, path and reason
    error: RunError | None  # the first rank's that cannot go on


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

    def first(self, item: Any) -> Any:
        """What rank 0 has, on all ranks."""
        if self.host_group is None:
            return item
        box = [item]
        dist.broadcast_object_list(box, 0, group=self.host_group)
        return box[0]

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks, however long it takes: it gives word every second, so that none times out.

        Raises:
            RunError: that of rank 0, on all ranks.
        """
        if self.host_group is None:
            return make()
        if self.rank:
            while not (told := self.first(None)):
                pass
            return self._told(told)
        is_made = threading.Event()

        def say_wait() -> None:
            while not is_made.wait(WORD_EVERY_S):
                self.first(None)

        speaker = threading.Thread(target=say_wait, daemon=True)
        speaker.start()
        try:
            told = make(), None
        except RunError as err:
            told = None, (str(err), err.exit_code)
        finally:
            # no two threads may talk at a time
            is_made.set()
            speaker.join()
        return self._told(self.first(told))

    @contextlib.contextmanager
    def within_first(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
        """A context of rank 0's in which all ranks are; all must enter it, and its errors are raised on all of them."""
        with contextlib.ExitStack() as stack:
            self.from_first(lambda: stack.enter_context(context()) and None)
            yield

    def _told(self, told: tuple[Any, tuple[str, int] | None]) -> Any:
        made, error = told
        if error:
            raise RunError(*error)
        return made

    def agree(self, stop: bool, save: bool, bad: list[tuple[int, str]], error: RunError | None) -> Verdict:
        """One verdict for all, of what each rank was asked and what it met; costs one collective where all is well."""
        stops, saves, met = self.sum([stop, save, bool(bad) or error is not None])
        reports = self.gather([(bad, error and (str(error), error.exit_code))]) if met else []
        errors = [RunError(*told) for _, told in reports if told]
        return Verdict(bool(stops), bool(saves), [one for bad, _ in reports for one in bad], next(iter(errors), None))

    def share(self, model: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0; of what ZeRO-3 has shared out each rank has its part."""
        if self.host_group is not None:
            whole = [parameter.data for parameter in model.parameters() if not is_sharded(parameter)]
            for tensor in (*whole, *(buffer for name, buffer in model.named_buffers() if name in model.state_dict())):
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
    if not has_cuda or engine.device == "cpu":
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise RunError(
            f"LOCAL_RANK={local_rank}, but PyTorch sees {count} CUDA device(s); start a rank for each", USAGE
        )
    return torch.device("cuda", local_rank)


def start_world(engine: EngineConfig) -> World:
    """Join the ranks that torchrun, the `deepspeed` launcher or SLURM started; without any of them there is one.

    Raises:
        RunError: the variables of who started it do not fit together, or the ranks do not find each other (2).
    """
    place = find_place(os.environ, os.isatty(0), torch.cuda.device_count())
    device = device_of(engine, place.local_rank)
    on_cuda = device.type == "cuda"
    if engine.name == "single" and place.size > 1:
        raise RunError(
            f"engine.name=single runs on one rank, but {place.size} were started; set engine.name=ddp", USAGE
        )
    if on_cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // place.local_size))
    backend, alone = "nccl" if on_cuda else "gloo", not place.master_addr
    if alone and engine.name != "deepspeed":
        return World(place.rank, place.size, device)
    # SLURM's are other ones than those that PyTorch and DeepSpeed read
    os.environ.update(place.variables())
    try:
        if alone:
            # DeepSpeed wants a group, also of one
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
        host_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as err:
        where = f"{place.master_addr}:{place.master_port}"
        raise RunError(
            f"the ranks do not meet at MASTER_ADDR:MASTER_PORT {where}: {str(err).splitlines()[0]}; "
            "is the port taken, or a rank not started?",
            USAGE,
        ) from None
    assert isinstance(host_group, dist.ProcessGroup)  # of all ranks, so this one is in it
    return World(place.rank, place.size, device, host_group)


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
