"""How many micro-batches a step takes: as few as the device has room for, alike on all ranks, tried before training."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.choices import row_of
from fastbeit.engine.memory import RESERVE, SMALL, Footprint, fewest
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World
from fastbeit.engine.sharded import part_of, shares_weights
from fastbeit.errors import RunError
from fastbeit.plural import counted

RECOMPUTE = "engine.checkpoint_blocks=true makes room, for a quarter more time"
MIB = 2**20


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a step before the first one."""

    footprint: Footprint
    inputs: Callable[[int], tuple[Tensor, ...]]  # of so many images, as a step's, on the device; nothing is drawn


@dataclass(frozen=True)
class Fit:
    """The micro-batches of a run's steps."""

    accumulate: int
    remedy: str  # when memory runs out all the same
    line: str = ""  # what was chosen and why; empty where nothing was
    figures: dict[str, float] = field(default_factory=dict)  # the same for the log
    kept: dict[str, Any] | None = None  # for the checkpoint: the choice, and what it hangs on


def fitting_accumulate(
    optim: OptimConfig,
    engine: EngineConfig,
    rehearsal: Rehearsal | None,
    model: nn.Module,
    world: World,
    kept: dict[str, Any] | None,
) -> Fit:
    """What `optim.accumulate` says; auto: 1 on a CPU, and on CUDA the least that fits; all ranks must call it.

    Args:
        rehearsal: None: the job takes no micro-batches.
        model: on the device, with no gradients; left as it was.
        kept: `Fit.kept` of the checkpoint that is gone on from, if any.

    Raises:
        RunError: the device has no room for one image; on all ranks.
    """
    images = optim.batch_size // world.size

    def fit(accumulate: int, **told: Any) -> Fit:
        return Fit(accumulate, remedy(images, accumulate, optim, engine, rehearsal is not None), **told)

    if optim.accumulate != "auto" or rehearsal is None or world.device.type != "cuda":
        return fit(1 if optim.accumulate == "auto" else optim.accumulate)
    basis = _basis(engine, world)
    changes = _changes(kept["basis"], basis) if kept else ""
    if kept and not changes:
        return fit(kept["accumulate"], kept=kept, line=f"{_chosen(images, kept['accumulate'])}, as before")
    torch.cuda.empty_cache()
    # an average of the weights is there already, and not in the room
    room, footprint = _room(model, world.device), replace(rehearsal.footprint, average=0)
    if shares_weights(engine):
        # a model whose weights are shared out runs under DeepSpeed alone, which counts the micro-batches
        accumulate = max(world.gather([fewest(images, footprint, room)]))
        line = (
            f"{_chosen(images, accumulate)}, by formula: {_gib(footprint.peak(images // accumulate))} of {_gib(room)}"
        )
        return fit(accumulate, line=line, kept={"accumulate": accumulate, "basis": basis})

    def try_step(num_images: int) -> int | None:
        return dry_step(model, rehearsal, num_images, compute_dtype(engine, world.device))

    accumulate, peak = search(images, footprint, room, try_step, world)
    if peak is None:
        raise RunError(
            f"CUDA is out of memory with one image: {_gib(room)} free, {_gib(footprint.static)} wanted for weights, "
            f"optimizer and batches alone; {_last_resort(optim, engine)}"
        )
    predicted = footprint.peak(images // accumulate)
    figures = {"accumulate": accumulate, "predicted_mib": predicted / MIB, "measured_mib": peak / MIB}
    line = (
        f"{_chosen(images, accumulate)}: the largest that fits into {_gib(room)}; peak predicted {_gib(predicted)}, "
        f"in a dry step {_gib(peak)}"
    )
    line += f"; chosen anew, for {changes}" if changes else ""
    line += f"; {RECOMPUTE}" if images // accumulate < min(SMALL, images) and not engine.checkpoint_blocks else ""
    return fit(accumulate, line=line, figures=figures, kept={"accumulate": accumulate, "basis": basis})


def search(
    images: int, footprint: Footprint, room: int, try_step: Callable[[int], int | None], world: World
) -> tuple[int, int | None]:
    """The least number of micro-batches that fits on all ranks, and the largest peak of their dry steps.

    Args:
        images: of a rank and step.
        room: bytes that this rank has for what `footprint` counts.
        try_step: gives the peak with so many images, or None where memory runs out.

    Returns:
        The peak is None where not even one image fits.
    """
    count = max(world.gather([fewest(images, footprint, room)]))
    while True:
        peaks = world.gather([try_step(images // count)])
        if None not in peaks:
            return count, max(peaks)
        if count == images:
            return count, None
        count = next_count(images, count)


def next_count(images: int, count: int) -> int:
    """The next number of micro-batches that divides the images, twice as many or more; at most one each."""
    return next(more for more in range(min(2 * count, images), images + 1) if images % more == 0)


def dry_step(model: nn.Module, rehearsal: Rehearsal, num_images: int, dtype: torch.dtype) -> int | None:
    """The peak of a forward and a backward in bytes, as a step in training has it; None: memory ran out.

    Gradients, and as much memory as optimizer and batches will take, are there from the start, as they are from the
    second micro-batch on. They are thrown away; weights and random state stay as they are. A model that training
    compiles runs as it is written, which takes more memory.
    """
    device = next(model.parameters()).device
    others = 0
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - bytes_on(device, model)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _forward_and_backward(model, rehearsal, num_images, dtype, device)
        # a failure of the device shows where it is waited for
        peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else 0
    except torch.OutOfMemoryError:
        peak = None
    if peak is None:
        gc.collect()  # the graph may hang in circles; the error, which holds it too, is gone by now
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def _forward_and_backward(
    model: nn.Module, rehearsal: Rehearsal, num_images: int, dtype: torch.dtype, device: torch.device
) -> None:
    # of optimizer and batches; bound to a name, it stays until the end
    absent = torch.empty(rehearsal.footprint.absent, dtype=torch.uint8, device=device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss_sum, *_ = model(*rehearsal.inputs(num_images))
    loss_sum.backward()
    del absent


@contextlib.contextmanager
def out_of_memory_in_one_line(remedy: str) -> Iterator[None]:
    """
    Raises:
        RunError: CUDA ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise RunError(f"CUDA is out of memory: {remedy} ({str(err).splitlines()[0]})") from err


def remedy(images: int, accumulate: int, optim: OptimConfig, engine: EngineConfig, in_micro_batches: bool) -> str:
    """What to change in a run whose steps ran out of memory."""
    if not in_micro_batches:
        return f"lower optim.batch_size, now {optim.batch_size}"
    if accumulate < images:
        return f"set optim.accumulate={next_count(images, accumulate)}, now {accumulate}"
    return _last_resort(optim, engine)


def _last_resort(optim: OptimConfig, engine: EngineConfig) -> str:
    more = "" if engine.checkpoint_blocks else f"; {RECOMPUTE}"
    return f"micro-batches have one image already, so lower optim.batch_size, now {optim.batch_size}{more}"


def _chosen(images: int, accumulate: int) -> str:
    parts, size = counted(accumulate, "micro-batch"), counted(images // accumulate, "image")
    return f"optim.accumulate=auto: {parts} a step of {size} a rank"


def _basis(engine: EngineConfig, world: World) -> dict[str, Any]:
    """What a choice hangs on beside settings that a run cannot change; alike on all ranks."""
    total = torch.cuda.get_device_properties(world.device).total_memory // MIB
    return {
        "card_mib": min(world.gather([total])),
        "num_ranks": world.size,
        "precision": str(compute_dtype(engine, world.device)).removeprefix("torch."),
        "deepspeed": engine.name == "deepspeed" and row_of(engine),
        "checkpoint_blocks": engine.checkpoint_blocks,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} was {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value
    )


def _room(model: nn.Module, device: torch.device) -> int:
    """Bytes for a step on the device: what is free, less the reserve, and what the model has there already."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused + bytes_on(device, model) - RESERVE * total)


def bytes_on(device: torch.device, model: nn.Module) -> int:
    """What a rank holds of the model on its device; weights that are offloaded lie in the host's memory."""
    held = (*map(part_of, model.parameters()), *model.buffers())
    return sum(tensor.nbytes for tensor in held if tensor.device.type == device.type)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
