"""A prototype to measure, not used in training: attention with a bias that all images share, and the bias's gradient.

    scores[b, h, i, j] = scale * sum_k q[b, i, h, k] * k[b, j, h, k] + bias[h, i, j]             scale = 1 / sqrt(K)
    weights = softmax_j(scores)                     out[b, i, h] = sum_j weights[b, h, i, j] * v[b, j, h]
    delta[b, h, i] = sum_k grad_out[b, i, h, k] * out[b, i, h, k]
    grad_v[b, j, h] = sum_i weights[b, h, i, j] * grad_out[b, i, h]
    grad_scores[b, h, i, j] = weights[b, h, i, j] * (sum_k grad_out[b, i, h, k] * v[b, j, h, k] - delta[b, h, i])
    grad_q[b, i, h] = scale * sum_j grad_scores[b, h, i, j] * k[b, j, h]            grad_k alike, over queries i
    grad_bias[h, i, j] = sum_b grad_scores[b, h, i, j]

Scores never exist whole. The backward is 5 products: what computes grad_k and grad_v leaves grad_scores in a workspace,
in the dtype of qkv, for some images at a time; what computes grad_q reads them back, and adds them up over the images.
No atomics: a run gives the same to the bit. Whether this beats PyTorch's attention, whose backward writes grad_scores
of all images, is what `python -m benchmarks.first_hour attention` asks.

2 * 2*B*H*S*S*K flops forward, 5 * 2*B*H*S*S*K backward. Workspace: images * H*S*S_pad * b bytes, and the partial sums
of grad_bias, groups * H*S*S_pad * 4. Letters as in model/vit.py; i is a query, j a key.
"""

import math

import torch
from torch import Tensor

from fastbeit_kernels.backend import tl, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction
LOWEST = tl.constexpr(-1.0e30)  # the score of a key past the end; finite, so that no difference of two is NaN
ROW_ALIGNMENT = 16  # rows of the bias and of the workspace start at multiples of it: aligned for 128-bit accesses
# as Triton 3.7.1 compiles these for sm_90, none spills, and all multiply by HGMMA
FORWARD_TILES = dict(BLOCK_I=64, BLOCK_J=64, num_warps=4, num_stages=2)
KEY_TILES = dict(BLOCK_I=64, BLOCK_J=64, num_warps=8, num_stages=1)
QUERY_TILES = dict(BLOCK_I=64, num_warps=8, num_stages=2)
DELTA_TILES = dict(BLOCK_I=32, num_warps=4)


def attention_reference(qkv: Tensor, bias: Tensor) -> Tensor:
    """The definition in plain PyTorch; arguments as in `forward`, float64 too."""
    S, K = qkv.shape[1], qkv.shape[4]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / math.sqrt(K) + bias[..., :S].to(q.dtype)
    return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # [B, S, 3, H, K]
    bias_ptr,  # [H, S, S_PAD]
    out_ptr,  # [B, S, H, K]
    lse_ptr,  # [B, H, S] float32: log2 of the sum of exponentials of scores
    S,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_k = tl.arange(0, K)
    mask_i = offs_i < S
    head_ptr = qkv_ptr + pid_b * S * (3 * H * K) + pid_h * K
    bias_ptr += pid_h * S * S_PAD
    q = tl.load(head_ptr + offs_i[:, None] * (3 * H * K) + offs_k[None, :], mask=mask_i[:, None], other=0.0)
    row_max = tl.full([BLOCK_I], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, K], tl.float32)
    for start in range(0, S, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < S
        offs = offs_j[:, None] * (3 * H * K) + offs_k[None, :]
        k = tl.load(head_ptr + H * K + offs, mask=mask_j[:, None], other=0.0)
        v = tl.load(head_ptr + 2 * H * K + offs, mask=mask_j[:, None], other=0.0)
        mask_ij = mask_i[:, None] & (offs_j < S_PAD)[None, :]
        bias = tl.load(bias_ptr + offs_i[:, None] * S_PAD + offs_j[None, :], mask=mask_ij, other=0.0).to(tl.float32)
        scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias) * LOG2_E
        scores = tl.where(mask_j[None, :], scores, LOWEST)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    offs_out = (pid_b * S + offs_i)[:, None] * (H * K) + pid_h * K + offs_k[None, :]
    tl.store(out_ptr + offs_out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask_i[:, None])
    tl.store(lse_ptr + (pid_b * H + pid_h) * S + offs_i, row_max + tl.log2(row_sum), mask=mask_i)


