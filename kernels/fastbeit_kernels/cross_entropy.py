"""Cross-entropy over the visual words, with its gradient, in one pass over the logits.

    loss = sum_r (log sum_v exp(logits[r, v]) - logits[r, labels[r]]) / count      over the rows with labels[r] != -100
    grad_logits[r, v] = (softmax(logits[r])[v] - (v == labels[r])) * grad_loss / count              0 in the other rows

The loss of masked image modelling: arXiv 2106.08254, section 2.3. With labels smoothed by e (arXiv 1512.00567,
section 7) and PaLM's z-loss of weight z (arXiv 2204.02311, section 5), where lse = log sum_v exp(logits[r, v]):

    row_loss[r] = lse - (1 - e) * logits[r, labels[r]] - e * mean_v logits[r, v] + z * lse^2
    residual[r, v] = (1 + 2 * z * lse) * softmax(logits[r])[v] - (1 - e) * (v == labels[r]) - e / V

Traffic at R rows, V words, b bytes a logit: forward 2*R*V*b (reads logits, writes the residual, which is the gradient
before its factor; R*V*b when no gradient is wanted), backward 2*R*V*b.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbeit_kernels.backend import Backend, tl, triton, uses_triton
from fastbeit_kernels.derivatives import refuse_second_order, refuse_tangents

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE_INDEX = -100  # as in torch.nn.functional.cross_entropy: the label of an unused mask slot
MAX_BLOCK = 8192  # values a program holds in registers: a row of the dVAE's vocabulary
LOWEST = tl.constexpr(-3.0e38)  # float32, below any logit that is not -inf
BLOCK_PER_WARP = 1024  # 32 values a thread: 4 accesses of 128 bits in bf16, 8 in fp32


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    count: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as in `cross_entropy`, float64 too."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * torch.where(labels != IGNORE_INDEX, logits.logsumexp(1).square(), 0.0).sum()
    return loss / divisor(labels, count), (logits.argmax(-1) == labels).sum()


def divisor(labels: Tensor, count: Tensor | None) -> Tensor:
    """`count` as a float32 scalar of at least 1: no labelled row means loss 0, not NaN."""
    return ((labels != IGNORE_INDEX).sum() if count is None else count).clamp_min(1).float()


@triton.jit
def _row_loss(
    row_max,
    row_sum,
    label_logit,
    smooth_gap,  # LABEL_SMOOTHING times (row_max less the mean of the row)
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    log_sum = tl.log(row_sum)
    loss = log_sum + (row_max - label_logit)
    if LABEL_SMOOTHING > 0:
        loss = (1 - LABEL_SMOOTHING) * loss + LABEL_SMOOTHING * log_sum + smooth_gap
    if Z_LOSS > 0:
        lse = row_max + log_sum
        loss += Z_LOSS * lse * lse
    return loss


@triton.jit
def _residual(
    exps,
    row_max,
    row_sum,
    offs_v,
    word,
    LABEL_SMOOTHING: tl.constexpr,
    SMOOTHING_PER_WORD: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    softmax = exps / row_sum
    if Z_LOSS > 0:
        softmax *= 1 + 2 * Z_LOSS * (row_max + tl.log(row_sum))
    residual = softmax - tl.where(offs_v == word, 1.0 - LABEL_SMOOTHING, 0.0)
    if LABEL_SMOOTHING > 0:
        residual -= SMOOTHING_PER_WORD
    return residual


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [R, V]
    labels_ptr,  # [R] int64
    row_loss_ptr,  # [R] float32
    row_correct_ptr,  # [R] int32
    residual_ptr,  # [R, V], may be logits_ptr: each thread has read what it writes, and the label's logit, before
    V,
    LABEL_SMOOTHING: tl.constexpr,
    SMOOTHING_PER_WORD: tl.constexpr,  # LABEL_SMOOTHING / V
    Z_LOSS: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,  # >= V: a program owns a whole row
):
    pid_r = tl.program_id(0).to(tl.int64)
    logits_ptr += pid_r * V
    residual_ptr += pid_r * V
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    label = tl.load(labels_ptr + pid_r)
    if label == IGNORE_INDEX:
        tl.store(row_loss_ptr + pid_r, 0.0)
        tl.store(row_correct_ptr + pid_r, 0)
        if WITH_GRAD:
            tl.store(residual_ptr + offs_v, tl.zeros([BLOCK_V], residual_ptr.dtype.element_ty), mask=mask_v)
    else:
        tl.device_assert((label >= 0) & (label < V), "cross_entropy: a label is neither a word nor the ignore index")
        word = label.to(tl.int32)  # int64 comparisons take up to 56 registers more (fp32, sm_80)
        label_logit = tl.load(logits_ptr + word).to(tl.float32)
        logits = tl.load(logits_ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        # correct: no word scores more, and no earlier one the same; needs no argmax over pairs
        better = (logits > label_logit) | ((logits == label_logit) & (offs_v < word))
        row_max = tl.max(logits, axis=0)
        exps = tl.exp(logits - row_max)
        row_sum = tl.sum(exps, axis=0)
        smooth_gap = 0.0
        if LABEL_SMOOTHING > 0:
            smooth_gap = SMOOTHING_PER_WORD * tl.sum(tl.where(mask_v, row_max - logits, 0.0), axis=0)
        row_loss = _row_loss(row_max, row_sum, label_logit, smooth_gap, LABEL_SMOOTHING, Z_LOSS)
        tl.store(row_loss_ptr + pid_r, row_loss)
        tl.store(row_correct_ptr + pid_r, tl.where(tl.sum(better.to(tl.int32), axis=0) == 0, 1, 0))
        if WITH_GRAD:
            residual = _residual(exps, row_max, row_sum, offs_v, word, LABEL_SMOOTHING, SMOOTHING_PER_WORD, Z_LOSS)
            tl.store(residual_ptr + offs_v, residual.to(residual_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _cross_entropy_fwd_loop_kernel(
    logits_ptr,  # [R, V]
    labels_ptr,  # [R] int64
    row_loss_ptr,  # [R] float32
    row_correct_ptr,  # [R] int32
    residual_ptr,  # [R, V]; may be logits_ptr
    V,
    LABEL_SMOOTHING: tl.constexpr,
    SMOOTHING_PER_WORD: tl.constexpr,  # LABEL_SMOOTHING / V
    Z_LOSS: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_r = tl.program_id(0).to(tl.int64)
    logits_ptr += pid_r * V
    residual_ptr += pid_r * V
    label = tl.load(labels_ptr + pid_r)
    if label == IGNORE_INDEX:
        tl.store(row_loss_ptr + pid_r, 0.0)
        tl.store(row_correct_ptr + pid_r, 0)
        if WITH_GRAD:
            for start in range(0, V, BLOCK_V):
                offs_v = start + tl.arange(0, BLOCK_V)
                tl.store(residual_ptr + offs_v, tl.zeros([BLOCK_V], residual_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        tl.device_assert((label >= 0) & (label < V), "cross_entropy: a label is neither a word nor the ignore index")
        word = label.to(tl.int32)  # int64 comparisons take up to 56 registers more (fp32, sm_80)
        label_logit = tl.load(logits_ptr + word).to(tl.float32)
        # online softmax, arXiv 1805.02867; starts from a finite value: from -inf, a block of -inf would give NaN
        row_max = tl.maximum(label_logit, LOWEST)
        row_sum = 0.0
        num_better = 0
        # sums of differences from a value of the row keep their digits where the logits are large
        anchor = tl.where(label_logit > LOWEST, label_logit, 0.0)
        sum_below = 0.0
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
            better = (logits > label_logit) | ((logits == label_logit) & (offs_v < word))
            new_max = tl.maximum(row_max, tl.max(logits, axis=0))
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max), axis=0)
            row_max = new_max
            num_better += tl.sum(better.to(tl.int32), axis=0)
            if LABEL_SMOOTHING > 0:
                sum_below += tl.sum(tl.where(offs_v < V, anchor - logits, 0.0), axis=0)
        smooth_gap = LABEL_SMOOTHING * (row_max - anchor) + SMOOTHING_PER_WORD * sum_below
        row_loss = _row_loss(row_max, row_sum, label_logit, smooth_gap, LABEL_SMOOTHING, Z_LOSS)
        tl.store(row_loss_ptr + pid_r, row_loss)
        tl.store(row_correct_ptr + pid_r, tl.where(num_better == 0, 1, 0))
        if WITH_GRAD:
            for start in range(0, V, BLOCK_V):
                offs_v = start + tl.arange(0, BLOCK_V)
                # the second read of the row: 128 KB at 65,536 words in bf16, which the L2 still holds
                logits = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
                exps = tl.exp(logits - row_max)
                residual = _residual(exps, row_max, row_sum, offs_v, word, LABEL_SMOOTHING, SMOOTHING_PER_WORD, Z_LOSS)
                tl.store(residual_ptr + offs_v, residual.to(residual_ptr.dtype.element_ty), mask=offs_v < V)


@triton.jit
def _cross_entropy_bwd_kernel(
    grad_loss_ptr,  # [] float32
    count_ptr,  # [] float32
    residual_ptr,  # [N]: [R, V] flattened, so that a ragged V does not narrow the accesses
    grad_logits_ptr,  # [N]
    N,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    scale = tl.load(grad_loss_ptr) / tl.load(count_ptr)
    residual = tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(grad_logits_ptr + offs_n, (residual * scale).to(grad_logits_ptr.dtype.element_ty), mask=mask_n)


def launch_options(block: int) -> dict[str, int | bool]:
    """How a kernel whose programs hold `block` values is launched."""
    # device assertions, without the checks for integer overflow that Triton's debug mode would add to each sum
    return {"num_warps": max(1, block // BLOCK_PER_WARP), "debug": True, "sanitize_overflow": False}


def row_options(block: int, capability: tuple[int, int]) -> dict[str, int | bool]:
    """The same for the forward whose programs hold a whole row.

    Args:
        capability: of the device; (0, 0) where it is not NVIDIA's.
    """
    # at most 80 registers a thread, so that an SM runs three rows, not two: 255 us instead of 315 on an H100. On newer
    # cards some of it would spill
    return launch_options(block) | ({"maxnreg": 80} if capability[0] in (8, 9) else {})


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def launch_forward(
    logits: Tensor,  # [R, V]
    labels: Tensor,  # [R] int64
    row_loss: Tensor,  # [R] float32, written
    row_correct: Tensor,  # [R] int32, written
    residual: Tensor | None,  # [R, V], written; may be `logits`
    label_smoothing: float,
    z_loss: float,
) -> None:
    R, V = logits.shape
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    is_whole = V <= block
    kernel = _cross_entropy_fwd_kernel if is_whole else _cross_entropy_fwd_loop_kernel
    kernel[(R,)](
        logits_ptr=logits,
        labels_ptr=labels,
        row_loss_ptr=row_loss,
        row_correct_ptr=row_correct,
        residual_ptr=logits if residual is None else residual,
        V=V,
        LABEL_SMOOTHING=label_smoothing,
        SMOOTHING_PER_WORD=label_smoothing / V,
        Z_LOSS=z_loss,
        IGNORE_INDEX=IGNORE_INDEX,
        WITH_GRAD=residual is not None,
        BLOCK_V=block,
        **(row_options(block, _capability(logits.device)) if is_whole else launch_options(block)),
    )


@torch.library.custom_op("fastbeit::cross_entropy_fwd", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, count: Tensor, label_smoothing: float, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives the loss, the number of correct rows and the residual; without `with_grad` the residual is empty."""
    row_loss = torch.empty(len(labels), device=logits.device, dtype=torch.float32)
    row_correct = torch.empty(len(labels), device=logits.device, dtype=torch.int32)
    residual = torch.empty_like(logits) if with_grad else logits.new_empty(0)
    launch_forward(logits, labels, row_loss, row_correct, residual if with_grad else None, label_smoothing, z_loss)
    return row_loss.sum() / count, row_correct.sum(), residual


