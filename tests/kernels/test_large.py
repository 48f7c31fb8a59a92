"""Tensors of more than 2^31 values, where an offset of 32 bits would wrap: on a GPU that holds them."""

import pytest
import torch
from torch import Tensor

from fastbeit_kernels.cross_entropy import cross_entropy
from fastbeit_kernels.masked_embed import masked_embed
from fastbeit_kernels.relative_attention import relative_attention

GIB = 2**30
room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
# one after the other, also where tests run in several processes: each takes some 15 GiB
pytestmark = [
    pytest.mark.skipif(room < 40 * GIB, reason="wants a GPU with 40 GiB free"),
    pytest.mark.xdist_group("large"),
]
LIMIT = 2**31


def randn(*shape: int, seed: int = 0) -> Tensor:
    gen = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=gen, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("V", [8192, 2**16])
def test_cross_entropy(V: int):
    """The last rows of many are as they are alone, forward and backward."""
    R = LIMIT // V + 8
    logits, labels = randn(R, V).requires_grad_(), torch.arange(R, device="cuda") % V
    one = torch.ones((), device="cuda")
    (grad,) = torch.autograd.grad(cross_entropy(logits, labels, one, backend="triton")[0], logits)
    last = logits.detach()[-4:].requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(last, labels[-4:], one, backend="triton")[0], last)
    assert logits.numel() > LIMIT and torch.equal(grad[-4:], expected)


def test_masked_embed():
    """Tokens of the last images, and a gradient that comes from them alone."""
    B, N, D = LIMIT // (196 * 768) + 8, 196, 768
    images = torch.randint(256, (B, 224, 224, 3), device="cuda", dtype=torch.uint8)
    masked = torch.arange(N, device="cuda").expand(B, -1) % 3 == 0
    weight, token = randn(D, 3, 16, 16).requires_grad_(), randn(D)
    half = torch.full((3,), 0.5, device="cuda")

    def embed(first: int) -> Tensor:
        args = images[first:], masked[first:].contiguous(), weight, token, token, token, None, half, half
        return masked_embed(*args, backend="triton")

    tokens, last = embed(0), embed(B - 2)
    assert tokens.numel() > LIMIT and images.numel() > LIMIT and torch.equal(tokens[-2:], last)
    grad = torch.zeros_like(tokens)
    grad[-2:] = randn(*last.shape, seed=1)
    (got,), (expected,) = (torch.autograd.grad(t, weight, g) for t, g in ((tokens, grad), (last, grad[-2:])))
    # sums over all images, of which all others are zeros, in chunks of others
    assert (got.float() - expected.float()).norm() <= 2**-8 * expected.float().norm()


def test_relative_attention():
    """The last images of many, forward and backward; the bias's gradient comes from them alone."""
    B, S, H, K = LIMIT // (197 * 3 * 768) + 8, 197, 12, 64
    qkv, bias = randn(B, S, 3, H, K).requires_grad_(), randn(H, S, S).float().requires_grad_()
    out = relative_attention(qkv, bias, backend="triton")
    grad = torch.zeros_like(out)
    grad[-2:] = randn(2, S, H * K, seed=1)
    got = torch.autograd.grad(out, (qkv, bias), grad)
    last = qkv.detach()[-2:].requires_grad_()
    alone = relative_attention(last, bias, backend="triton")
    expected = torch.autograd.grad(alone, (last, bias), grad[-2:])
    assert qkv.numel() > LIMIT and torch.equal(out[-2:], alone) and torch.equal(got[0][-2:], expected[0])
    assert not got[0][:2].any()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
