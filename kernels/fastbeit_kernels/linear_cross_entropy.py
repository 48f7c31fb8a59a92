"""The output layer and its cross-entropy, without logits in memory: hidden vectors in, loss and all gradients out.

    logits[r, v] = sum_d hidden[r, d] * weight[v, d] + bias[v]      a chunk of rows at a time
    loss, residual[r, v]: as in cross_entropy.py, the residual written over the logits
    grad_hidden[r, d] = s * sum_v residual[r, v] * weight[v, d]
    grad_weight[v, d] = s * sum_r residual[r, v] * hidden[r, d]          grad_bias[v] = s * sum_r residual[r, v]

where s = grad_loss / count multiplies after the products, in float32: before them it would flush most entries of a
float16 residual to zero. All products are taken in the forward, while a chunk's residual is in the cache; the backward
is the multiplication by s, over the stored gradients themselves unless the graph is kept.

2*R*V*D flops for the logits and as many for each of grad_hidden and grad_weight. Memory at b bytes a value and C rows a
chunk: (C*V + R*D) * b + 4*V*D; where a gradient's dtype is not the stored one, the backward adds that gradient.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbeit_kernels.backend import Backend, product_dtype, uses_triton
from fastbeit_kernels.cross_entropy import (
    DTYPES,
    IGNORE_INDEX,
    check_weights,
    cross_entropy_reference,
    divisor,
    launch_forward,
)
from fastbeit_kernels.derivatives import refuse_second_order, refuse_tangents

# On a GPU the logits of a chunk take at most this share of its memory: 1.2 GiB of 80, 384 MiB of 24. Large products
# fill a card, and a chunk reads and writes the weight's gradient: an H100 takes 1,566 us for 19,200 rows in one chunk,
# 1,622 in two, 1,764 by 4,096, 2,086 by 2,048, 2,493 by 1,024 (`python -m benchmarks.first_hour linear_cross_entropy`)
CHUNK_SHARE = 1 / 64
# Elsewhere it is memory that counts: bytes of a chunk's logits, a word, which are 512 rows in float32, 1024 in 16 bits
CHUNK_BYTES = 2048


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, logits in memory; arguments as in `linear_cross_entropy`, float64 too."""
    logits = F.linear(hidden, weight, bias)
    return cross_entropy_reference(logits, labels, count, label_smoothing=label_smoothing, z_loss=z_loss)


