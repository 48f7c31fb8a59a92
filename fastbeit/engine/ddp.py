"""One process, or DistributedDataParallel over several."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.engine.loss_scale import LossScale
from fastbeit.engine.optimizer_state import read_state, write_state
from fastbeit.engine.ranks import World
from fastbeit.engine.update import clip_and_step


class TorchEngine:
    """One process, or DistributedDataParallel over several."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, dtype: torch.dtype, clip_grad: float
    ) -> None:
        self.model, self.optimizer, self.world, self.clip_grad = model, optimizer, world, clip_grad
        self.configuration: dict[str, Any] | None = None
        self.autocast = nullcontext() if dtype == torch.float32 else torch.autocast(world.device.type, dtype=dtype)
        self.scale = LossScale(world.device) if dtype == torch.float16 else None
        self.ddp = None
        if world.host_group is not None:
            devices = [world.device] if world.device.type == "cuda" else None
            self.ddp = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, ...]:
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = is_last
        with self.autocast:
            loss_sum, *others = (self.ddp or self.model)(*inputs)
        # DDP averages over ranks; the sum is wanted
        loss = loss_sum * (self.world.size / count)
        (loss * self.scale.value if self.scale else loss).backward()
        return loss_sum.detach(), *others

    def step(self) -> Tensor:
        return clip_and_step(self.optimizer, self.clip_grad, self.scale)

    @property
    def overflowed(self) -> Tensor | None:
        return self.scale.overflowed if self.scale else None

    def optimizer_state(self) -> dict[str, Tensor]:
        return read_state(self.model, self.optimizer) | (self.scale.state() if self.scale else {})

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        write_state(self.model, self.optimizer, state)
        if self.scale:
            self.scale.load(state)
