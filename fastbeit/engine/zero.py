"""DeepSpeed ZeRO, stages 0 to 3."""

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine import zero_state
from fastbeit.engine.deepspeed_config import deepspeed_config, merged, read_theirs, zero_section
from fastbeit.engine.optimizer_state import read_state, write_state
from fastbeit.engine.ranks import TIMEOUT, World
from fastbeit.engine.sharded import count_weights, shares_weights
from fastbeit.engine.streamed import Tensors
from fastbeit.engine.update import clip_and_step
from fastbeit.errors import USAGE, ConfigError, RunError

# before it a step with infinite gradients was taken, as fastbeit has weights in float32; before 0.19.4 gradients were
# wrong without a word: its issues 7718, 8224, 7985, 7839
FLOOR = (0, 19, 8)


class DeepSpeedEngine:
    """Ranks share out fp32 weights and moments (stage 1), gradients too (2), weights too (3), or nothing (0)."""

    overflowed = None  # there is no loss scale

    def __init__(
        self,
        settings: EngineConfig,
        optim: OptimConfig,
        accumulate: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        deepspeed = import_deepspeed(world.device)
        self.model, self.world, self.clip_grad = model, world, optim.clip_grad
        self.client, self.is_shared = optimizer, settings.zero_stage > 0
        self.configuration: dict[str, Any] | None = deepspeed_config(
            settings,
            optim,
            accumulate=accumulate,
            num_ranks=world.size,
            dtype=dtype,
            num_weights=count_weights(model),
            on_cuda=world.device.type == "cuda",
            theirs=_theirs(settings, world),
        )
        for parameter in model.parameters():
            # DeepSpeed views weights as they lie in memory, which for a tokenizer's is channels last
            if not parameter.is_contiguous() or parameter.stride(-1) != 1:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        try:
            self.engine, wrapped, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.configuration
            )
        except (ValidationError, deepspeed.DeepSpeedConfigError, AssertionError) as err:
            raise ConfigError(f"DeepSpeed refuses its configuration, with engine.deepspeed_config: {err}") from err
        self.optimizer: Any = wrapped  # DeepSpeed's own around it, whose attributes it does not declare
        if self.is_shared:
            zero_state.begin(self.optimizer)

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, ...]:
        loss_sum, *others = self.engine(*inputs)
        # DeepSpeed averages over ranks; the sum is wanted
        self.engine.backward(loss_sum * (self.world.size / count), scale_wrt_gas=False)
        if not is_last:
            # DeepSpeed counts micro-batches by calls of step(); only that after the last one updates
            self.engine.step()
        return loss_sum.detach(), *others

    def step(self) -> Tensor:
        if self.is_shared:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)
        # the gradients are whole; DeepSpeed's own step would neither skip what is not finite nor say its norm
        norm = clip_and_step(self.client, self.clip_grad)
        self.engine.micro_steps += 1
        self.engine.global_steps += 1
        return norm

    def optimizer_state(self) -> Tensors:
        if not self.is_shared:
            return read_state(self.model, self.client)
        return zero_state.read_shared_state(self.model, self.optimizer)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if not self.is_shared:
            write_state(self.model, self.client, state)
            return
        zero_state.write_shared_state(self.model, self.optimizer, state, self.world.rank)


def building(settings: EngineConfig, world: World) -> AbstractContextManager[Any]:
    """Where a model is made: under ZeRO-3 each module's parameters are shared out as soon as it is there."""
    if not shares_weights(settings):
        return contextlib.nullcontext()
    deepspeed = import_deepspeed(world.device)
    # told by a configuration: where its argument `dtype` is used, DeepSpeed 0.19.8 takes 16 bits all the same
    batch = {"train_batch_size": world.size, "train_micro_batch_size_per_gpu": 1}
    zero = {"zero_optimization": zero_section(settings, on_cuda=world.device.type == "cuda")}
    return deepspeed.zero.Init(config_dict_or_path=batch | merged(zero, _theirs(settings, world)))


def check_deepspeed(settings: EngineConfig, world: World) -> None:
    """What would be refused when the engine is made is refused at the start; all ranks must call it.

    Raises:
        RunError: no DeepSpeed, or one that is too old (2).
        ConfigError: what `engine.deepspeed_config` adds cannot be taken; on all ranks.
    """
    if settings.name == "deepspeed":
        import_deepspeed(world.device)
        _theirs(settings, world)


def _theirs(settings: EngineConfig, world: World) -> dict[str, Any]:
    """What rank 0 reads, on all ranks: the file need not be on every machine."""
    return world.from_first(lambda: read_theirs(settings.deepspeed_config))


def import_deepspeed(device: torch.device) -> Any:
    """
    Raises:
        RunError: DeepSpeed is missing, or older than `FLOOR`.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # of the groups of ranks that it makes itself, in minutes
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(TIMEOUT // timedelta(minutes=1)))
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as err:
        raise RunError(
            f"engine.name=deepspeed wants the deepspeed package ({err}); pip install deepspeed", USAGE
        ) from err
    found = tuple(int(number) for number in re.findall(r"\d+", deepspeed.__version__)[:3])
    if found < FLOOR:
        wanted = ".".join(map(str, FLOOR))
        raise RunError(
            f"engine.name=deepspeed wants DeepSpeed {wanted} or newer, found {deepspeed.__version__}: older ones "
            "compute wrong gradients, or take steps that should be skipped; pip install --upgrade deepspeed",
            USAGE,
        )
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has replaced
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if device.type == "cpu":
        # its shared-memory collectives are compiled on first use, and a compile that was killed leaves a lock on which
        # every later run waits for ever without a word; gloo needs no compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
