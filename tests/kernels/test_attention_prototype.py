"""The prototype of attention with a shared bias against float64, forward and backward."""

import pytest
import torch
from torch import Tensor

from benchmarks.attention_prototype import FORWARD_TILES, KEY_TILES, QUERY_TILES, attention_reference, backward, forward


def make(device: str, B: int, S: int, H: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias and grad_out; scores of deviation 3, so that the softmax has peaks."""
    gen = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, S, 3, H, K, generator=gen, device=device)
    qkv[:, :, 0] *= 3
    bias = torch.randn(H, S, -(-S // 16) * 16, generator=gen, device=device)
    bias[..., S:] = float("nan")  # what is past the end counts for nothing
    grad_out = torch.randn(B, S, H * K, generator=gen, device=device)
    return qkv.to(dtype), bias.to(dtype), grad_out.to(dtype)


def by_reference(qkv: Tensor, bias: Tensor, grad_out: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    S = qkv.shape[1]
    qkv, bias = qkv.to(dtype).requires_grad_(), bias.to(dtype)[..., :S].requires_grad_()
    out = attention_reference(qkv, bias)
    grad_qkv, grad_bias = torch.autograd.grad(out, (qkv, bias), grad_out.to(dtype))
    return dict(out=out.detach(), grad_qkv=grad_qkv, grad_bias=grad_bias)


# 70 tokens leave a ragged last tile and 10 columns of padding, 197 are BEiT's own; 3 images in a workspace of 2 leave a
# ragged last one, and 5 in groups of 2 a ragged last group, and an empty one where the workspace holds 4
@pytest.mark.parametrize(
    "B, S, H, K, images, group",
    [(3, 70, 2, 64, 2, 1), (2, 197, 1, 64, 1, 16), (5, 20, 2, 16, 4, 2), (1, 16, 1, 32, 8, 3)],
)
def test_float32(device: str, B: int, S: int, H: int, K: int, images: int, group: int):
    inputs = qkv, bias, grad_out = make(device, B, S, H, K, torch.float32)
    out, lse = forward(qkv, bias)
    grad_qkv, grad_bias = backward(grad_out, qkv, bias, out, lse, images=images, group=group)
    assert grad_bias.shape == bias.shape and not grad_bias[..., S:].any()
    got = dict(out=out, grad_qkv=grad_qkv, grad_bias=grad_bias[..., :S])
    for name, exact in by_reference(*inputs, torch.float64).items():
        error = (got[name].double() - exact).abs().max() / exact.abs().max()
        # sums of up to 197 products of 64, rounded to 6e-8 each time: 7e-7 is the most that was seen
        assert error < 2e-6, f"{name} errs by {error:.1e}"


def test_bfloat16(device: str):
    """Errs no more than twice what plain PyTorch does in bfloat16, in norm: both round weights and their gradients."""
    inputs = qkv, bias, grad_out = make(device, 3, 70, 2, 64, torch.bfloat16)
    out, lse = forward(qkv, bias)
    grad_qkv, grad_bias = backward(grad_out, qkv, bias, out, lse, images=2)
    got = dict(out=out, grad_qkv=grad_qkv, grad_bias=grad_bias[..., :70])
    exact, eager = (by_reference(*inputs, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, value in exact.items():
        error, allowed = ((x[name].double() - value).norm() / value.norm() for x in (got, eager))
        assert error <= 2 * allowed, f"{name} errs by {error:.1e}, eager by {allowed:.1e}"


# every launch that `benchmarks.first_hour` asks for goes by one of these numbers
@pytest.mark.parametrize("block_i, block_j", [(16, 32), (32, 16), (128, 64)])
def test_tiles_change_nothing(device: str, block_i: int, block_j: int):
    qkv, bias, grad_out = make(device, 2, 70, 1, 64, torch.float32)
    tiles = dict(BLOCK_I=block_i, BLOCK_J=block_j)
    out, lse = forward(qkv, bias, FORWARD_TILES | tiles)
    grads = backward(
        grad_out, qkv, bias, out, lse, key_tiles=KEY_TILES | tiles, query_tiles=QUERY_TILES | dict(BLOCK_I=block_i)
    )
    expected = forward(qkv, bias)
    expected = *expected, *backward(grad_out, qkv, bias, *expected)
    for got, same in zip((out, lse, *grads), expected, strict=True):
        torch.testing.assert_close(got, same, atol=1e-5, rtol=1e-5)  # sums in another order


def test_what_it_refuses(device: str):
    qkv, bias, _ = make(device, 1, 20, 2, 16, torch.float32)
    for wrong in (
        (qkv[:, :, :2], bias),
        (qkv[..., :8], bias),
        (qkv, bias[..., :20]),
        (qkv, bias.half()),
        (qkv.transpose(0, 1).contiguous().transpose(0, 1).expand(2, -1, -1, -1, -1), bias),
    ):
        with pytest.raises(ValueError, match="attention wants"):
            forward(*wrong)
    with pytest.raises(ValueError, match="multiples of 16; got 24"):
        forward(qkv, bias, FORWARD_TILES | dict(BLOCK_J=24))
