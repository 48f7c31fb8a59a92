"""Images to tokens in one op: normalise, cut into patches, project, then put mask token, cls and positions in place.

    tokens[b, 0] = cls_token + positions[0]
    tokens[b, n + 1] = (mask_token if masked[b, n] else bias + sum_k weight[k] * x[b, n, k]) + positions[n + 1]
    x[b, n, k] = (pixel[b, n, k] / 255 - mean[c]) / std[c]             k: row, column and channel c inside patch n

The corrupted image of masked image modelling: arXiv 2106.08254, section 2.3. The kernels multiply bytes less 128, which
bfloat16 and float16 hold exactly, with a weight that mean and deviation were folded into:

    sum_k weight[k] * x[k] = sum_k folded[k] * (pixel[k] - 128) / 128 + sum_k folded[k] * (128 - 255 * mean[c]) / 128
    folded[k] = weight[k] * 128 / (255 * std[c])

The second sum takes the folded weight as it was rounded: only the weight's own rounding is left as an error.
Traffic at B images of N patches of K bytes, a share v of them visible, S = N + 1 tokens of width D, b bytes a value:
forward v*B*N*K + B*S*D*b (reads pixels, writes tokens); backward 2*B*S*D*b + v*B*N*K (reads the gradient twice, and
pixels), and B*S*K unfolded values through a buffer that the L2 cache holds. FLOPs: 2*B*N*K*D each way.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbeit_kernels.backend import Backend, product_dtype, tl, triton, uses_triton, without_autocast
from fastbeit_kernels.derivatives import refuse_second_order, refuse_tangents

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of the buffer that patches are unfolded into for the weight's gradient: a third of the L2 cache of an A100 or H100
UNFOLD_BYTES = 16 * 2**20
UNFOLD_TILES = dict(BLOCK_T=32, BLOCK_K=128, num_warps=4)


def patchify(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """From [B, height, width, 3] the patches in row-major order, [B, N, K]; each, as a weight: channel, row, column."""
    height, width = patch_size
    patches = images.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # [B, down, height, across, width, 3]
    return patches.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def masked_embed_reference(
    images, masked, weight, bias, cls_token, mask_token, positions, mean, std, dtype, out_dtype
) -> Tensor:
    """The definition in plain PyTorch; arguments as in `masked_embed`, all but the images in float64 too."""
    patches = patchify((images.to(mean.dtype) / 255 - mean) / std, weight.shape[2:])
    with without_autocast(images.device):  # autocast would otherwise override `dtype`
        x = F.linear(patches.to(dtype), weight.flatten(1).to(dtype), bias.to(dtype))
    # chosen, not blended: what a masked patch holds cannot leak, not even as NaN
    x = torch.where(masked[:, :, None], mask_token, x)
    x = torch.cat((cls_token.expand(len(x), 1, -1), x), dim=1)
    return (x if positions is None else x + positions).to(out_dtype)


@triton.jit
def _tokens(masked_ptr, first_t, T, S: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first token's image; of each: place in an image, patch counted from the first image on, whether visible."""
    first_b = first_t // S
    offs_t = (first_t - first_b * S).to(tl.int32) + tl.arange(0, BLOCK_T)  # within 32 bits from here on
    place = offs_t % S
    patch = offs_t - offs_t // S - 1
    mask = (place != 0) & (tl.arange(0, BLOCK_T) < T - first_t)
    return first_b, place, patch, tl.load(masked_ptr + first_b * (S - 1) + patch, mask=mask, other=1) == 0


@triton.jit
def _pixels(image_ptr, patch, visible, offs_k, K: tl.constexpr, RUN: tl.constexpr, ACROSS: tl.constexpr):
    """[BLOCK_T, BLOCK_K] int8: bytes less 128; 0, and nothing read, where a token shows no pixels."""
    start = patch // ACROSS * (ACROSS * K) + patch % ACROSS * RUN
    offs = offs_k // RUN * (ACROSS * RUN) + offs_k % RUN
    mask = visible[:, None] & (offs_k < K)[None, :]
    pixels = tl.load(image_ptr + (start[:, None] + offs[None, :]), mask=mask, other=0)
    # the byte with its top bit flipped, read as signed. `other=128` would do without the choice, but is negative as an
    # int8, and Triton (3.6, 3.7) repeats a negative filler with its sign: three bytes of four would be wrong
    return tl.where(mask, (pixels ^ 128).to(tl.int8, bitcast=True), 0)


