"""Self-attention with relative-position bias (section 2.2; the authors' code); letters as in vit.py."""

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbeit.config.running import AttentionBackend
from fastbeit.config.sections import Size
from fastbeit_kernels.backend import HAS_TRITON
from fastbeit_kernels.relative_attention import refusal, relative_attention, relative_attention_reference

# rows of the bias start at a multiple of 16 values, as fused attention wants them (197 -> 208)
BIAS_ALIGNMENT = 16


def take(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of x [B, S, D] at idx [B, M], distinct in an image: [B, M, D]."""
    return x.gather(1, idx[:, :, None].expand(-1, -1, x.shape[2]))


def relative_position_index(grid: Size) -> Tensor:
    """The row of the bias table for each pair of tokens.

    Returns:
        [S, S] int64, a row for each query. Between patches it is (dy + height - 1) * (2 * width - 1) + dx + width - 1,
        d = query - key; the table's last three rows are for cls to patch, patch to cls and cls to cls.
    """
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    num_offsets = (2 * height - 1) * (2 * width - 1)
    index = np.empty((len(y) + 1, len(y) + 1), dtype=np.int64)
    index[1:, 1:] = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    index[0, :], index[:, 0], index[0, 0] = num_offsets, num_offsets + 1, num_offsets + 2
    return torch.from_numpy(index)


def inverse_index(index: Tensor) -> Tensor:
    """Where each value of `index` stands.

    Args:
        index: any shape, values from 0 to R - 1, each at least once.

    Returns:
        [R, C] int64 places in the flattened index, C the count of the most frequent value; short rows end in numel().
    """
    values = index.flatten().numpy()
    counts = np.bincount(values)
    inverse = np.full((len(counts), counts.max()), values.size)
    # row-major order of the filled cells is that of the places sorted by value
    inverse[np.arange(counts.max()) < counts[:, None]] = np.argsort(values, kind="stable")
    return torch.from_numpy(inverse)


class GatherBias(torch.autograd.Function):
    """table [R, H], index [S, S], inverse [R, C] -> [H, S, S].

    The gradient is a gather and a sum: no atomics, always the same order.
    """

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = F.pad(grads[0].flatten(1), (0, 1))  # the zero that short rows of the inverse point at
        return grad.index_select(1, inverse.flatten()).unflatten(1, inverse.shape).sum(2).t(), None, None


def register_bias_table(module: nn.Module, grid: Size, num_heads: int) -> None:
    """Give `module` a zero table and its index under the authors' names."""
    index = relative_position_index(grid)
    module.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, num_heads))
    module.register_buffer("relative_position_index", index)
    module.register_buffer("relative_position_inverse", inverse_index(index), persistent=False)


def expand_bias_table(module: nn.Module) -> Tensor:
    """[H, S, S_pad] float32: the bias of each pair of tokens, rows padded with zeros to `BIAS_ALIGNMENT`."""
    bias = GatherBias.apply(
        module.relative_position_bias_table, module.relative_position_index, module.relative_position_inverse
    )
    return F.pad(bias, (0, -bias.shape[-1] % BIAS_ALIGNMENT))


class RelativePositionBias(nn.Module):
    """The table that all blocks share in pre-training, expanded once a step."""

    def __init__(self, grid: Size, num_heads: int) -> None:
        super().__init__()
        register_bias_table(self, grid, num_heads)

    def forward(self) -> Tensor:
        return expand_bias_table(self)


def attention_choice(
    backend: AttentionBackend, device: torch.device, num_tokens: int, head_width: int, has_bias: bool
) -> tuple[AttentionBackend, str]:
    """Which attention `backend` stands for, and why."""
    if backend != "auto":
        return backend, "as set"
    if not has_bias:
        return "sdpa", "there is no bias, which PyTorch's own is fastest for"
    if device.type != "cuda":
        return "sdpa", f"on {device.type}"
    if not HAS_TRITON:
        return "sdpa", "triton is not installed"
    if refused := refusal(num_tokens, head_width):
        return "sdpa", f"triton wants {refused}"
    return "triton", "on cuda"


