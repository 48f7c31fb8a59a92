"""Ranks: the only file that knows there may be several of them, and who takes the optimizer step (design D9, D10).

The loss that is minimised is the mean over all masked patches of the global batch, whatever the ranks and
micro-batches: each rank divides its sum by the global count, and gradients are added, not averaged.
"""

import os
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbeit.config.sections import Config, EngineConfig
from fastbeit.cores import num_cores
from fastbeit.errors import USAGE, RunError
from fastbeit.train.optim import MOMENTS, clip_and_step, read_moments, write_moments


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

    def barrier(self) -> None:
        self.sum([0])

    def leave(self) -> None:
        """The last thing a rank does that ended well."""
        if self.host_group is not None:
            dist.destroy_process_group()


def start_world(engine: EngineConfig) -> World:
    """Join the ranks that the `deepspeed` launcher or torchrun started; without a launcher there is one."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _LAUNCHER.items())
    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise RunError("engine.device=cuda, but PyTorch sees no CUDA device; set engine.device=cpu", USAGE)
    on_cuda = has_cuda and engine.device != "cpu"
    if engine.name == "single" and size > 1:
        raise RunError(f"engine.name=single runs on one rank, but {size} were started; set engine.name=ddp", USAGE)
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
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


_LAUNCHER = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


class Engine(Protocol):
    """Calls the model, adds its gradients over ranks, updates its weights."""

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """Run `model(*inputs)` forward and backward on one micro-batch.

        Args:
            count: what the sum of losses is divided by: labelled slots of the whole step, over ranks and micro-batches;
                a scalar on the device, at least 1.
            is_last: the step's last micro-batch, after which gradients travel.

        Returns:
            This rank's sum of losses and number of right predictions, scalars on the device, detached.
        """
        ...

    def step(self) -> Tensor:
        """Clip, update, clear.

        Returns:
            The gradient's norm before clipping, a scalar on the device; not finite where nothing was updated.
        """
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and step for each parameter by name, whole and on the host; all ranks must call it."""
        ...

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None: ...


def make_engine(config: Config, model: nn.Module, optimizer: torch.optim.AdamW, world: World) -> Engine:
    """The engine that `config.engine.name` asks for; the model already holds the weights to start from."""
    dtype = _compute_dtype(config.engine, world.device)
    if config.engine.compile:
        model.compile()
    if config.engine.name == "deepspeed":
        return DeepSpeedEngine(config, model, optimizer, world, dtype)
    return TorchEngine(config, model, optimizer, world, dtype)


def _compute_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if engine.precision == "bf16" else torch.float32


class TorchEngine:
    """One process, or DistributedDataParallel over several."""

    def __init__(
        self, config: Config, model: nn.Module, optimizer: torch.optim.AdamW, world: World, dtype: torch.dtype
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.clip_grad = config.optim.clip_grad
        self.autocast = torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)
        self.ddp = None
        if world.host_group is not None:
            devices = [world.device] if world.device.type == "cuda" else None
            self.ddp = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = is_last
        with self.autocast:
            loss_sum, num_correct = (self.ddp or self.model)(*inputs)
        # DDP averages over ranks; the sum is wanted
        (loss_sum * (self.world.size / count)).backward()
        return loss_sum.detach(), num_correct

    def step(self) -> Tensor:
        return clip_and_step(self.optimizer, self.clip_grad)

    def optimizer_state(self) -> dict[str, Tensor]:
        return read_moments(self.model, self.optimizer)

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        write_moments(self.model, self.optimizer, state)


class DeepSpeedEngine:
    """DeepSpeed ZeRO-1: each rank keeps and updates its share of the fp32 weights and moments."""

    def __init__(
        self, config: Config, model: nn.Module, optimizer: torch.optim.AdamW, world: World, dtype: torch.dtype
    ) -> None:
        if world.host_group is None:
            raise RunError(
                "engine.name=deepspeed wants the launcher: deepspeed --num_gpus N --module fastbeit pretrain ...", USAGE
            )
        deepspeed = _import_deepspeed(world.device)
        self.model, self.world = model, world
        self.engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(config, world, dtype)
        )
        self.optimizer: Any = wrapped  # a ZeRO optimizer, whose attributes DeepSpeed does not declare

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        loss_sum, num_correct = self.engine(*inputs)
        # DeepSpeed averages over ranks; the sum is wanted
        self.engine.backward(loss_sum * (self.world.size / count), scale_wrt_gas=False)
        if not is_last:
            # counts the micro-batch; only the last one's updates
            self.engine.step()
        return loss_sum.detach(), num_correct

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


def _deepspeed_config(config: Config, world: World, dtype: torch.dtype) -> dict:
    # made from checked fields alone: DeepSpeed ignores top-level keys that it does not know
    optim = config.optim
    return {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.batch_size // optim.accumulate // world.size,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": 1 << 31,
    }