@_forward.register_fake
def _(
    logits: Tensor, labels: Tensor, count: Tensor, label_smoothing: float, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    residual = torch.empty_like(logits) if with_grad else logits.new_empty(0)
    return logits.new_empty((), dtype=torch.float32), labels.new_empty(()), residual


@torch.library.custom_op("fastbeit::cross_entropy_bwd", mutates_args=())
def _backward(grad_loss: Tensor, count: Tensor, residual: Tensor) -> Tensor:
    grad_logits = torch.empty_like(residual)
    N = residual.numel()
    _cross_entropy_bwd_kernel[(triton.cdiv(N, MAX_BLOCK),)](
        grad_loss_ptr=grad_loss,
        count_ptr=count,
        residual_ptr=residual,
        grad_logits_ptr=grad_logits,
        N=N,
        BLOCK_N=MAX_BLOCK,
        **launch_options(MAX_BLOCK),
    )
    return grad_logits


@_backward.register_fake
def _(grad_loss: Tensor, count: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


def _setup_context(ctx, inputs, output) -> None:
    _, _, residual = output
    ctx.save_for_backward(inputs[2], residual)
    ctx.mark_non_differentiable(residual)
    ctx.set_materialize_grads(False)  # else autograd fills a [R, V] of zeros as the gradient of the residual


def _autograd(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
    refuse_second_order("cross_entropy", grad_loss)
    count, residual = ctx.saved_tensors
    return _backward(grad_loss, count, residual), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# the arithmetic on each logit; FlopCounterMode itself counts matrix products alone
@register_flop_formula(torch.ops.fastbeit.cross_entropy_fwd)
def _forward_flops(logits_shape, labels_shape, count_shape, label_smoothing, z_loss, with_grad, **_) -> int:
    R, V = logits_shape
    return R * V * (5 if with_grad else 3)  # less the maximum, exp, sum; over the sum, less the one-hot


@register_flop_formula(torch.ops.fastbeit.cross_entropy_bwd)
def _backward_flops(grad_loss_shape, count_shape, residual_shape, **_) -> int:
    R, V = residual_shape
    return R * V


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    count: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Give the cross-entropy of the labelled rows, summed and divided by `count`, and how many of them are right.

    Args:
        logits: [R, V], contiguous, float32, bfloat16 or float16. Only they get a gradient, in their dtype.
        labels: [R] int64, contiguous. A word in [0, V), or -100: not labelled, counts for nothing, gradient 0.
        count: scalar, at least 1; the number of labelled rows in `logits` when None. Give the number over all ranks
            and micro-batches for the mean over a global batch, or 1 for the sum.
        label_smoothing: in [0, 1), as in torch.nn.functional.cross_entropy: how much of the label all words share.
        z_loss: weight, at least 0, of the squared log-sum-exp, which keeps the logits near 0.
        backend: "triton", "reference" (plain PyTorch), or "auto": "triton" on CUDA, else "reference".

    Returns:
        loss, scalar float32, and the number of labelled rows whose highest logit is the label's, scalar int64; among
        equal logits the lowest word counts as the highest. No labelled row (or no row): 0 and 0, and gradient 0.
        Sums and statistics are float32 and the same to the bit on each run; nothing waits for the device.

    Raises:
        ValueError: a shape, dtype, device, layout or weight is wrong.
        IndexError: a label of the reference is out of range, by name; Triton: a device-side assertion.
        RuntimeError: Triton: a second or a forward-mode derivative is wanted; the reference has them.
    """
    _check(logits, labels, count)
    check_weights("cross_entropy", label_smoothing, z_loss)
    if not uses_triton(backend, logits.device):
        return cross_entropy_reference(logits, labels, count, label_smoothing=label_smoothing, z_loss=z_loss)
    refuse_tangents("cross_entropy", logits)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    loss, num_correct, _ = _forward(logits, labels, divisor(labels, count), label_smoothing, z_loss, with_grad)
    return loss, num_correct


def _check(logits: Tensor, labels: Tensor, count: Tensor | None) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] == 0:
        got = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(
            f"cross_entropy wants logits [R, V] and labels [R], V > 0; got {got}: flatten images and slots to R"
        )
    if logits.dtype not in DTYPES or labels.dtype != torch.int64:
        got = f"{logits.dtype} and {labels.dtype}"
        raise ValueError(f"cross_entropy wants logits {', '.join(map(str, DTYPES))} and labels torch.int64; got {got}")
    if not (logits.is_contiguous() and labels.is_contiguous()):
        got = f"{logits.stride()} and {labels.stride()}"
        raise ValueError(
            f"cross_entropy wants contiguous logits and labels; got strides {got}: "
            "call .contiguous() where the layout changed"
        )
    scalars = () if count is None else (count,)
    if any(t.device != logits.device for t in (labels, *scalars)) or any(t.ndim for t in scalars):
        got = [f"{tuple(t.shape)} on {t.device}" for t in (logits, labels, *scalars)]
        raise ValueError(
            f"cross_entropy wants labels and a scalar count on the device of the logits; got {', '.join(got)}"
        )


def check_weights(op: str, label_smoothing: float, z_loss: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op} wants label_smoothing in [0, 1); got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{op} wants a finite z_loss of at least 0; got {z_loss}: PaLM's is 1e-4")
