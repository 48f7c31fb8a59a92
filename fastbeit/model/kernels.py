"""Which implementation of each fused operator a run takes: as set, as before, as tuned, or what runs on its device.

In this order: what the configuration names; what the checkpoint that is gone on from was computed with, so that a
resumed run gives the same bits; what `fastbeit doctor --tune` found to be fastest here (`tuned.py`); Triton on CUDA.
Each kernel is tried once, at the model's widths, forward and backward, against float64 (`trials.py`). What a card
refuses (too little shared memory, a compiler that fails), and what is wrong there, is replaced by plain PyTorch and
said; what the configuration asks for by name and does not run ends the run before it begins.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from fastbeit.config.finetune import FinetuneConfig, VitConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.running import AttentionBackend, Kernels, KernelsConfig
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.model.attention import attention_choice, check_attention
from fastbeit.model.trials import Results, trials_of, tried
from fastbeit.model.tuned import device_name, key_of, look_up, table_path
from fastbeit_kernels.backend import HAS_TRITON, Backend, check_backend, uses_triton

C = TypeVar("C", Config, FinetuneConfig)
OLDEST = (8, 0)  # Ampere: older cards have no bfloat16 in their matrix units, and nothing was tried on one
TRIED = "triton", "xformers"  # PyTorch's own are what they are judged by


@dataclass(frozen=True)
class Before:
    """What a checkpoint says of the kernels that it was computed with."""

    name: str  # of the checkpoint
    kept: dict[str, Any] | None  # `Chosen.kept`; None: it is of an earlier version


@dataclass(frozen=True)
class Chosen(Generic[C]):
    """The implementations of a run."""

    config: C  # with each of them named
    lines: list[str]  # for the log: what was chosen, and why
    kept: dict[str, Any]  # for checkpoints


def chosen_kernels(config: C, num_outputs: int, world: World, before: Before | None = None) -> Chosen[C]:
    """Choose, alike on all ranks; all of them must call it.

    Args:
        before: of the checkpoint that is gone on from, if any; that of rank 0 counts.

    Raises:
        ConfigError: what is set does not run; on all ranks.
    """
    wishes, lines = _wishes(config, num_outputs, world, before)
    while True:
        wished = config.model_copy(update={"kernels": config.kernels.model_copy(update=wishes)})
        refused = _refused_anywhere(wished, config, num_outputs, world)
        unfit = sorted(refused.keys() & wishes.keys())
        if not unfit:
            break
        # what was chosen elsewhere or before is no reason to end: as if it had not been
        lines += [f"{op}: {wishes[op]} is not taken, because here it does not serve: {refused[op]}" for op in unfit]
        wishes = {name: choice for name, choice in wishes.items() if name not in unfit}
    kernels, why = _with_fallbacks(wished, world.device, refused)
    found = config.model_copy(update={"kernels": KernelsConfig(**asdict(kernels))})
    kept = {"device": device_name(world.device), "choices": asdict(kernels), "why": [*why, *lines]}
    return Chosen(found, [_line(kernels), *why, *lines], kept)


def _wishes(
    config: VitConfig, num_outputs: int, world: World, before: Before | None
) -> tuple[dict[str, Any], list[str]]:
    """What to take where the configuration names nothing, by setting of `kernels`; and lines that say whence."""
    told = _told(config, num_outputs, world, before) if world.rank == 0 else None
    choices, why = world.first(told)
    given = config.kernels.by_op
    free = {name for name, one in asdict(given).items() if one in ("auto", None)}
    return {name: choice for name, choice in choices.items() if name in free and choice is not None}, why


def _told(config: VitConfig, num_outputs: int, world: World, before: Before | None) -> tuple[dict[str, Any], list[str]]:
    device, kept, lines = device_name(world.device), before.kept if before else None, []
    if before and kept:
        if kept["device"] == device:
            set_now = asdict(config.kernels.by_op).items()
            others = [
                f"; {name} was {kept['choices'].get(name)}, and is set to {one}"
                for name, one in set_now
                if one not in ("auto", None, kept["choices"].get(name))
            ]
            return kept["choices"], [f"kernels: as {before.name} was computed{''.join(others)}"]
        lines = [f"kernels: chosen anew, for {before.name} was computed on {kept['device']}, this is {device}"]
    found = look_up(table_path(), key_of(config, num_outputs, world.size, world.device))
    if found.choices:
        chosen = ", ".join(f"{name} {choice or 'as it is'}" for name, choice in found.choices.items())
        return found.choices, [*lines, f"kernels: {chosen}, where nothing is set ({found.why})"]
    hint = "; `fastbeit doctor --tune`, with this configuration, finds what is fastest"
    return {}, lines + [f"kernels: {found.why}{hint}"] * (world.device.type == "cuda")


def _refused_anywhere(wished: VitConfig, config: VitConfig, num_outputs: int, world: World) -> dict[str, str]:
    """Why an operator does not run, on the first rank where it does not.

    Raises:
        ConfigError: it is set in `config`.
    """
    wanted = config.kernels.by_op.implementations
    dtype = compute_dtype(config.engine, world.device)
    refused = _refusals(wished, wished.kernels.by_op, num_outputs, world.device, dtype)
    first = {op: why for told in world.gather([refused]) for op, why in told.items()}
    for op, why in first.items():
        if wanted[op] != "auto":
            key = op if getattr(config.kernels, op) else "backend"
            raise ConfigError(f"kernels.{key}={wanted[op]}: {why}")
    return first


def _with_fallbacks(wished: VitConfig, device: torch.device, refused: dict[str, str]) -> tuple[Kernels, list[str]]:
    """Each implementation by name, and why it is not the one that was wanted."""
    wanted = wished.kernels.by_op
    attention, reason = _chosen_attention(wished, device)
    names: dict[str, Any] = {op: _name(one, device) for op, one in wanted.implementations.items() if op != "attention"}
    names["attention"] = attention
    lines = [f"attention: {attention} ({reason})"] if wanted.attention == "auto" and "attention" not in refused else []
    for op, why in refused.items():
        names[op] = "sdpa" if op == "attention" else "reference"
        lines.append(f"{op}: {names[op]}, because triton does not serve: {why}")
    return Kernels(**names, **wanted.portions), lines


def _name(backend: Backend, device: torch.device) -> str:
    return "triton" if uses_triton(backend, device) and HAS_TRITON else "reference"


def _line(kernels: Kernels) -> str:
    portions = {name: number for name, number in kernels.portions.items() if number}
    return "kernels: " + ", ".join(f"{op} {name}" for op, name in (kernels.implementations | portions).items())


def _refusals(
    config: VitConfig, wanted: Kernels, num_outputs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Why an operator does not run as wanted, by its name."""
    refused = {}
    for op, backend in wanted.implementations.items():
        try:
            if op == "attention":
                refused |= _attention_refusal(config, wanted.attention, device, dtype)
            else:
                check_backend(getattr(wanted, op), device)
        except (ValueError, ModuleNotFoundError) as err:
            if backend != "auto":
                refused[op] = str(err)
    if not _tries(device):
        return refused
    too_old = not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST
    wanted = replace(wanted, attention=_chosen_attention(config, device)[0])
    for kind in dict.fromkeys((dtype, torch.float32)):  # a validation computes in float32
        for op, trial in trials_of(config, num_outputs, device, kind).items():
            how = getattr(wanted, op).replace("auto", "triton")
            if how in TRIED and op not in refused:
                why = tried(_too_old if too_old and how == "triton" else trial, how, kind).wrong
                refused |= {op: why} if why else {}
    return refused


def _tries(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


def _chosen_attention(config: VitConfig, device: torch.device) -> tuple[AttentionBackend, str]:
    model, has_bias = config.model, config.model.relative_position != "none"
    shape = config.num_patches + 1, model.width // model.num_heads
    return attention_choice(config.kernels.by_op.attention, device, *shape, has_bias)


def _attention_refusal(
    config: VitConfig, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    if backend == "auto":
        return {}
    model = config.model
    why = check_attention(
        backend, device, dtype, config.num_patches + 1, model.num_heads, model.width // model.num_heads
    )
    return {"attention": why} if why else {}


def _too_old(how: str) -> Results:
    raise RuntimeError(f"it is for cards of compute capability {OLDEST[0]}.{OLDEST[1]} and newer")