@triton.jit
def _attention_bwd_delta_kernel(
    out_ptr,  # [B, S, H, K]
    grad_out_ptr,  # [B, S, H, K]
    delta_ptr,  # [B, H, S] float32
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < S
    offs = (pid_b * S + offs_i)[:, None] * (H * K) + pid_h * K + tl.arange(0, K)[None, :]
    out = tl.load(out_ptr + offs, mask=mask_i[:, None], other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offs, mask=mask_i[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + (pid_b * H + pid_h) * S + offs_i, tl.sum(out * grad_out, axis=1), mask=mask_i)


@triton.jit
def _attention_bwd_keys_kernel(
    qkv_ptr,  # [B, S, 3, H, K]
    bias_ptr,  # [H, S, S_PAD]
    grad_out_ptr,  # [B, S, H, K]
    lse_ptr,  # [B, H, S] float32
    delta_ptr,  # [B, H, S] float32
    grad_qkv_ptr,  # [B, S, 3, H, K]: keys and values are written
    grad_scores_ptr,  # [images, H, S, S_PAD], written, zeros past S
    first_b,  # the image whose scores come first
    S,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid_h, pid_c = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pid_b = first_b + pid_c
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_k = tl.arange(0, K)
    mask_j = offs_j < S
    head_ptr = qkv_ptr + pid_b * S * (3 * H * K) + pid_h * K
    bias_ptr += pid_h * S * S_PAD
    grad_scores_ptr += (pid_c * H + pid_h) * S * S_PAD
    offs_jk = offs_j[:, None] * (3 * H * K) + offs_k[None, :]
    k = tl.load(head_ptr + H * K + offs_jk, mask=mask_j[:, None], other=0.0)
    v = tl.load(head_ptr + 2 * H * K + offs_jk, mask=mask_j[:, None], other=0.0)
    grad_k = tl.zeros([BLOCK_J, K], tl.float32)
    grad_v = tl.zeros([BLOCK_J, K], tl.float32)
    for start in range(0, S, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        mask_i = offs_i < S
        q = tl.load(head_ptr + offs_i[:, None] * (3 * H * K) + offs_k[None, :], mask=mask_i[:, None], other=0.0)
        offs_out = (pid_b * S + offs_i)[:, None] * (H * K) + pid_h * K + offs_k[None, :]
        grad_out = tl.load(grad_out_ptr + offs_out, mask=mask_i[:, None], other=0.0)
        offs_row = (pid_b * H + pid_h) * S + offs_i
        lse = tl.load(lse_ptr + offs_row, mask=mask_i, other=0.0)
        delta = tl.load(delta_ptr + offs_row, mask=mask_i, other=0.0)
        offs_ij = offs_i[:, None] * S_PAD + offs_j[None, :]
        mask_ij = mask_i[:, None] & (offs_j < S_PAD)[None, :]
        bias = tl.load(bias_ptr + offs_ij, mask=mask_ij, other=0.0).to(tl.float32)
        scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias) * LOG2_E
        weights = tl.where(mask_i[:, None] & mask_j[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        grad_v = tl.dot(tl.trans(weights.to(grad_out.dtype)), grad_out, grad_v, input_precision="ieee")
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[:, None])).to(q.dtype)
        tl.store(grad_scores_ptr + offs_ij, grad_scores, mask=mask_ij)
        grad_k = tl.dot(tl.trans(grad_scores), q, grad_k, input_precision="ieee")
    grad_ptr = grad_qkv_ptr + pid_b * S * (3 * H * K) + pid_h * K + offs_jk
    tl.store(grad_ptr + H * K, (grad_k * scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_j[:, None])
    tl.store(grad_ptr + 2 * H * K, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=mask_j[:, None])


@triton.jit
def _attention_bwd_queries_kernel(
    grad_scores_ptr,  # [images, H, S, S_PAD]
    qkv_ptr,  # [B, S, 3, H, K]
    grad_qkv_ptr,  # [B, S, 3, H, K]: queries are written
    sums_ptr,  # [groups, H, S, S_PAD] float32: grad_bias, over a group's images
    first_b,
    num_images,  # whose scores are there
    S,
    scale,
    GROUP: tl.constexpr,  # images that a program adds up
    H: tl.constexpr,
    K: tl.constexpr,
    S_PAD: tl.constexpr,
    IS_FIRST: tl.constexpr,  # sums start here, with zero
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,  # >= S: a program owns whole rows
):
    pid_h, pid_g = tl.program_id(1), tl.program_id(2)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    offs_k = tl.arange(0, K)
    mask_i, mask_j = offs_i < S, offs_j < S
    offs_ij = offs_i[:, None] * S_PAD + offs_j[None, :]
    mask_ij = mask_i[:, None] & (offs_j < S_PAD)[None, :]
    sums_ptr += (pid_g * H + pid_h).to(tl.int64) * S * S_PAD
    sums = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if not IS_FIRST:
        sums = tl.load(sums_ptr + offs_ij, mask=mask_ij, other=0.0)
    for c in range(pid_g * GROUP, tl.minimum(pid_g * GROUP + GROUP, num_images)):
        scores_ptr = grad_scores_ptr + (c * H + pid_h).to(tl.int64) * S * S_PAD
        grad_scores = tl.load(scores_ptr + offs_ij, mask=mask_ij, other=0.0)
        sums += grad_scores.to(tl.float32)
        start = (first_b + c).to(tl.int64) * S * (3 * H * K) + pid_h * K
        offs_jk = offs_j[:, None] * (3 * H * K) + offs_k[None, :]
        k = tl.load(qkv_ptr + start + H * K + offs_jk, mask=mask_j[:, None], other=0.0)
        grad_q = tl.dot(grad_scores, k, input_precision="ieee") * scale
        grad_ptr = grad_qkv_ptr + start + offs_i[:, None] * (3 * H * K) + offs_k[None, :]
        tl.store(grad_ptr, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=mask_i[:, None])
    tl.store(sums_ptr + offs_ij, sums, mask=mask_ij)


def forward(qkv: Tensor, bias: Tensor, tiles: dict[str, int] = FORWARD_TILES) -> tuple[Tensor, Tensor]:
    """
    Args:
        qkv: [B, S, 3, H, K], contiguous; K a power of two of at least 16.
        bias: [H, S, S_pad] of qkv's dtype, contiguous; S_pad is the next multiple of 16, what is past S does not count.

    Returns:
        out [B, S, H * K], and for the backward log2 of the sums of the exponentials [B, H, S] float32.
    """
    _check(qkv, bias, tiles)
    B, S, _, H, K = qkv.shape
    out = torch.empty(B, S, H * K, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(B, H, S, device=qkv.device, dtype=torch.float32)
    _attention_fwd_kernel[(triton.cdiv(S, tiles["BLOCK_I"]), H, B)](
        qkv_ptr=qkv, bias_ptr=bias, out_ptr=out, lse_ptr=lse, **_sizes(qkv, bias), **tiles
    )
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    images: int = 32,
    group: int = 16,
    key_tiles: dict[str, int] = KEY_TILES,
    query_tiles: dict[str, int] = QUERY_TILES,
) -> tuple[Tensor, Tensor]:
    """
    Args:
        grad_out: [B, S, H * K], contiguous.
        qkv, bias, out, lse: what `forward` was given, and gave.
        images: whose gradients of scores are in memory at once.
        group: images whose gradients of scores one program adds up; the groups are added at the end.

    Returns:
        grad_qkv as qkv, and grad_bias [H, S, S_pad] float32, zero past S.
    """
    _check(qkv, bias, key_tiles)
    B, S, _, H, K = qkv.shape
    images, sizes = min(images, B), _sizes(qkv, bias)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    grad_scores = torch.empty(images, *bias.shape, device=qkv.device, dtype=qkv.dtype)
    num_groups = triton.cdiv(images, group)
    sums = torch.empty(num_groups, *bias.shape, device=qkv.device, dtype=torch.float32)
    _attention_bwd_delta_kernel[(triton.cdiv(S, DELTA_TILES["BLOCK_I"]), H, B)](
        out_ptr=out, grad_out_ptr=grad_out, delta_ptr=delta, S=S, H=H, K=K, **DELTA_TILES
    )
    for first_b in range(0, B, images):
        num_images = min(images, B - first_b)
        common = dict(qkv_ptr=qkv, grad_qkv_ptr=grad_qkv, grad_scores_ptr=grad_scores, first_b=first_b, **sizes)
        _attention_bwd_keys_kernel[(triton.cdiv(S, key_tiles["BLOCK_J"]), H, num_images)](
            bias_ptr=bias, grad_out_ptr=grad_out, lse_ptr=lse, delta_ptr=delta, **common, **key_tiles
        )
        _attention_bwd_queries_kernel[(triton.cdiv(S, query_tiles["BLOCK_I"]), H, num_groups)](
            sums_ptr=sums,
            num_images=num_images,
            GROUP=group,
            IS_FIRST=first_b == 0,
            BLOCK_J=triton.next_power_of_2(S),
            **common,
            **query_tiles,
        )
    return grad_qkv, sums.sum(0)


def _sizes(qkv: Tensor, bias: Tensor) -> dict[str, float]:
    _, S, _, H, K = qkv.shape
    return dict(S=S, scale=1 / math.sqrt(K), H=H, K=K, S_PAD=bias.shape[2])


def _check(qkv: Tensor, bias: Tensor, tiles: dict[str, int]) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] < 16 or qkv.shape[4] & (qkv.shape[4] - 1):
        raise ValueError(f"attention wants qkv [B, S, 3, H, K], K a power of two from 16 on; got {list(qkv.shape)}")
    _, S, _, H, _ = qkv.shape
    wanted = [H, S, triton.cdiv(S, ROW_ALIGNMENT) * ROW_ALIGNMENT]
    if list(bias.shape) != wanted:
        raise ValueError(f"attention wants a bias {wanted}; got {list(bias.shape)}: pad its rows")
    if qkv.dtype not in DTYPES or bias.dtype != qkv.dtype or bias.device != qkv.device:
        got = f"{qkv.dtype} on {qkv.device} and {bias.dtype} on {bias.device}"
        raise ValueError(f"attention wants qkv and bias of one floating dtype, on one device; got {got}")
    if not (qkv.is_contiguous() and bias.is_contiguous()):
        raise ValueError(f"attention wants contiguous qkv and bias; got strides {qkv.stride()} and {bias.stride()}")
    if tiles["BLOCK_J"] % ROW_ALIGNMENT:  # else the last tile of keys could leave padding of the workspace unwritten
        raise ValueError(f"attention wants tiles of keys in multiples of {ROW_ALIGNMENT}; got {tiles['BLOCK_J']}")
