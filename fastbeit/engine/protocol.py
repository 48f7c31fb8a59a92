"""What an engine is: it runs the model, adds gradients over ranks and updates the weights; `make_engine` chooses one.

The loss that is minimised is the sum over the global batch divided by its count (of masked patches, in pre-training),
whatever the ranks and micro-batches: each rank divides its sum by the global count, and gradients are added.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.ddp import TorchEngine
from fastbeit.engine.ranks import World
from fastbeit.engine.sharded import shares_weights
from fastbeit.engine.streamed import Tensors
from fastbeit.engine.zero import DeepSpeedEngine


class Engine(Protocol):
    """Calls the model, adds its gradients over ranks, updates its weights."""

    configuration: dict[str, Any] | None  # what DeepSpeed was given, where it is DeepSpeed

    @property
    def overflowed(self) -> Tensor | None:
        """Whether the last step may have been skipped for a loss scale that was too large, and is halved since: it says
        nothing of the training yet. A bool scalar on the device; None: there is no loss scale."""
        ...

    def accumulate(self, inputs: tuple, count: Tensor, is_last: bool) -> tuple[Tensor, ...]:
        """Run `model(*inputs)` forward and backward on one micro-batch.

        Args:
            count: what the sum of losses is divided by, over ranks and micro-batches of the whole step (in pre-training
                its labelled slots); a scalar on the device, at least 1.
            is_last: the step's last micro-batch, after which gradients travel.

        Returns:
            What the model returns, detached: this rank's sums, the loss first.
        """
        ...

    def step(self) -> Tensor:
        """Clip, update, clear.

        Returns:
            The gradient's norm before clipping, a scalar on the device; not finite where nothing was updated.
        """
        ...

    def optimizer_state(self) -> Tensors:
        """What the optimizer remembers of each parameter, by its key and the parameter's name, and the loss scale if
        there is one: not copied, or read when it is asked for. All ranks must call it."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None: ...


def make_engine(
    settings: EngineConfig,
    optim: OptimConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    accumulate: int = 1,
) -> Engine:
    """The engine that `settings.name` asks for; the model already holds the weights to start from.

    Args:
        accumulate: micro-batches a step.
    """
    dtype = compute_dtype(settings, world.device)
    if compiles(settings, world.device):
        # block by block, where the model has blocks: on an H100 the step takes 0.6 % longer than as one graph (94.1
        # and 93.6 ms), and compiles in a third of the time
        getattr(model, "compile_blocks", lambda: None)()
        # Dynamo would cut a block in two where one of DDP's buckets of gradients ends
        torch._dynamo.config.optimize_ddp = False
    if settings.name == "deepspeed":
        return DeepSpeedEngine(settings, optim, accumulate, model, optimizer, world, dtype)
    return TorchEngine(model, optimizer, world, dtype, optim.clip_grad)


def _best_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """What a card's matrix units compute fastest in."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability >= (8, 0):
        return torch.bfloat16
    # Volta and Turing have no bfloat16 in them, and older cards no such units; DeepSpeed's float16 was not tried
    return torch.float16 if capability >= (7, 0) and engine.name != "deepspeed" else torch.float32


def compiles(settings: EngineConfig, device: torch.device) -> bool:
    # ZeRO-3's hooks, which gather a block's weights, cannot be part of its graph
    is_wanted = settings.compile == "auto" and device.type == "cuda" and not shares_weights(settings)
    return settings.compile == "on" or is_wanted


def compiled_before() -> str:
    """Whether what this process compiled came out of the compiler's cache, in words; empty where nothing was."""
    counts = torch._dynamo.utils.counters["inductor"]
    hits, misses = counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]
    if not hits + misses:
        return ""
    return f"; {'a cold' if misses else 'a warm'} start, {hits} of {hits + misses} graphs were compiled before"


def compute_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """Of activations: what `engine.precision` means on this device."""
    if engine.precision == "auto":
        return _best_dtype(engine, device) if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[engine.precision]
