"""Each fused operator by each of its implementations, against float64, at a run's shapes."""

from typing import Any, get_args

import torch

from fastbeit.config.pretrain import Config
from fastbeit.config.running import AttentionBackend
from fastbeit.engine.protocol import compute_dtype
from fastbeit.health.finding import Finding
from fastbeit.health.packages import HOW_TO_GET, is_there
from fastbeit.model.attention import check_attention
from fastbeit.model.trials import trials_of, tried
from fastbeit_kernels.backend import HAS_TRITON
from fastbeit_kernels.relative_attention import refusal

OPERATORS = ("masked_embed", "loss", "masks")
GRID, SMALL_WORDS = (3, 3), 64  # patches, and visual words, that the interpreter gets: seconds, not minutes

Pair = tuple[str, str]  # operator and implementation


def pairs_of(config: Config) -> list[Pair]:
    """What is to be checked. Masks in plain PyTorch are the definition: there is nothing to compare them with."""
    backends = [one for one in get_args(AttentionBackend) if one != "auto"]
    pairs = [(op, backend) for op in OPERATORS for backend in ("triton", "reference")]
    pairs = [*pairs, *(("attention", backend) for backend in backends)]
    known = trials_of(config, 1, torch.device("cpu"), torch.float32)
    return [(op, backend) for op, backend in pairs if op in known and (op, backend) != ("masks", "reference")]


def operator(pair: Pair, config: Config, num_outputs: int, device: torch.device) -> Finding:
    """On CUDA compiled, in the run's dtype. Elsewhere kernels are interpreted, small and in float32: the interpreter of
    Triton 3.7.1 is wrong in bfloat16."""
    op, backend = pair
    if why := _unused(op, backend, config):
        return Finding(" ".join(pair), *why)
    interpreted = backend == "triton" and device.type != "cuda"
    dtype = torch.float32 if interpreted else compute_dtype(config.engine, device)
    if interpreted:
        config, num_outputs = smaller(config), min(num_outputs, SMALL_WORDS)
    elif op == "attention" and (why := _refused(backend, config, device, dtype)):
        return Finding(" ".join(pair), "wrong", why=why, fix="take kernels.attention=auto")
    verdict = tried(trials_of(config, num_outputs, device, dtype)[op], backend, dtype)
    how = f"{'interpreted, small, ' if interpreted else ''}{str(dtype).removeprefix('torch.')}"
    if verdict.wrong:
        fix = f"kernels.{op}={'sdpa' if op == 'attention' else 'reference'}, which auto takes by itself on a card"
        return Finding(" ".join(pair), "wrong", how, verdict.wrong, fix)
    worst = f"worst relative error {verdict.error:.1e} ({verdict.where})" if verdict.error else "equal"
    return Finding(" ".join(pair), "runs", how, worst)


def _unused(op: str, backend: str, config: Config) -> tuple[Any, ...] | None:
    if backend == "xformers" and not is_there("xformers"):
        return "absent", "", "xformers is not installed", HOW_TO_GET["xformers"]
    if backend != "triton":
        return None
    if not HAS_TRITON:
        return "absent", "", "triton is not installed", HOW_TO_GET["triton"]
    head_width = config.model.width // config.model.num_heads
    if op == "attention" and (why := refusal(config.num_patches + 1, head_width)):
        return "unused", "", f"it takes {why}", "another attention serves; auto takes sdpa"
    return None


def _refused(backend: Any, config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    model = config.model
    return check_attention(
        backend, device, dtype, config.num_patches + 1, model.num_heads, model.width // model.num_heads
    )


def smaller(config: Config) -> Config:
    """The same with a few patches and two heads, of the same width each."""
    model, (height, width) = config.model, config.model.patch_size
    heads = min(2, model.num_heads)
    small = model.model_copy(update=dict(width=model.width // model.num_heads * heads, num_heads=heads))
    data = config.data.model_copy(update=dict(image_size=(height * GRID[0], width * GRID[1])))
    num_masked = min(config.num_masked, GRID[0] * GRID[1] // 2)
    min_block = min(config.masking.min_block_of(config.num_patches), num_masked)
    masking = config.masking.model_copy(update=dict(num_masked=num_masked, ratio=None, min_block=min_block))
    return config.model_copy(update=dict(model=small, data=data, masking=masking))
