"""What an optimizer under ZeRO remembers of each parameter, by name: read and written one parameter at a time.

Stages 1 to 3 keep fp32 weights and moments in a few flat tensors a rank, its partitions; those of a parameter lie in
the partitions of several ranks. Names and kinds are those of engine/optimizer_state.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.engine.optimizer_state import MOMENTS, as_tensor, keys_of, scalar_as_it_was
from fastbeit.engine.sharded import check_shape, cut, is_sharded, shape_of
from fastbeit.engine.streamed import Streamed


def partitions(optimizer: Any) -> list[Tensor]:
    """This rank's flat tensors of fp32 weights.

    Args:
        optimizer: DeepSpeed's, around the one that it was given.
    """
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups


def begin(optimizer: Any) -> None:
    """Give each partition what Adam makes in its first step: moments of zeros, and no step taken.

    So that there is something to load into and, where no step was finite yet, to save.
    """
    inner = optimizer.optimizer
    for partition in partitions(optimizer):
        # PyTorch counts in a tensor, DeepSpeed in a number
        is_torch = isinstance(inner, torch.optim.AdamW)
        step = torch.zeros((), dtype=torch.float32, device=partition.device) if is_torch else 0
        inner.state[partition] = {"step": step, **{key: torch.zeros_like(partition) for key in MOMENTS}}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # by itself it links moments to parameters inside the first group's step, when the second has none yet
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def read_shared_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor | Streamed]:
    """All ranks must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    def moment(parameter: nn.Parameter, key: str) -> Streamed:
        def read() -> Tensor:
            found = safe_get_full_optimizer_state(parameter, key)
            assert found is not None
            return found.cpu()

        return Streamed(tuple(shape_of(parameter)), torch.float32, read)

    known = optimizer.optimizer.state[partitions(optimizer)[0]]
    scalars = {key: value for key, value in known.items() if key not in MOMENTS}
    state: dict[str, Tensor | Streamed] = {}
    for name, parameter in model.named_parameters():
        state |= {f"{key}.{name}": as_tensor(value).clone() for key, value in scalars.items()}
        state |= {f"{key}.{name}": moment(parameter, key) for key in MOMENTS}
    return state


def write_shared_state(model: nn.Module, optimizer: Any, state: Mapping[str, Tensor], rank: int) -> None:
    """The inverse of `read_shared_state`, with the same optimizer; all ranks must call it.

    Raises:
        KeyError, RuntimeError: the state is that of another model.
    """
    keys, scalars = keys_of(state), {}
    for name, parameter in model.named_parameters():
        for key in keys[name]:
            value = state[f"{key}.{name}"]
            if not value.ndim:
                scalars[key] = value
            else:
                check_shape(f"{key}.{name}", value, parameter)
                _write(parameter, key, value, rank)
    for partition in partitions(optimizer):
        own = {key: scalar_as_it_was(value, partition.device) for key, value in scalars.items()}
        optimizer.optimizer.state[partition] |= own


def _write(parameter: nn.Parameter, key: str, value: Tensor, rank: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_sharded(parameter):
        # DeepSpeed's own setter of whole values fails where the last part is shorter
        safe_set_local_optimizer_state(parameter, cut(value, parameter, rank), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