@triton.jit
def _masked_embed_fwd_kernel(
    images_ptr,  # [B, height, width, 3] uint8
    masked_ptr,  # [B, N] bool
    folded_ptr,  # [K, D] product dtype
    shift_ptr,  # [D] float32
    cls_token_ptr,  # [D]
    mask_token_ptr,  # [D]
    positions_ptr,  # [S, D]
    tokens_ptr,  # [B, S, D]
    T,
    D,
    S: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,  # bytes of a patch that lie side by side: a row of it
    ACROSS: tl.constexpr,  # patches across an image
    HAS_POSITIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_d = tl.cdiv(D, BLOCK_D)  # neighbours share pixels: all but the first find them in the L2 cache
    first_t = (tl.program_id(0) // num_d).to(tl.int64) * BLOCK_T
    offs_d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first_b, place, patch, visible = _tokens(masked_ptr, first_t, T, S, BLOCK_T)
    image_ptr = images_ptr + first_b * ((S - 1) * K)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_kd = (offs_k < K)[:, None] & mask_d[None, :]
        pixels = _pixels(image_ptr, patch, visible, offs_k, K, RUN, ACROSS)
        folded = tl.load(folded_ptr + (offs_k[:, None] * D + offs_d[None, :]), mask=mask_kd, other=0.0)
        acc = tl.dot(pixels.to(folded.dtype), folded, acc, input_precision="ieee")
    shift = tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0)
    cls_token = tl.load(cls_token_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    unseen = tl.where((place == 0)[:, None], cls_token[None, :], mask_token[None, :])
    tokens = tl.where(visible[:, None], acc / 128 + shift[None, :], unseen)
    offs_t = tl.arange(0, BLOCK_T)
    mask = (offs_t < T - first_t)[:, None] & mask_d[None, :]
    if HAS_POSITIONS:
        tokens += tl.load(positions_ptr + (place[:, None] * D + offs_d[None, :]), mask=mask, other=0.0).to(tl.float32)
    offs = offs_t[:, None] * D + offs_d[None, :]
    tl.store(tokens_ptr + first_t * D + offs, tokens.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_embed_bwd_sums_kernel(
    grad_tokens_ptr,  # [B, S, D]
    masked_ptr,  # [B, N] bool
    visible_ptr,  # [S, D] float32: summed over the images that show the patch's pixels
    hidden_ptr,  # [S, D] float32: over the others; cls is hidden
    B,
    S,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    visible = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    hidden = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask_b = offs_b < B
        is_hidden = tl.load(masked_ptr + offs_b * (S - 1) + place - 1, mask=mask_b & (place != 0), other=1) != 0
        offs = (offs_b * S + place)[:, None] * D + offs_d[None, :]
        grad = tl.load(grad_tokens_ptr + offs, mask=mask_b[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        visible += tl.where(is_hidden[:, None], 0.0, grad)
        hidden += tl.where(is_hidden[:, None], grad, 0.0)
    tl.store(visible_ptr + place * D + offs_d, tl.sum(visible, axis=0), mask=mask_d)
    tl.store(hidden_ptr + place * D + offs_d, tl.sum(hidden, axis=0), mask=mask_d)


@triton.jit
def _masked_embed_bwd_unfold_kernel(
    images_ptr,  # [B, height, width, 3] uint8
    masked_ptr,  # [B, N] bool
    unfolded_ptr,  # [T, K]: bytes less 128; zeros for a token that shows no pixels
    start_t,  # the token of the first row
    T,  # rows of this chunk
    S: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_t = tl.program_id(1).to(tl.int64) * BLOCK_T
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_b, _, patch, visible = _tokens(masked_ptr, start_t + first_t, start_t + T, S, BLOCK_T)
    pixels = _pixels(images_ptr + first_b * ((S - 1) * K), patch, visible, offs_k, K, RUN, ACROSS)
    offs = first_t * K + (tl.arange(0, BLOCK_T)[:, None] * K + offs_k[None, :])
    mask = (tl.arange(0, BLOCK_T) < T - first_t)[:, None] & (offs_k < K)[None, :]
    tl.store(unfolded_ptr + offs, pixels.to(unfolded_ptr.dtype.element_ty), mask=mask)


def product_tiles(dtype: torch.dtype) -> dict[str, int]:
    """How the forward kernel is launched."""
    if dtype == torch.float32:  # 32 rows: on sm_100 an "ieee" product of 64 or more becomes tf32 (Triton 3.7.1)
        return dict(BLOCK_T=32, BLOCK_D=64, BLOCK_K=64, num_warps=4, num_stages=2)
    return dict(BLOCK_T=64, BLOCK_D=128, BLOCK_K=64, num_warps=4, num_stages=3)  # 3 blocks an SM of sm_90


def sums_tiles(dtype: torch.dtype) -> dict[str, int]:
    """How the reduction is launched: 8 KB in flight a program; an H100 runs the 3 * 197 of BEiT-B at once."""
    return dict(BLOCK_B=32 // dtype.itemsize, BLOCK_D=256, num_warps=4)


def _source(images: Tensor, masked: Tensor, patch_size: Sequence[int]) -> dict[str, Any]:
    """Where kernels find pixels."""
    height, width = patch_size
    geometry = dict(K=height * width * 3, RUN=width * 3, ACROSS=images.shape[2] // width)
    return dict(images_ptr=images, masked_ptr=masked, S=masked.shape[1] + 1, **geometry)


def _fold(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Put mean and deviation into the weight, [K, D] in the order of memory, and into the bias, [D] float32."""
    # times 128, which the kernel divides the sum by: else float16 weights near 1e-4 would be subnormal numbers
    folded = weight.float().permute(2, 3, 1, 0) * (128 / (255 * std))[:, None]
    folded = folded.flatten(0, 2).to(dtype).contiguous()
    shift = folded.float().unflatten(0, (-1, 3)).sum(0) * (1 - 255 / 128 * mean)[:, None]
    return folded, bias.float() + shift.sum(0)


@torch.library.custom_op("fastbeit::masked_embed_fwd", mutates_args=())
def _forward(
    images: Tensor,
    masked: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    (B, N), D, tiles = masked.shape, len(weight), product_tiles(dtype)
    T = B * (N + 1)
    folded, shift = _fold(weight, bias, mean, std, dtype)
    tokens = torch.empty(B, N + 1, D, device=images.device, dtype=out_dtype)
    _masked_embed_fwd_kernel[(triton.cdiv(T, tiles["BLOCK_T"]) * triton.cdiv(D, tiles["BLOCK_D"]),)](
        folded_ptr=folded,
        shift_ptr=shift,
        cls_token_ptr=cls_token,
        mask_token_ptr=mask_token,
        positions_ptr=positions,
        tokens_ptr=tokens,
        T=T,
        D=D,
        HAS_POSITIONS=positions is not None,
        **_source(images, masked, weight.shape[2:]),
        **tiles,
    )
    return tokens


@_forward.register_fake
def _(images, masked, weight, bias, cls_token, mask_token, positions, mean, std, dtype, out_dtype) -> Tensor:
    return images.new_empty(len(images), masked.shape[1] + 1, len(weight), dtype=out_dtype)


def _sums(grad_tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each place summed over the images, [S, D] float32: where pixels show, and where not."""
    (B, S, D), tiles = grad_tokens.shape, sums_tiles(grad_tokens.dtype)
    visible, hidden = (torch.empty(S, D, device=masked.device, dtype=torch.float32) for _ in range(2))
    _masked_embed_bwd_sums_kernel[(triton.cdiv(D, tiles["BLOCK_D"]), S)](
        grad_tokens_ptr=grad_tokens, masked_ptr=masked, visible_ptr=visible, hidden_ptr=hidden, B=B, S=S, D=D, **tiles
    )
    return visible, hidden


def _unfolded_product(grad: Tensor, source: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """[D, K] float32: grad^T @ (unfolded pixels - 128), of the gradient [T, D], over the tokens that show pixels."""
    (T, D), K, block = grad.shape, source["K"], UNFOLD_TILES["BLOCK_T"]
    # whole blocks: each chunk starts at a multiple of 16, and one compiled kernel serves them all
    rows = max(UNFOLD_BYTES // (K * dtype.itemsize) // block, 1) * block
    unfolded = torch.empty(min(rows, T), K, device=grad.device, dtype=dtype)
    product = torch.zeros(D, K, device=grad.device, dtype=torch.float32)
    for start in range(0, T, rows):
        chunk = grad[start : start + rows].to(dtype)
        _masked_embed_bwd_unfold_kernel[(triton.cdiv(K, UNFOLD_TILES["BLOCK_K"]), triton.cdiv(len(chunk), block))](
            unfolded_ptr=unfolded, start_t=start, T=len(chunk), **source, **UNFOLD_TILES
        )
        a, b = chunk.T, unfolded[: len(chunk)]
        with without_autocast(grad.device):  # on where the caller goes backward under it
            if dtype == torch.float32 or not grad.is_cuda:  # only CUDA sums products of 16 bits into float32
                product += torch.mm(a.float(), b.float())
            else:
                product += torch.mm(a, b, out_dtype=torch.float32)
    return product


@torch.library.custom_op("fastbeit::masked_embed_bwd", mutates_args=())
def _backward(
    grad_tokens: Tensor,
    images: Tensor,
    masked: Tensor,
    mean: Tensor,
    std: Tensor,
    patch_size: Sequence[int],
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Float32 gradients of weight, bias, cls token, mask token and positions: those that are `wanted`."""
    weight, bias, cls_token, mask_token, positions = wanted
    visible, hidden = _sums(grad_tokens, masked)
    grads = []
    if weight:
        product = _unfolded_product(grad_tokens.flatten(0, 1), _source(images, masked, patch_size), dtype)
        grad_folded = product.unflatten(1, (*patch_size, 3)) + visible.sum(0)[:, None, None, None] * (128 - 255 * mean)
        grads.append((grad_folded / (255 * std)).permute(0, 3, 1, 2).contiguous())
    if bias:
        grads.append(visible.sum(0))
    if cls_token:
        grads.append(hidden[0].clone())
    if mask_token:
        grads.append(hidden[1:].sum(0))
    if positions:
        grads.append(visible + hidden)
    return grads


@_backward.register_fake
def _(grad_tokens, images, masked, mean, std, patch_size, dtype, wanted) -> list[Tensor]:
    _, S, D = grad_tokens.shape
    shapes = (D, 3, *patch_size), (D,), (D,), (D,), (S, D)
    return [mean.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output) -> None:
    images, masked, weight, *_, mean, std, ctx.dtype, _ = inputs
    ctx.save_for_backward(images, masked, mean, std)
    ctx.patch_size = list(weight.shape[2:])


def _autograd(ctx, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_order("masked_embed", grad_tokens)
    wanted = list(ctx.needs_input_grad[2:7])
    # `.sum().backward()` hands over stride-0 gradients
    grads = iter(_backward(grad_tokens.contiguous(), *ctx.saved_tensors, ctx.patch_size, ctx.dtype, wanted))
    given = (next(grads) if want else None for want in wanted)  # autograd casts them to the dtypes of the parameters
    return None, None, *given, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# the product over all patches, masked or not, as FlopCounterMode counts the reference
@register_flop_formula(torch.ops.fastbeit.masked_embed_fwd)
def _forward_flops(images_shape, masked_shape, weight_shape, *_, **__) -> int:
    return 2 * prod(masked_shape) * prod(weight_shape)


@register_flop_formula(torch.ops.fastbeit.masked_embed_bwd)
def _backward_flops(grad_shape, images_shape, masked_shape, mean, std, patch_size, dtype, wanted, **_) -> int:
    return 2 * prod(masked_shape) * grad_shape[2] * 3 * prod(patch_size) if wanted[0] else 0


def masked_embed(
    images: Tensor,
    masked: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Give the tokens of images some of whose patches are masked: cls, then the patches in row-major order.

    Triton reads no pixel of a masked patch, and makes no unfolded or floating-point copy of the images. Its sums are
    float32 and the same to the bit on each run; nothing waits for the device.

    Args:
        images: [B, height, width, 3] uint8; height and width are multiples of a patch's.
        masked: [B, N] bool: the patches that become the mask token.
        weight: [D, 3, patch height, patch width], in any layout, of a convolution whose stride is its kernel.
        bias, cls_token, mask_token: [D].
        positions: [N + 1, D], added to the tokens; or None.
        mean, std: [3] float32, of the channels of pixels in [0, 1].
        dtype: what the product computes in; None: autocast's where it is on, else the weight's.
        out_dtype: of the tokens; None: the weight's.
        backend: "triton", "reference" (plain PyTorch), or "auto": "triton" on CUDA, else "reference".

    Returns:
        [B, N + 1, D]. Each parameter gets its gradient in its own dtype. All dtypes: float32, bfloat16 or float16.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor other than the weight is not contiguous.
        RuntimeError: Triton: a second or a forward-mode derivative is wanted; the reference has them.
    """
    args = images, masked, weight, bias, cls_token, mask_token, positions, mean, std
    dtypes = product_dtype(dtype, weight), out_dtype or weight.dtype
    names = "images", "masked", "weight", "bias", "cls_token", "mask_token", "positions", "mean", "std"
    _check({name: x for name, x in zip(names, args, strict=True) if x is not None}, *dtypes)
    if not uses_triton(backend, images.device):
        return masked_embed_reference(*args, *dtypes)
    refuse_tangents("masked_embed", weight, bias, cls_token, mask_token, positions, mean, std)
    return _forward(*args, *dtypes)


def _check(tensors: dict[str, Tensor], *dtypes: torch.dtype) -> None:
    images, weight = tensors["images"], tensors["weight"]
    if images.ndim != 4 or images.shape[3] != 3 or weight.ndim != 4 or weight.shape[1] != 3:
        got = f"{list(images.shape)} and {list(weight.shape)}"
        raise ValueError(f"masked_embed wants images [B, height, width, 3] and weight [D, 3, height, width]; got {got}")
    (B, *size, _), (D, _, *patch_size) = images.shape, weight.shape
    if any(whole % part for whole, part in zip(size, patch_size, strict=True)):
        raise ValueError(f"masked_embed wants images of whole patches {patch_size}; got {size}: crop or resize them")
    N = prod(size) // prod(patch_size)
    shapes = dict(masked=(B, N), positions=(N + 1, D), mean=(3,), std=(3,), images=images.shape, weight=weight.shape)
    kinds = dict(images=torch.uint8, masked=torch.bool, mean=torch.float32, std=torch.float32)
    for name, x in tensors.items():
        shape, allowed = shapes.get(name, (D,)), (kinds[name],) if name in kinds else DTYPES
        contiguous = name == "weight" or x.is_contiguous()
        if x.shape != shape or x.dtype not in allowed or x.device != images.device or not contiguous:
            want = f"{name} {list(shape)}, {' or '.join(map(str, allowed))}, contiguous, on {images.device}"
            got = f"{list(x.shape)}, {x.dtype}, strides {list(x.stride())}, on {x.device}"
            raise ValueError(f"masked_embed wants {want}; got {got}")
    if not set(dtypes) <= set(DTYPES):
        raise ValueError(f"masked_embed computes in and gives {' or '.join(map(str, DTYPES))}; got {dtypes}")
