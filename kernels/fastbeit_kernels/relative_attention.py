"""Attention with a bias that all images share, such as that of relative positions, and the gradient of the bias.

    scores[b, h, i, j] = scale * sum_k q[b, i, h, k] * k[b, j, h, k] + bias[h, i, j]             scale = 1 / sqrt(K)
    weights = softmax_j(scores)                     out[b, i, h] = sum_j weights[b, h, i, j] * v[b, j, h]
    delta[b, h, i] = sum_k grad_out[b, i, h, k] * out[b, i, h, k]
    grad_v[b, j, h] = sum_i weights[b, h, i, j] * grad_out[b, i, h]
    grad_scores[b, h, i, j] = weights[b, h, i, j] * (sum_k grad_out[b, i, h, k] * v[b, j, h, k] - delta[b, h, i])
    grad_q[b, i, h] = scale * sum_j grad_scores[b, h, i, j] * k[b, j, h]            grad_k alike, over queries i
    grad_bias[h, i, j] = sum_b grad_scores[b, h, i, j]

arXiv 2106.08254, Appendix A; the softmax is computed tile by tile (FlashAttention, 2205.14135), and scores never exist
whole in the forward. The backward is 5 products: what computes grad_k and grad_v leaves grad_scores in a workspace, in
the dtype of qkv; what computes grad_q reads them back and adds them up over the images, in float32 and always in the
same order: no atomics. q, k and v are read where one matrix product has left them, and their gradients written there.

B images of S tokens, H heads of width K, b bytes a value, S_pad the next multiple of 16. FLOPs: 4*B*H*S*S*K forward,
10*B*H*S*S*K backward. Bytes: forward 4*B*S*H*K*b; backward 9*B*S*H*K*b and 2*B*H*S*S_pad*b of the workspace.
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
LOG2_E = 1.4426950408889634  # exp2 is one instruction: scores are in bits
# the score of a key past the end, in bits; finite, so that no difference of two is NaN, and exact in the dtype
LOWEST = {torch.float32: -(2.0**100), torch.bfloat16: -(2.0**100), torch.float16: -(2.0**15)}
# rows of the bias and of the workspace start at multiples of it, so that accesses are 128 bits wide
ROW_ALIGNMENT = 16
MAX_TOKENS = 256  # a program of the backward holds whole rows of scores
# of scores in memory at once, where nobody says: 256 images of BEiT-B are 240 MiB, in one go. In parts that the L2
# cache holds the same takes longer (H100: 1,039 us instead of 856 in a prototype): each part is too small for the card
WORKSPACE_BYTES = 512 * 2**20


def relative_attention_reference(qkv: Tensor, bias: Tensor) -> Tensor:
    """The definition in plain PyTorch; arguments as in `relative_attention`, float64 too."""
    S, K = qkv.shape[1], qkv.shape[4]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / math.sqrt(K) + bias[..., :S].to(q.dtype)
    return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)


@triton.jit
def _relative_attention_fwd_kernel(
    qkv_ptr,  # [B, S, 3, H, K]
    bias_ptr,  # [H, S, S_PAD] in bits, LOWEST past S
    out_ptr,  # [B, S, H, K]
    lse_ptr,  # [B, H, S] float32: log2 of the sum of exponentials of scores
    S,
    scale,  # in bits
    H: tl.constexpr,
    K: tl.constexpr,
    S_PAD: tl.constexpr,
    PAST: tl.constexpr,
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
    row_max = tl.full([BLOCK_I], PAST, tl.float32)
    row_sum = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, K], tl.float32)
    for start in range(0, S, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < S
        offs = offs_j[:, None] * (3 * H * K) + offs_k[None, :]
        k = tl.load(head_ptr + H * K + offs, mask=mask_j[:, None], other=0.0)
        v = tl.load(head_ptr + 2 * H * K + offs, mask=mask_j[:, None], other=0.0)
        mask_ij = mask_i[:, None] & (offs_j < S_PAD)[None, :]
        bias = tl.load(bias_ptr + offs_i[:, None] * S_PAD + offs_j[None, :], mask=mask_ij, other=PAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias.to(tl.float32)
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
def _relative_attention_bwd_delta_kernel(
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
def _relative_attention_bwd_keys_kernel(
    qkv_ptr,  # [B, S, 3, H, K]
    bias_ptr,  # [H, S, S_PAD] in bits, a row for each key; LOWEST past S
    grad_out_ptr,  # [B, S, H, K]
    lse_ptr,  # [B, H, S] float32
    delta_ptr,  # [B, H, S] float32
    grad_qkv_ptr,  # [B, S, 3, H, K]: keys and values are written
    grad_scores_ptr,  # [images, H, S, S_PAD], a row for each key: written, zeros past S
    first_b,  # the image whose scores come first
    S,
    scale,
    scale_bits,
    H: tl.constexpr,
    K: tl.constexpr,
    S_PAD: tl.constexpr,
    PAST: tl.constexpr,
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
        # queries past the end give nothing: their q, grad_out and delta are 0
        mask_i = offs_i < S
        q = tl.load(head_ptr + offs_i[:, None] * (3 * H * K) + offs_k[None, :], mask=mask_i[:, None], other=0.0)
        offs_out = (pid_b * S + offs_i)[:, None] * (H * K) + pid_h * K + offs_k[None, :]
        grad_out = tl.load(grad_out_ptr + offs_out, mask=mask_i[:, None], other=0.0)
        offs_row = (pid_b * H + pid_h) * S + offs_i
        lse = tl.load(lse_ptr + offs_row, mask=mask_i, other=0.0)
        delta = tl.load(delta_ptr + offs_row, mask=mask_i, other=0.0)
        # scores and weights with keys as rows, [BLOCK_J, BLOCK_I]: all products then have the keys first, and weights
        # and their gradients go into the next product from registers
        offs_ji = offs_j[:, None] * S_PAD + offs_i[None, :]
        mask_ji = mask_j[:, None] & (offs_i < S_PAD)[None, :]
        bias = tl.load(bias_ptr + offs_ji, mask=mask_ji, other=PAST).to(tl.float32)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_bits + bias
        weights = tl.exp2(scores - lse[None, :])
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(q.dtype)
        tl.store(grad_scores_ptr + offs_ji, grad_scores, mask=mask_ji)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
    grad_ptr = grad_qkv_ptr + pid_b * S * (3 * H * K) + pid_h * K + offs_jk
    tl.store(grad_ptr + H * K, (grad_k * scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_j[:, None])
    tl.store(grad_ptr + 2 * H * K, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=mask_j[:, None])


@triton.jit
def _relative_attention_bwd_queries_kernel(
    grad_scores_ptr,  # [images, H, S, S_PAD], a row for each key
    qkv_ptr,  # [B, S, 3, H, K]
    grad_qkv_ptr,  # [B, S, 3, H, K]: queries are written
    sums_ptr,  # [groups, H, S, S_PAD] float32, a row for each key: grad_bias, over a group's images
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
    BLOCK_J: tl.constexpr,  # >= S: a program has all keys of its queries
):
    pid_h, pid_g = tl.program_id(1), tl.program_id(2)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    offs_k = tl.arange(0, K)
    mask_i, mask_j = offs_i < S, offs_j < S
    offs_ji = offs_j[:, None] * S_PAD + offs_i[None, :]
    mask_ji = mask_j[:, None] & (offs_i < S_PAD)[None, :]
    sums_ptr += (pid_g * H + pid_h).to(tl.int64) * S * S_PAD
    sums = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    if not IS_FIRST:
        sums = tl.load(sums_ptr + offs_ji, mask=mask_ji, other=0.0)
    for c in range(pid_g * GROUP, tl.minimum(pid_g * GROUP + GROUP, num_images)):
        scores_ptr = grad_scores_ptr + (c * H + pid_h).to(tl.int64) * S * S_PAD
        grad_scores = tl.load(scores_ptr + offs_ji, mask=mask_ji, other=0.0)
        sums += grad_scores.to(tl.float32)
        start = (first_b + c).to(tl.int64) * S * (3 * H * K) + pid_h * K
        offs_jk = offs_j[:, None] * (3 * H * K) + offs_k[None, :]
        k = tl.load(qkv_ptr + start + H * K + offs_jk, mask=mask_j[:, None], other=0.0)
        grad_q = tl.dot(tl.trans(grad_scores), k, input_precision="ieee") * scale
        grad_ptr = grad_qkv_ptr + start + offs_i[:, None] * (3 * H * K) + offs_k[None, :]
        tl.store(grad_ptr, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=mask_i[:, None])
    tl.store(sums_ptr + offs_ji, sums, mask=mask_ji)


def forward_tiles(dtype: torch.dtype) -> dict[str, int]:
    """How the forward is launched, as an H100 chose it; likewise below. In float32 products have 32 rows, for which see
    `masked_embed.product_tiles`."""
    if dtype == torch.float32:
        return dict(BLOCK_I=32, BLOCK_J=32, num_warps=4, num_stages=1)
    return dict(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=3)


def key_tiles(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return dict(BLOCK_I=32, BLOCK_J=32, num_warps=4, num_stages=1)
    return dict(BLOCK_I=16, BLOCK_J=64, num_warps=4, num_stages=3)


def query_tiles(dtype: torch.dtype, shared_bytes: int) -> dict[str, int]:
    """
    Args:
        shared_bytes: that a block may have on the device.
    """
    if dtype == torch.float32:
        return dict(BLOCK_I=16, GROUP=16, num_warps=16 if shared_bytes > 64 * 1024 else 8, num_stages=1)
    return dict(BLOCK_I=64, GROUP=32, num_warps=8, num_stages=3 if shared_bytes > 160 * 1024 else 2)


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 64 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


DELTA_TILES = dict(BLOCK_I=32, num_warps=4)


def _sizes(qkv: Tensor, bias: Tensor) -> dict[str, int]:
    _, S, _, H, K = qkv.shape
    return dict(S=S, H=H, K=K, S_PAD=bias.shape[2])


def _in_bits(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """[H, S, S_pad]: a bias [H, S, S] times log2 e, and `LOWEST` past S."""
    H, S, _ = bias.shape
    padded = bias.new_empty((H, S, triton.cdiv(S, ROW_ALIGNMENT) * ROW_ALIGNMENT), dtype=dtype)
    padded[..., S:].fill_(LOWEST[dtype])
    torch.mul(bias, LOG2_E, out=padded[..., :S])
    return padded


@torch.library.custom_op("fastbeit::relative_attention_fwd", mutates_args=())
def _forward(qkv: Tensor, bias: Tensor, workspace: int) -> tuple[Tensor, Tensor]:
    """The output, and for the backward: log2 of the sums of exponentials [B, H, S]. `workspace` is the backward's."""
    (B, S, _, H, K), tiles = qkv.shape, forward_tiles(qkv.dtype)
    bits = _in_bits(bias[..., :S], qkv.dtype)
    out = torch.empty(B, S, H * K, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(B, H, S, device=qkv.device, dtype=torch.float32)
    _relative_attention_fwd_kernel[(triton.cdiv(S, tiles["BLOCK_I"]), H, B)](
        qkv_ptr=qkv,
        bias_ptr=bits,
        out_ptr=out,
        lse_ptr=lse,
        scale=LOG2_E / math.sqrt(K),
        PAST=LOWEST[qkv.dtype],
        **_sizes(qkv, bits),
        **tiles,
    )
    return out, lse


@_forward.register_fake
def _(qkv, bias, workspace) -> tuple[Tensor, Tensor]:
    B, S, _, H, K = qkv.shape
    return qkv.new_empty(B, S, H * K), qkv.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("fastbeit::relative_attention_bwd", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, lse: Tensor, workspace: int
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and that of the bias [H, S, S] float32; a `workspace` of 0 bytes: `WORKSPACE_BYTES`."""
    (B, S, _, H, K), keys = qkv.shape, key_tiles(qkv.dtype)
    queries = query_tiles(qkv.dtype, _shared_bytes(qkv.device))
    bits = _in_bits(bias[..., :S].transpose(1, 2), qkv.dtype)
    sizes, scale = _sizes(qkv, bits), 1 / math.sqrt(K)
    images = max(1, min(B, (workspace or WORKSPACE_BYTES) // bits.nbytes))
    num_groups = triton.cdiv(images, queries["GROUP"])
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    grad_scores = torch.empty(images, *bits.shape, device=qkv.device, dtype=qkv.dtype)
    make = torch.empty if B else torch.zeros
    sums = make(num_groups, *bits.shape, device=qkv.device, dtype=torch.float32)
    _relative_attention_bwd_delta_kernel[(triton.cdiv(S, DELTA_TILES["BLOCK_I"]), H, B)](
        out_ptr=out, grad_out_ptr=grad_out, delta_ptr=delta, S=S, H=H, K=K, **DELTA_TILES
    )
    for first_b in range(0, B, images):
        num_images = min(images, B - first_b)
        part = dict(qkv_ptr=qkv, grad_qkv_ptr=grad_qkv, grad_scores_ptr=grad_scores, first_b=first_b, scale=scale)
        _relative_attention_bwd_keys_kernel[(triton.cdiv(S, keys["BLOCK_J"]), H, num_images)](
            bias_ptr=bits,
            grad_out_ptr=grad_out,
            lse_ptr=lse,
            delta_ptr=delta,
            scale_bits=scale * LOG2_E,
            PAST=LOWEST[qkv.dtype],
            **part,
            **sizes,
            **keys,
        )
        _relative_attention_bwd_queries_kernel[(triton.cdiv(S, queries["BLOCK_I"]), H, num_groups)](
            sums_ptr=sums,
            num_images=num_images,
            IS_FIRST=first_b == 0,
            BLOCK_J=max(16, triton.next_power_of_2(S)),
            **part,
            **sizes,
            **queries,
        )
    return grad_qkv, sums[..., :S].sum(0).transpose(1, 2).contiguous()


@_backward.register_fake
def _(grad_out, qkv, bias, out, lse, workspace) -> tuple[Tensor, Tensor]:
    _, S, _, H, _ = qkv.shape
    return torch.empty_like(qkv), qkv.new_empty(H, S, S, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, ctx.workspace = inputs
    ctx.save_for_backward(qkv, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made as a gradient of lse


def _autograd(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return None, None, None
    refuse_second_order("relative_attention", grad_out)
    # read once: where a block is computed again for its backward, a second time is an error
    qkv, bias, out, lse = ctx.saved_tensors
    grad_qkv, grad_bias = _backward(grad_out.contiguous(), qkv, bias, out, lse, ctx.workspace)
    padding = bias.shape[2] - qkv.shape[1]
    return grad_qkv, F.pad(grad_bias, (0, padding)) if ctx.needs_input_grad[1] else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# as FlopCounterMode counts fused attention: the scores are computed once more in the backward
@register_flop_formula(torch.ops.fastbeit.relative_attention_fwd)
def _forward_flops(qkv_shape, *_, **__) -> int:
    B, S, _, H, K = qkv_shape
    return 4 * B * H * S * S * K


@register_flop_formula(torch.ops.fastbeit.relative_attention_bwd)
def _backward_flops(grad_shape, qkv_shape, *_, **__) -> int:
    B, S, _, H, K = qkv_shape
    return 10 * B * H * S * S * K


def relative_attention(qkv: Tensor, bias: Tensor, *, workspace: int | None = None, backend: Backend = "auto") -> Tensor:
    """Attention of all heads, from queries, keys and values as one matrix product leaves them.

    Args:
        qkv: [B, S, 3, H, K], contiguous, float32, bfloat16 or float16. For Triton K is a power of two of at least 16,
            and S at most 256.
        bias: [H, S, S or more] float32, added to the scaled scores; columns past S do not count. Triton rounds it to
            qkv's dtype, as PyTorch's fused attention does, and adds up its gradient in float32.
        workspace: bytes of scores that Triton's backward has in memory at once, at least those of an image; None: 512
            MiB. The order in which the bias's gradient is added up hangs on it.
        backend: "triton", "reference" (plain PyTorch), or "auto": "triton" on CUDA, else "reference".

    Returns:
        [B, S, H * K] in qkv's dtype. Columns past S get a gradient of 0.

    Raises:
        ValueError: a shape, dtype or device is wrong, qkv is not contiguous, or the workspace is no number of bytes.
        RuntimeError: Triton: a second or a forward-mode derivative is wanted; the reference has them.
    """
    triton_runs = uses_triton(backend, qkv.device)
    _check(qkv, bias, triton_runs)
    if workspace is not None and workspace < 1:
        raise ValueError(f"relative_attention wants a workspace of at least 1 byte; got {workspace}")
    if not triton_runs:
        return relative_attention_reference(qkv, bias)
    refuse_tangents("relative_attention", qkv, bias)
    return _forward(qkv, bias, workspace or 0)[0]


def refusal(S: int, K: int) -> str | None:
    """Why Triton does not take S tokens and heads of width K; None: it does."""
    if S > MAX_TOKENS:
        return f"at most {MAX_TOKENS} tokens; got {S}"
    if K < 16 or K & (K - 1):
        return f"heads whose width is a power of two, 16 or more; got {K}"
    return None


def _check(qkv: Tensor, bias: Tensor, triton_runs: bool) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"relative_attention wants qkv [B, S, 3, H, K]; got {list(qkv.shape)}")
    _, S, _, H, K = qkv.shape
    if triton_runs and (refused := refusal(S, K)):
        raise ValueError(f'relative_attention wants {refused}: take backend "reference"')
    if bias.ndim != 3 or bias.shape[:2] != (H, S) or bias.shape[2] < S:
        raise ValueError(f"relative_attention wants bias [{H}, {S}, {S} or more]; got {list(bias.shape)}")
    if qkv.dtype not in DTYPES or bias.dtype != torch.float32 or bias.device != qkv.device:
        got = f"{qkv.dtype} on {qkv.device} and {bias.dtype} on {bias.device}"
        raise ValueError(
            f"relative_attention wants qkv {' or '.join(map(str, DTYPES))} and bias float32 on one device; got {got}"
        )
    if not qkv.is_contiguous():
        raise ValueError(f"relative_attention wants contiguous qkv; got strides {qkv.stride()}")
