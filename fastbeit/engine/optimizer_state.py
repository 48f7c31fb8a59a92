"""What an optimizer remembers of each parameter, by the parameter's name, whatever the optimizer: `KEY.NAME`.

`exp_avg.blocks.0.mlp.fc1.weight`, say. Python's numbers become int64 and float64 scalars, and numbers again; no state
of the optimizers here is a tensor of that kind. What an optimizer keeps for a whole group of parameters (apex's step)
is written for each of them: `group_step.NAME`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
OF_GROUPS = ("step",)  # what apex's optimizers keep in a group, beside its settings
GROUP = "group_"
NUMBERS = {torch.int64: int, torch.float64: float}


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Where it lies, not copied; nothing before the first step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        of_group = {GROUP + key: group[key] for key in OF_GROUPS if key in group}
        for parameter in group["params"]:
            for key, value in (of_group | optimizer.state[parameter]).items():
                found[f"{key}.{names[parameter]}"] = as_tensor(value)
    return found


def write_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of `read_state`, with the same optimizer; scalars without a name are passed over.

    Raises:
        KeyError: it knows some parameters of the model, and not all.
    """
    keys = keys_of(state)
    if not keys:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            own = {key: _as_it_was(state[f"{key}.{name}"], parameter) for key in keys[name]}
            group.update({key.removeprefix(GROUP): own.pop(key) for key in [*own] if key.startswith(GROUP)})
            optimizer.state[parameter] = own


def keys_of(state: Iterable[str]) -> dict[str, list[str]]:
    """Of each parameter what is known, by their names in a file; what belongs to none is passed over."""
    keys: dict[str, list[str]] = {}
    for full in state:
        key, _, name = full.partition(".")
        if name:
            keys.setdefault(name, []).append(key)
    return keys


def as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    return torch.tensor(value, dtype=next(dtype for dtype, kind in NUMBERS.items() if type(value) is kind))


def scalar_as_it_was(value: Tensor, device: torch.device) -> Tensor | int | float:
    return value.item() if value.dtype in NUMBERS else value.to(device, copy=True)


def _as_it_was(value: Tensor, parameter: Tensor) -> Tensor | int | float:
    if not value.ndim:
        return scalar_as_it_was(value, parameter.device)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    # in the parameter's memory format: fused kernels walk both as they lie in memory
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
