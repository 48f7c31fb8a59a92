"""What a ZeRO optimizer remembers of each parameter, by name: read and written one parameter at a time.

Stages 1 to 3 keep fp32 weights and moments in a few flat tensors a rank, its partitions; a parameter's moments lie in
those of several ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.engine.adamw import MOMENTS
from fastbeit.engine.sharded import cut, is_sharded, shape_of
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
        moments = {key: torch.zeros_like(partition) for key in MOMENTS}
        inner.state[partition] = {"step": _step_like(inner, partition, 0), **moments}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # by itself it links moments to parameters inside the first group's step, when the second has none yet
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def read_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor | Streamed]:
    """`exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` of each parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state

    def moment(parameter: nn.Parameter, key: str) -> Streamed:
        def read() -> Tensor:
            found = safe_get_full_optimizer_state(parameter, key)
            assert found is not None
            return found.cpu()

        return Streamed(tuple(shape_of(parameter)), torch.float32, read)

    step = torch.as_tensor(_step(optimizer), dtype=torch.float32).cpu()
    state: dict[str, Tensor | Streamed] = {}
    for name, parameter in model.named_parameters():
        state[f"step.{name}"] = step.clone()
        state |= {f"{key}.{name}": moment(parameter, key) for key in MOMENTS}
    return state


def write_state(model: nn.Module, optimizer: Any, state: Mapping[str, Tensor], rank: int) -> None:
    """The inverse of `read_state`.

    Raises:
        KeyError, RuntimeError: the state is that of another model.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    inner, step = optimizer.optimizer, 0.0
    for name, parameter in model.named_parameters():
        step = state[f"step.{name}"].item()
        for key in MOMENTS:
            value = state[f"{key}.{name}"]
            if value.shape != shape_of(parameter):
                raise RuntimeError(f"{key}.{name} is of shape {list(value.shape)}, wanted {list(shape_of(parameter))}")
            if is_sharded(parameter):
                # DeepSpeed's own setter of whole values fails where the last part is shorter
                safe_set_local_optimizer_state(parameter, cut(value, parameter, rank), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    for partition in partitions(optimizer):
        inner.state[partition]["step"] = _step_like(inner, partition, step)
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = int(step)


def _step(optimizer: Any) -> Tensor | int:
    """Steps taken; apex has them in its groups."""
    inner = optimizer.optimizer
    told = [group["step"] for group in inner.param_groups if "step" in group]
    return told[0] if told else inner.state[partitions(optimizer)[0]]["step"]


def _step_like(inner: torch.optim.Optimizer, partition: Tensor, step: float) -> Tensor | int:
    """Steps as the optimizer counts them: PyTorch in a tensor beside the moments, DeepSpeed in a number."""
    if isinstance(inner, torch.optim.AdamW):
        return torch.tensor(float(step), device=partition.device)
    return int(step)
