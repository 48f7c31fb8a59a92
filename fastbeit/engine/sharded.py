"""Weights that ZeRO-3 shares out: a rank holds a part of each, and has a whole one only while it asks for it.

With any other engine a parameter is whole, and most of this does nothing.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.engine.streamed import Streamed


def shares_weights(engine: EngineConfig) -> bool:
    return engine.name == "deepspeed" and engine.zero_stage == 3


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter."""
    shards: Any = parameter
    return torch.Size(shards.ds_shape) if is_sharded(parameter) else parameter.shape


def check_shape(name: str, value: Tensor, parameter: Tensor) -> None:
    """
    Raises:
        RuntimeError: the value is not of the whole parameter's shape.
    """
    if value.shape != shape_of(parameter):
        raise RuntimeError(f"{name} is of shape {list(value.shape)}, wanted {list(shape_of(parameter))}")


def count_weights(model: nn.Module) -> int:
    return sum(shape_of(parameter).numel() for parameter in model.parameters())


@contextlib.contextmanager
def whole(parameters: Iterable[Tensor], written: bool = False) -> Iterator[None]:
    """A context in which parameters are whole on each rank; all ranks must enter it.

    Args:
        written: what rank 0 has written to them by its end is kept, on all ranks.
    """
    shards = [parameter for parameter in parameters if is_sharded(parameter)]
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards, modifier_rank=0 if written else None):
        yield


def part_of(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: all of it, or its part, flat."""
    shards: Any = parameter
    return shards.ds_tensor if is_sharded(parameter) else parameter.detach()


def cut(value: Tensor, parameter: nn.Parameter, rank: int) -> Tensor:
    """A rank's part of a tensor that is shared out as `parameter` is; the last parts end in zeros."""
    size = part_of(parameter).numel()
    part = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - len(part)))


def joined(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole of what is shared out as `parameter` is; all ranks must call it."""
    if not is_sharded(parameter):
        return part
    # where the ranks talk, which is not where an offloaded part lies
    part = part.to(parameter.device)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    shape = shape_of(parameter)
    return torch.cat(parts)[: math.prod(shape)].view(shape)


def state_of(model: nn.Module) -> dict[str, Tensor | Streamed]:
    """The state dict of a model, whose parameters are whole only when they are read."""
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor | Streamed] = dict(model.state_dict())
    return state | {name: streamed(p, part_of(p)) for name, p in parameters.items() if is_sharded(p)}


def streamed(parameter: nn.Parameter, part: Tensor) -> Streamed:
    return Streamed(tuple(shape_of(parameter)), part.dtype, lambda: joined(part, parameter).cpu())


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the weights of a state dict, one at a time where they are shared out; all ranks must call it.

    Raises:
        RuntimeError: names or shapes are others.
    """
    if not any_sharded(model):
        model.load_state_dict(dict(state))
        return
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() ^ state.keys()):
        raise RuntimeError(f"{missing[0]} is in one of model and file only")
    for name, parameter in model.named_parameters():
        value = state[name]
        check_shape(name, value, parameter)
        with whole([parameter], written=True):
            parameter.copy_(value)
    for name, buffer in model.named_buffers():
        if name in wanted:
            buffer.copy_(state[name])
