"""How much memory a computation takes: bytes of the tensors alive at once, seen inside ops too; what autograd saves.

Deterministic, on any device, and on tensors that have no memory (meta, FakeTensor); temporaries within a PyTorch
operation are not seen.

    python -m benchmarks.memory --plan CONFIG [--classes C] [--ranks N] [--cards GB ...]

says what optim.accumulate=auto would choose, with the engine that CONFIG asks for.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbeit.config.finetune import FinetuneConfig, VitConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.engine.memory import expected_room, fewest, footprint
from fastbeit.model.attention import BIAS_ALIGNMENT
from fastbeit.model.beit import make_beit
from fastbeit.model.classify import make_classifier
from fastbeit.model.vit import VisionTransformer
from fastbeit_kernels import backend

CARDS_GB = 24, 40, 80
VOCAB_SIZE, STRIDE = 8192, 8  # OpenAI's tokenizer: words, and pixels of its view a token


class InsideOps(TorchDispatchMode):
    """Looks inside an op of the kernels: its launcher runs as plain Python, so that each PyTorch call it makes is seen.

    Under FakeTensor, and to any other mode, an op is one opaque call.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name in OPDEFS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class PeakMemory(InsideOps):
    """Counts bytes that are allocated while it is on; `peak` is the most that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given:
                storage = t.untyped_storage()
                self.alive[_key(t)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.alive.values()))
        return out


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class FusedAttention(torch.autograd.Function):
    """What CUDA's efficient attention allocates and saves; a CPU has no fused one whose bias has a gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        B, H, S, K = q.shape
        out, log_sum = q.new_empty(B, S, H, K).transpose(1, 2), q.new_empty(B, H, S, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum, *([] if bias is None else [bias]))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, _, *bias = ctx.saved_tensors
        S = q.shape[2]
        padded = -(-S // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
        grad_bias = q.new_empty(*q.shape[:3], padded)[..., :S] if bias else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_bias


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Any:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        attn_mask = None if attn_mask is None else attn_mask.to(dtype)
    return FusedAttention.apply(q, k, v, attn_mask)


@contextlib.contextmanager
def saved_bytes(own: list[Tensor]) -> Iterator[list[int]]:
    """At the end of the context, the bytes of all storages that autograd saved in it, but those of `own`."""
    owned, kept, found = {tensor.untyped_storage()._cdata for tensor in own}, {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage  # alive, so that no other takes its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.append(sum(storage.nbytes() for storage in kept.values()))


class PeakOfStep(PeakMemory):
    """Without a look inside the embedding: Triton's interpreter wants tensors that have memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name.startswith("fastbeit::masked_embed"):
            return self.call(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class Counted:
    """Bytes: `saved` by a forward; `peak` of what a forward and a backward allocate."""

    saved: int
    peak: int


@contextlib.contextmanager
def without_memory(
    config: VitConfig, num_images: int, num_outputs: int
) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """A model, and inputs of its forward, of which nothing is computed; attention and kernels are those of CUDA."""
    with (
        patch.object(F, "scaled_dot_product_attention", fused_attention),
        # their ops say what comes out, and are not launched
        patch.object(backend, "INTERPRETED", True),
        patch.object(VisionTransformer, "initialise", lambda *args: None),
    ):
        is_pretraining = isinstance(config, Config)
        model = make_beit(config, num_outputs) if is_pretraining else make_classifier(config, num_outputs)
        with FakeTensorMode():
            _replace(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            inputs = _masked_images(config, num_images) if is_pretraining else _pixels(config, num_images)
            yield model, (*inputs, torch.empty(num_images, config.model.depth, 2))


def _masked_images(config: VitConfig, num_images: int) -> tuple[Tensor, ...]:
    images = torch.empty(num_images, *config.data.image_size, 3, dtype=torch.uint8)
    slots = torch.empty(num_images, config.num_slots, dtype=torch.int64)
    return images, torch.empty(num_images, config.num_patches, dtype=torch.bool), slots, slots


def _pixels(config: VitConfig, num_images: int) -> tuple[Tensor, ...]:
    """Normalised and mixed: of what is made for the step itself, unlike bytes."""
    labels = torch.empty(num_images, dtype=torch.int64)
    return torch.empty(num_images, *config.data.image_size, 3), labels, labels, torch.empty(num_images)


def count_step(config: VitConfig, num_images: int, num_outputs: int, dtype: torch.dtype) -> Counted:
    """Of one micro-batch, in `dtype`; inputs and weights are not counted."""
    with without_memory(config, num_images, num_outputs) as (model, inputs), PeakOfStep() as memory:
        given = [*inputs, *model.parameters(), *model.buffers()]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_bytes(given) as saved:
            loss_sum, _ = model(*inputs)
        loss_sum.backward()
    return Counted(saved[0], memory.peak)


def _replace(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


def plan(config: VitConfig, num_ranks: int, num_classes: int, cards_gb: Sequence[int] = CARDS_GB) -> str:
    """Micro-batches and peaks for bf16 on CUDA, one rank a card, in the lines of a config's header."""
    images = config.optim.batch_size // num_ranks
    down, across = config.grid
    outputs, view = (
        (VOCAB_SIZE, (down * STRIDE, across * STRIDE)) if isinstance(config, Config) else (num_classes, None)
    )
    found = footprint(config, num_outputs=outputs, token_size=view, num_ranks=num_ranks, itemsize=2)
    lines = [f"Memory, predicted for {num_ranks} rank(s) with {images} images each, a rank a card:"]
    for card in cards_gb:
        room = expected_room(card)
        count = fewest(images, found, room)
        peak = found.peak(images // count)
        fits = f"peak {peak / 2**30:.1f} GiB" if peak <= room else f"does not fit: {peak / 2**30:.1f} GiB"
        lines.append(f"  {card} GB: {count} micro-batch(es) of {images // count}, {fits}")
    if found.host:
        lines.append(f"  in the host's memory: {found.host / 2**30:.1f} GiB a rank; page-locked, up to twice as much")
    return "\n".join(f"# {line}" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Memory of a run, predicted.")
    parser.add_argument("--plan", required=True, metavar="CONFIG", help="as for `fastbeit pretrain` or `finetune`")
    parser.add_argument("--classes", type=int, metavar="C", help="that CONFIG fine-tunes to; else it pre-trains")
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="one a card (8)")
    parser.add_argument(
        "--cards", type=int, nargs="+", default=CARDS_GB, metavar="GB", help="memory of each (24 40 80)"
    )
    args = parser.parse_args(argv)
    config = load_config(args.plan, [], FinetuneConfig if args.classes else Config)
    print(plan(config, args.ranks, args.classes, args.cards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