def attend(qkv: Tensor, bias: Tensor | None, backend: AttentionBackend, workspace_mib: int | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v, of all heads.

    Args:
        qkv: [B, S, 3, H, K].
        bias: [H, S, S_pad] float32, or None.
        workspace_mib: of the backward of Triton's; None: its own choice.

    Returns:
        [B, S, D].
    """
    backend, _ = attention_choice(backend, qkv.device, qkv.shape[1], qkv.shape[4], bias is not None)
    if backend == "triton":
        workspace = None if workspace_mib is None else workspace_mib * 2**20
        return relative_attention(qkv, _no_bias(qkv) if bias is None else bias, workspace=workspace, backend="triton")
    if backend == "eager":
        return relative_attention_reference(qkv, _no_bias(qkv) if bias is None else bias)
    return _by_xformers(qkv, bias) if backend == "xformers" else _by_sdpa(qkv, bias)


def _no_bias(qkv: Tensor) -> Tensor:
    _, S, _, H, _ = qkv.shape
    return torch.zeros((), device=qkv.device).expand(H, S, S)


def _mask(qkv: Tensor, bias: Tensor | None) -> Tensor | None:
    """[B, H, S, S] of qkv's dtype.

    Of another dtype PyTorch's result is silently wrong (https://github.com/pytorch/pytorch/issues/191612). Cast before
    the slice, so that rows stay aligned; for B images, as the fused backward wants its gradient.
    """
    return None if bias is None else bias.to(qkv.dtype)[..., : qkv.shape[1]].expand(len(qkv), -1, -1, -1)


def _by_sdpa(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own. With a bias on CUDA it is held to one backend, the only fused one that has the bias's gradient.

    Left alone it takes cuDNN's in evaluation: then training and evaluation differ, and cuDNN gives NaN for a mask and
    S % 128 == 64 (https://github.com/pytorch/pytorch/issues/196678).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, K]
    held = bias is not None and qkv.device.type == "cuda"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if held else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(qkv, bias)).transpose(1, 2).flatten(2)


_outside_of_graphs: Any = torch.compiler.disable


@_outside_of_graphs
def _by_xformers(qkv: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)  # each [B, S, H, K]
    return memory_efficient_attention(q, k, v, attn_bias=_mask(qkv, bias)).flatten(2)


def check_attention(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_heads: int,
    head_width: int,
) -> str | None:
    """Why `backend` does not run at these shapes; None: it does. Found out by running it, forward and backward."""
    if backend == "xformers" and find_spec("xformers") is None:
        return "xformers is not installed; pip install xformers, of the release that goes with your PyTorch"
    qkv = torch.zeros(1, num_tokens, 3, num_heads, head_width, device=device, dtype=dtype, requires_grad=True)
    padding = -num_tokens % BIAS_ALIGNMENT
    bias = torch.zeros(num_heads, num_tokens, num_tokens + padding, device=device, requires_grad=True)
    try:
        attend(qkv, bias, backend).sum().backward()
    except Exception as err:  # whatever it is, it is said and the run does not begin
        hint = "; each release of xformers is for one of PyTorch: see `python -m xformers.info`"
        return " ".join(f"{type(err).__name__}: {err}".split()) + (hint if backend == "xformers" else "")
    return None


class QKV(nn.Module):
    """Queries, keys and values in one matrix product; rows of the weight: q, k, v, in each the heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention. Keys have no bias: the softmax would cancel it."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        table_grid: Size | None,
        backend: AttentionBackend,
        workspace_mib: int | None = None,
    ) -> None:
        """
        Args:
            table_grid: patches down and across for a bias table of this block's own; None: no such table.
            backend, workspace_mib: as in `attend`.
        """
        super().__init__()
        self.num_heads = num_heads
        self.backend: AttentionBackend = backend
        self.workspace_mib = workspace_mib
        self.has_table = table_grid is not None
        self.qkv = QKV(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if table_grid is not None:
            register_bias_table(self, table_grid, num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None, slots: Tensor | None) -> Tensor:
        """
        Args:
            x: [B, S, D].
            bias: [H, S, S_pad] float32, added to the scaled scores; ignored by a block with its own table.
            slots: [B, M] tokens whose output is wanted; None: all.

        Returns:
            [B, M or S, D].
        """
        out = attend(*self.operands(x, bias), self.backend, self.workspace_mib)
        return self.proj(out if slots is None else take(out, slots))

    def operands(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `attend` takes: qkv [B, S, 3, H, K] of x [B, S, D], and this block's own bias or the shared one."""
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, qkv_bias).unflatten(2, (3, self.num_heads, -1))
        return qkv, expand_bias_table(self) if self.has_table else bias
