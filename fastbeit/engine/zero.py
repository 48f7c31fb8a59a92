"""DeepSpeed ZeRO."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.config.sections import EngineConfig, OptimConfig
from fastbeit.engine.optimizer_state import MOMENTS
from fastbeit.engine.ranks import World
from fastbeit.errors import USAGE, RunError


class DeepSpeedEngine:
    """DeepSpeed ZeRO-1: each rank keeps and updates its share of the fp32 weights and moments."""

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
        if world.host_group is None:
            raise RunError(
                "engine.name=deepspeed wants the launcher: deepspeed --num_gpus N --module fastbeit pretrain ...", USAGE
            )
        deepspeed = _import_deepspeed(world.device)
        self.model, self.world = model, world
        self.engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(settings, optim, accumulate, world, dtype)
        )
        self.optimizer: Any = wrapped  # a ZeRO optimizer, whose attributes DeepSpeed does not declare

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, ...]:
        loss_sum, *others = self.engine(*inputs)
        # DeepSpeed averages over ranks; the sum is wanted
        self.engine.backward(loss_sum * (self.world.size / count), scale_wrt_gas=False)
        if not is_last:
            # DeepSpeed counts micro-batches by calls of step(); only that after the last one updates
            self.engine.step()
        return loss_sum.detach(), *others

    def step(self) -> Tensor:
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        step = self._partitions()[0]["step"]
        state = {}
        for name, parameter in self.model.named_parameters():
            state[f"step.{name}"] = step.cpu().clone()
            for key in MOMENTS:
                moment: Any = safe_get_full_optimizer_state(parameter, key)
                state[f"{key}.{name}"] = moment.cpu()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        step = next(value for key, value in state.items() if key.startswith("step."))
        for partition in self.optimizer.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            self.optimizer.optimizer.state[partition] = {"step": step.to(partition.device, copy=True), **moments}
        self._link_moments()
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                value = state[f"{key}.{name}"].to(self.world.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _partitions(self) -> list[dict[str, Tensor]]:
        return [self.optimizer.optimizer.state[p] for p in self.optimizer.single_partition_of_fp32_groups]

    def _link_moments(self) -> None:
        # DeepSpeed 0.19.8 links moments to parameters inside the first group's step, when the second group has none yet
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as err:
        raise RunError(
            f"engine.name=deepspeed wants the deepspeed package ({err}); pip install deepspeed", USAGE
        ) from err
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has replaced
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if device.type == "cpu":
        # its shared-memory collectives are compiled on first use, and a compile that was killed leaves a lock on which
        # every later run waits for ever without a word; gloo needs no compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _deepspeed_config(
    settings: EngineConfig, optim: OptimConfig, accumulate: int, world: World, dtype: torch.dtype
) -> dict:
    # made from checked fields alone: DeepSpeed ignores top-level keys that it does not know
    return {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.batch_size // accumulate // world.size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": {"stage": settings.zero_stage},
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": 1 << 31,
    }