def _rows_in_pytorch(
    logits: Tensor,  # [C, V], overwritten by the residual where it is wanted
    labels: Tensor,  # [C] int64
    row_loss: Tensor,  # [C] float32, written
    row_correct: Tensor,  # [C] int32, written
    residual: Tensor | None,  # `logits`, or None
    label_smoothing: float,
    z_loss: float,
) -> None:
    """What `launch_forward` computes, in place, in as few passes over the chunk as PyTorch has operations for."""
    x = logits.float()  # no copy of float32
    ignored = labels == IGNORE_INDEX
    x.masked_fill_(ignored[:, None], 0.0)  # logits of ignored rows may be inf or NaN
    # not gather, because it names a label that is out of range
    label_logit = -F.nll_loss(x, labels, ignore_index=IGNORE_INDEX, reduction="none")
    row_max, best = x.max(1)
    x.sub_(row_max[:, None])
    loss = row_max - label_logit
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * x.mean(1)
    row_sum = x.exp_().sum(1)
    log_sum = row_sum.log()
    lse = row_max + log_sum
    loss += log_sum + z_loss * lse.square() if z_loss else log_sum
    row_loss.copy_(loss.masked_fill_(ignored, 0.0))
    row_correct.copy_(best == labels)
    if residual is None:
        return
    factor = (1 + 2 * z_loss * lse) / row_sum if z_loss else 1 / row_sum
    x.mul_(factor.masked_fill_(ignored, 0.0)[:, None])
    labelled = (~ignored).float()[:, None]
    x.scatter_add_(1, labels.clamp_min(0)[:, None], (label_smoothing - 1) * labelled)
    if label_smoothing:
        x.sub_(label_smoothing / x.shape[1] * labelled)
    residual.copy_(x)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [V, D] float32 += a^T b, for a [C, V] and b [C, D] of any one dtype, without rounding the product."""
    if a.dtype == torch.float32:
        total.addmm_(a.T, b)
    elif a.is_cuda:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:  # no such product on the CPU: chunks are small enough to convert
        total.addmm_(a.T.float(), b.float())


def chunk_rows(R: int, V: int, itemsize: int, memory: int | None) -> int:
    """Rows whose logits are in memory at once, where nobody says.

    Args:
        memory: bytes of the GPU's; None: not on a GPU.
    """
    if memory is None:
        return CHUNK_BYTES // itemsize
    most = max(1, int(memory * CHUNK_SHARE) // (V * itemsize))
    num_chunks = -(-R // most) or 1
    return -(-R // num_chunks) or 1  # of equal size, as nearly as may be


@lru_cache
def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@torch.library.custom_op("fastbeit::linear_cross_entropy_fwd", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    chunk: int,
    label_smoothing: float,
    z_loss: float,
    triton: bool,
    overwrite: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gives the loss, the number of correct rows and the gradients before their factor, empty where not `wanted`.

    A `chunk` of 0 follows the device's memory. With `overwrite` the caller leaves the gradients to the backward, which
    may write over them.
    """
    R, V = len(hidden), len(weight)
    chunk = chunk or chunk_rows(R, V, dtype.itemsize, _memory(hidden.device))
    compute_rows = launch_forward if triton else _rows_in_pytorch
    row_loss = torch.empty(R, device=hidden.device, dtype=torch.float32)
    row_correct = torch.empty(R, device=hidden.device, dtype=torch.int32)
    grad_hidden, grad_weight, grad_bias = _allocate(hidden, weight, dtype, wanted)
    grad_weight.zero_()
    grad_bias.zero_()
    # autocast leaves products that write to `out` as they are
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    scratch = torch.empty(min(chunk, R), V, device=hidden.device, dtype=dtype)
    for start in range(0, R, chunk):
        rows = slice(start, start + chunk)
        x = hidden[rows].to(dtype)
        logits = scratch[: len(x)]
        if bias is None:
            torch.mm(x, weight.T, out=logits)
        else:
            torch.addmm(bias, x, weight.T, out=logits)
        residual = logits if any(wanted) else None
        compute_rows(logits, labels[rows], row_loss[rows], row_correct[rows], residual, label_smoothing, z_loss)
        if wanted[0]:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if wanted[1]:
            _add_product(grad_weight, logits, x)
        if wanted[2]:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return row_loss.sum() / count, row_correct.sum(), grad_hidden, grad_weight, grad_bias


