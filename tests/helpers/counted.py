"""Memory of a training step, counted on tensors that have none: what autograd saves, and what is alive at once."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import PeakMemory
from fastbeit.config.pretrain import Config
from fastbeit.model.attention import BIAS_ALIGNMENT
from fastbeit.model.beit import Beit, make_beit


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


def count_step(config: Config, num_images: int, num_outputs: int, dtype: torch.dtype, monkeypatch: Any) -> Counted:
    """Of one micro-batch, in `dtype`; inputs and weights are not counted."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(Beit, "initialise", lambda self: None)
    model = make_beit(config, num_outputs)
    N, M = config.num_patches, config.num_slots
    with FakeTensorMode():
        _replace(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        images = torch.empty(num_images, *config.data.image_size, 3, dtype=torch.uint8)
        masked, slots = torch.empty(num_images, N, dtype=torch.bool), torch.empty(num_images, M, dtype=torch.int64)
        keep = torch.empty(num_images, config.model.depth, 2)
        given = [images, masked, slots, keep, *model.parameters(), *model.buffers()]
        with PeakOfStep() as memory:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_bytes(given) as saved:
                loss_sum, _ = model(images, masked, slots, slots, keep)
            loss_sum.backward()
    return Counted(saved[0], memory.peak)


def _replace(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))
