"""DeepSpeed's configuration: made from ours, in one place, with what a user adds to it."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import torch

from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.zero_sizes import bucket_sizes
from fastbeit.errors import ConfigError

MAX_JSON_BYTES = 1 << 20
# of which ranks exchange weights and gradients in the precision of activations; DeepSpeed's own choice
TRAVEL_IN_16_BITS = ["torch.nn.Linear", "torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d"]
NEVER = 1 << 31  # steps

# What fastbeit decides, by where it is decided.
DECIDED = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.batch_size and optim.accumulate",
    "gradient_accumulation_steps": "optim.accumulate",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim.name",
    "scheduler": "optim.warmup_steps and optim.min_lr",
    "torch_autocast": "engine.precision",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "communication_data_type": "engine.precision",
    "data_types": "engine.precision",
    "zero_force_ds_cpu_optimizer": "optim.name",
    "zero_allow_untested_optimizer": "optim.name",
    "compile": "engine.compile",
    "checkpoint": "log.save_every; checkpoints have one format for all engines",
    "activation_checkpointing": "engine.checkpoint_blocks, which is not reentrant; DeepSpeed's is, and fails under "
    "ZeRO-2 and ZeRO-3 where blocks share a bias",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
}
# What a user may set besides: how ranks talk, how large buffers are, what DeepSpeed says. Nothing that changes what a
# step computes, but for the order of sums, or how its state is shared out.
FREE = {
    "": {
        "zero_optimization": dict,
        "comms_logger": dict,
        "dump_state": bool,
        "flops_profiler": dict,
        "memory_breakdown": bool,
        "wall_clock_breakdown": bool,
    },
    "zero_optimization": {
        "allgather_bucket_size": int,
        "allgather_partitions": bool,
        "contiguous_gradients": bool,
        "enable_sanity_checks": bool,
        "log_trace_cache_warnings": bool,
        "offload_optimizer": dict,
        "offload_param": dict,
        "overlap_comm": bool,
        "reduce_bucket_size": int,
        "reduce_scatter": bool,
        "round_robin_gradients": bool,
        "stage3_allgather_sequential": bool,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_model_persistence_threshold": int,
        "stage3_module_granularity_threshold": int,
        "stage3_param_persistence_threshold": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "sub_group_size": int,
        "use_multi_rank_bucket_allreduce": bool,
    },
    "comms_logger": {"debug": bool, "enabled": bool, "prof_all": bool, "verbose": bool},
    "flops_profiler": {
        "detailed": bool,
        "enabled": bool,
        "output_file": str,
        "profile_step": int,
        "top_modules": int,
    },
    "zero_optimization.offload_optimizer": {"pin_memory": bool},
    "zero_optimization.offload_param": {"pin_memory": bool},
}


def deepspeed_config(
    settings: EngineConfig,
    optim: OptimConfig,
    *,
    accumulate: int,
    num_ranks: int,
    dtype: torch.dtype,
    num_weights: int,
    on_cuda: bool,
    theirs: dict[str, Any],
) -> dict[str, Any]:
    """What DeepSpeed is given.

    What its defaults decide otherwise is always written: it has clipped at 1.0 of its own since 0.19.3, and refuses
    PyTorch's AdamW where it offloads.

    Args:
        accumulate: micro-batches a step.
        dtype: of activations.
        num_weights: parameters of the model; no buffer need be larger.
        theirs: as `read_theirs` gives it.
    """
    ours = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.batch_size // accumulate // num_ranks,
        "gradient_accumulation_steps": accumulate,
        # of stage 0 fastbeit clips, and skips what is not finite; 0: DeepSpeed does not
        "gradient_clipping": optim.clip_grad if settings.zero_stage else 0.0,
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": TRAVEL_IN_16_BITS,
        },
        # off: weights are float32, and activations autocast's. ZeRO then looks at the norm of float32 gradients, and
        # skips a step in which it is not finite
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_optimization": zero_section(settings, on_cuda) | bucket_sizes(num_weights, settings.zero_stage),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
    }
    return merged(ours, theirs)


def zero_section(settings: EngineConfig, on_cuda: bool) -> dict[str, Any]:
    """What is shared out, and where it lies."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": on_cuda, "contiguous_gradients": True}
    # its own linear layers are for tensors that autograd would keep; ours keep parameters, which it gathers again
    zero["memory_efficient_linear"] = False
    host = {"device": "cpu", "pin_memory": on_cuda}
    if settings.offload != "none":
        zero["offload_optimizer"] = dict(host)
    if settings.offload == "weights":
        zero["offload_param"] = dict(host)
    return zero


def read_theirs(path: str) -> dict[str, Any]:
    """What a user adds, in the file `engine.deepspeed_config`; nothing where there is none.

    Raises:
        ConfigError: it is no JSON object, or has keys that fastbeit decides or does not know.
    """
    if not path:
        return {}
    wanted = "wanted a JSON file with one object"
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        found = json.loads(text, object_pairs_hook=_once)
    except OSError as err:
        raise ConfigError(f"engine.deepspeed_config: '{path}': {err.strerror or err}; {wanted}") from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"engine.deepspeed_config: '{path}' is no JSON ({err}); {wanted}") from err
    if not isinstance(found, dict):
        raise ConfigError(f"engine.deepspeed_config: '{path}' holds a {type(found).__name__}; {wanted}")
    wrong = list(_problems(found, ""))
    if wrong:
        raise ConfigError("\n".join(f"engine.deepspeed_config: '{path}': {line}" for line in wrong))
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"'{twice}' is given twice")
    return dict(pairs)


def _problems(found: dict[str, Any], place: str):
    """A line for each key that cannot be taken."""
    free = FREE[place]
    for name, value in found.items():
        key = f"{place}.{name}" if place else name
        if key in DECIDED:
            yield f"{key} is decided by {DECIDED[key]}; leave it out"
        elif name not in free:
            near = difflib.get_close_matches(name, [*free, *(k.rpartition(".")[2] for k in DECIDED)], 1)
            known = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(free))}"
            yield f"{key} is not a key that fastbeit passes on to DeepSpeed; {known}"
        elif not _is_a(value, kind := free[name]):
            yield f"{key} wants {_KINDS[kind]}; got {json.dumps(value)[:80]}"
        elif kind is dict:
            yield from _problems(value, key)


_KINDS = {dict: "an object", str: "a text", bool: "true or false", int: "a whole number from 0 on"}


def _is_a(value: Any, kind: type) -> bool:
    if kind is int:
        # DeepSpeed's own files write 5e8
        return type(value) in (int, float) and math.isfinite(value) and value >= 0 and value == int(value)
    return type(value) is kind


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Their values in ours; objects are merged key by key."""
    both = dict(ours)
    for key, value in theirs.items():
        is_section = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if is_section else value
    return both