def _allocate(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: list[bool]) -> list[Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = dtype, torch.float32, torch.float32  # sums over all rows are float32
    return [
        torch.empty(shape if want else 0, device=hidden.device, dtype=stored)
        for shape, stored, want in zip(shapes, dtypes, wanted, strict=True)
    ]


@_forward.register_fake
def _(hidden, weight, bias, labels, count, dtype, chunk, label_smoothing, z_loss, triton, overwrite, wanted):
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, labels.new_empty(()), *_allocate(hidden, weight, dtype, wanted)


@torch.library.custom_op("fastbeit::linear_cross_entropy_bwd", mutates_args=())
def _backward(grad_loss: Tensor, count: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    return _scale(grad_loss, count, stored, torch.empty_like(stored, dtype=dtype))


@_backward.register_fake
def _(grad_loss: Tensor, count: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(stored, dtype=dtype)


def _scale(grad_loss: Tensor, count: Tensor, stored: Tensor, out: Tensor) -> Tensor:
    # of one dimension, not none: a scalar would be cast to the dtype of `stored`, where 2^16 is no float16
    return torch.mul(stored, (grad_loss / count).reshape(1), out=out)


def _setup_context(ctx, inputs, output) -> None:
    _, _, *stored = output
    ctx.save_for_backward(inputs[4], *stored)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.overwrite, ctx.wanted = inputs[-2:]
    ctx.mark_non_differentiable(*stored)
    ctx.set_materialize_grads(False)  # else autograd fills zeros as the gradients of what is stored


def _autograd(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
    refuse_second_order("linear_cross_entropy", grad_loss)
    count, *gradients = ctx.saved_tensors
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
    overwrite = ctx.overwrite and not kept  # retain_graph: another backward will read what is stored
    grads: list[Tensor | None] = [None] * 12
    for i, (stored, dtype, want) in enumerate(zip(gradients, ctx.dtypes, ctx.wanted, strict=True)):
        if want and overwrite and stored.dtype == dtype:
            grads[i] = _scale(grad_loss, count, stored, out=stored)
        elif want:
            grads[i] = _backward(grad_loss, count, stored, dtype)
    return tuple(grads)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastbeit.linear_cross_entropy_fwd)
def _forward_flops(hidden_shape, weight_shape, *args, **_) -> int:
    R, D = hidden_shape
    grad_hidden, grad_weight, _ = args[-1]
    return 2 * R * D * weight_shape[0] * (1 + grad_hidden + grad_weight)  # matrix products, as PyTorch counts


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Give `cross_entropy(linear(hidden, weight, bias), labels, count)`, and its gradients, without all logits at once.

    Args:
        hidden: [R, D], contiguous, float32, bfloat16 or float16, as weight and bias, whose dtypes may differ from it.
        weight: [V, D], contiguous.
        bias: [V], or None.
        labels, count, label_smoothing, z_loss: as in `cross_entropy`.
        chunk: rows whose logits are in memory at once; None: on a GPU as many as take 1/64 of its memory, elsewhere 512
            where products are float32, else 1024.
        dtype: of the matrix products; None: autocast's where it is on, else that of `hidden`. Loss, statistics and the
            sums over rows are float32; a float32 weight gets a gradient that was never rounded to `dtype`.
        backend: "triton", "reference" (chunks in plain PyTorch), or "auto": "triton" on CUDA, else "reference".

    Returns:
        loss, scalar float32, and number of right rows, scalar int64, as in `cross_entropy`. Gradients in the dtypes of
        the inputs, computed in the forward for those that require them. A second backward (retain_graph) costs memory
        of their size once more.

    Raises:
        ValueError: a shape, dtype, device, layout, chunk or weight is wrong.
        IndexError: a label of the reference is out of range, by name; Triton: a device-side assertion.
        RuntimeError: a second or a forward-mode derivative is wanted; the reference has them.
    """
    refuse_tangents("linear_cross_entropy", hidden, weight, bias)
    product = product_dtype(dtype, hidden)
    _check(hidden, weight, bias, labels, count, chunk, product)
    check_weights("linear_cross_entropy", label_smoothing, z_loss)
    loss, num_correct, *_ = _forward(
        hidden,
        weight,
        bias,
        labels,
        divisor(labels, count),
        product,
        chunk or 0,
        label_smoothing,
        z_loss,
        uses_triton(backend, hidden.device),
        not torch.compiler.is_compiling(),  # a graph is free to run its backward twice, and reuses memory by itself
        [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)],
    )
    return loss, num_correct


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor | None,
    chunk: int | None,
    product: torch.dtype,
) -> None:
    floats = [t for t in (hidden, weight, bias) if t is not None]
    tensors = [*floats, labels]
    shapes = [tuple(t.shape) for t in tensors]
    wanted = [(*hidden.shape[:1], *weight.shape[1:]), (*weight.shape[:1], *hidden.shape[1:]), weight.shape[:1]]
    if hidden.ndim != 2 or weight.ndim != 2 or shapes != [*wanted[: len(floats)], hidden.shape[:1]] or not len(weight):
        raise ValueError(
            f"linear_cross_entropy wants hidden [R, D], weight [V, D], bias [V] and labels [R], V > 0; got {shapes}: "
            "flatten images and slots to R"
        )
    if any(t.dtype not in DTYPES for t in floats) or product not in DTYPES or labels.dtype != torch.int64:
        got = f"{', '.join(str(t.dtype) for t in tensors)}, products {product}"
        raise ValueError(f"linear_cross_entropy wants {', '.join(map(str, DTYPES))}, and labels torch.int64; got {got}")
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError(
            f"linear_cross_entropy wants contiguous tensors; got strides {[t.stride() for t in tensors]}: "
            "call .contiguous() where the layout changed"
        )
    scalars = [] if count is None else [count]
    if any(t.device != hidden.device for t in (*tensors, *scalars)) or any(t.ndim for t in scalars):
        got = [f"{tuple(t.shape)} on {t.device}" for t in (*tensors, *scalars)]
        raise ValueError(
            f"linear_cross_entropy wants all tensors on the device of hidden, and a scalar count; got {', '.join(got)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy wants a chunk of at least 1 row; got {chunk}")
