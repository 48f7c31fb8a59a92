"""Attention: its bias, its formula, and every backend that computes it."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from fastbeit.config.running import AttentionBackend, KernelsConfig
from fastbeit.model import attention as module
from fastbeit.model.attention import (
    Attention,
    GatherBias,
    RelativePositionBias,
    attend,
    attention_choice,
    check_attention,
    inverse_index,
    relative_position_index,
)
from helpers.weights import randomise


def test_relative_position_index():
    """Numbers of the authors' buffer."""
    index = relative_position_index((14, 14))
    assert index.shape == (197, 197) and index.dtype == torch.int64
    pairs = [(1, 1), (1, 2), (1, 15), (2, 1), (196, 1), (1, 196), (100, 50)]
    assert [int(index[pair]) for pair in pairs] == [364, 363, 337, 365, 728, 0, 466]
    assert index.sum() == 14_270_119 and index.trace() == 72_075
    assert (index[1:, 1:] + index[1:, 1:].T == 728).all()
    assert (index[0, 1:] == 729).all() and (index[1:, 0] == 730).all() and index[0, 0] == 731
    assert len(index.unique()) == 732


def test_relative_position_index_of_a_rectangle():
    height, width = 3, 5
    index = relative_position_index((height, width))
    assert (index[0, 1:] == 45).all() and (index[1:, 0] == 46).all() and index[0, 0] == 47
    for query in range(height * width):
        for key in range(height * width):
            (y, x), (v, u) = divmod(query, width), divmod(key, width)
            assert index[query + 1, key + 1] == (y - v + height - 1) * (2 * width - 1) + (x - u + width - 1)


# 197 tokens; a rectangle; 16 tokens, whose rows need no padding
@pytest.mark.parametrize("grid", [(14, 14), (2, 3), (3, 5)])
def test_bias_and_its_gradient(grid):
    """float64 against indexing and its own gradient; the sums of both run over the same numbers."""
    torch.manual_seed(0)
    index = relative_position_index(grid)
    table = torch.randn(int(index.max()) + 1, 3, dtype=torch.float64, requires_grad=True)
    bias = GatherBias.apply(table, index, inverse_index(index))
    expected = table[index].permute(2, 0, 1)
    assert torch.equal(bias, expected)
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((bias * weight).sum(), table)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), table)
    torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


def test_bias_rows_are_aligned_and_finite():
    module = RelativePositionBias((14, 14), 12)
    randomise(module)
    bias = module()
    assert bias.shape == (12, 197, 208) and bias.dtype == torch.float32
    assert not bias[..., 197:].any()


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
@pytest.mark.parametrize("has_table", [False, True])
def test_attention_is_its_formula(device: str, has_table: bool, backend: Any):
    """q is scaled with its bias; the relative-position bias is not; a bias of the keys would change nothing."""
    torch.manual_seed(0)
    grid, width, num_heads = (3, 4), 48, 3
    attention: Any = Attention(width, num_heads, grid if has_table else None, backend).to(device)
    randomise(attention)
    table = RelativePositionBias(grid, num_heads).to(device)
    randomise(table)
    x, shared = torch.randn(2, 13, width, device=device), table()
    bias = shared
    if has_table:
        bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
    for key_bias in (torch.zeros(width, device=device), torch.randn(width, device=device)):
        qkv = x @ attention.qkv.weight.T + torch.cat((attention.q_bias, key_bias, attention.v_bias))
        q, k, v = qkv.view(2, 13, 3, num_heads, 16).permute(2, 0, 3, 1, 4)
        out = ((q / 4) @ k.mT + bias[..., :13]).softmax(-1) @ v
        expected = attention.proj(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, shared, None), expected, atol=1e-5, rtol=1e-5)


def attend_all(backend: Any, qkv: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output and the gradients of a loss of it."""
    leaves = [x.detach().requires_grad_() for x in (qkv, bias) if x is not None]
    out = attend(leaves[0], leaves[1] if bias is not None else None, backend)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("has_bias", [True, False])
def test_backends_agree(device: str, has_bias: bool):
    """Outputs and gradients in float32, through each that runs here; xformers' runs on CUDA alone."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 21, 3, 2, 16, device=device)
    bias = torch.randn(2, 21, 32, device=device) if has_bias else None
    expected = attend_all("eager", qkv.double(), bias)
    for backend in ("sdpa", "eager", "triton", "auto"):
        for got, exact in zip(attend_all(backend, qkv, bias), expected, strict=True):
            torch.testing.assert_close(got.double(), exact.double(), atol=2e-5, rtol=1e-5)


def test_training_and_evaluation_agree(device: str):
    """One kernel serves a bias that is trained, and one that is not; but PyTorch's own on a CPU takes two."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(2, 21, 3, 2, 16, device=device), torch.randn(2, 21, 32, device=device)
    for backend in ("sdpa", "eager", "triton"):
        trained = attend(qkv, bias.requires_grad_(), backend)
        with torch.no_grad():
            evaluated = attend(qkv, bias.detach(), backend)
        close = 1e-5 if backend == "sdpa" and device == "cpu" else 0
        torch.testing.assert_close(trained, evaluated, atol=close, rtol=close)


def test_auto_takes_triton_where_it_serves(monkeypatch: pytest.MonkeyPatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention_choice("auto", cuda, 197, 64, has_bias=True) == ("triton", "on cuda")
    assert attention_choice("auto", cpu, 197, 64, has_bias=True) == ("sdpa", "on cpu")
    assert attention_choice("auto", cuda, 577, 64, has_bias=True)[1] == "triton wants at most 256 tokens; got 577"
    assert attention_choice("auto", cuda, 197, 80, has_bias=True)[0] == "sdpa"
    assert attention_choice("auto", cuda, 197, 64, has_bias=False)[0] == "sdpa"
    for backend in get_args(AttentionBackend)[1:]:
        assert attention_choice(backend, cpu, 577, 80, has_bias=True) == (backend, "as set")
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert attention_choice("auto", cuda, 197, 64, has_bias=True) == ("sdpa", "triton is not installed")


def test_the_mask_has_the_dtype_of_queries():
    """In float32 beside queries of 16 bits PyTorch may be silently wrong."""
    qkv, bias = torch.zeros(3, 21, 3, 2, 16, dtype=torch.bfloat16), torch.randn(2, 21, 32)
    mask = module._mask(qkv, bias)
    assert mask is not None and mask.dtype == torch.bfloat16 and mask.shape == (3, 2, 21, 21)
    assert mask.stride() == (0, 21 * 32, 32, 1)  # aligned rows, one copy for all images


@pytest.mark.parametrize("place, has_bias, held", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_fused_attention_is_held_on_cuda(place: str, has_bias: bool, held: bool, monkeypatch: pytest.MonkeyPatch):
    """Never cuDNN's with a bias: that of training would differ, and S % 128 == 64 be NaN."""
    asked: list[list[SDPBackend]] = []
    monkeypatch.setattr(module, "sdpa_kernel", lambda backends: asked.append(backends) or module.nullcontext())
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: q)
    monkeypatch.setattr(module, "_mask", lambda qkv, bias: bias)  # a cast wants a device that is there
    with FakeTensorMode():
        qkv = torch.empty(2, 192, 3, 2, 64, dtype=torch.bfloat16, device=place)
        attend(qkv, torch.empty(2, 192, 192, device=place) if has_bias else None, "sdpa")
    assert asked == ([[SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]] if held else [])


def test_what_does_not_run_is_said(device: str, monkeypatch: pytest.MonkeyPatch):
    shape: tuple[Any, ...] = torch.device(device), torch.float32, 21, 2, 16
    for backend in ("sdpa", "eager", "triton"):
        assert check_attention(backend, *shape) is None
    if device == "cpu":
        refused = check_attention("xformers", *shape)
        assert refused and "cuda" in refused
    refused = check_attention("triton", torch.device(device), torch.float32, 300, 2, 16)
    assert refused and "at most 256 tokens; got 300" in refused
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    refused = check_attention("xformers", *shape)
    assert refused and "pip install xformers" in refused


def test_one_word_for_all_kernels_and_one_for_attention():
    assert KernelsConfig().by_op.attention == "auto"
    assert KernelsConfig(backend="reference").by_op.attention == "sdpa"
    assert KernelsConfig(backend="triton").by_op.attention == "auto"
    assert KernelsConfig(backend="triton", attention="eager").by_op.attention == "eager"


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
def test_compiles_without_a_graph_break(device: str, backend: Any):
    torch.manual_seed(0)
    qkv, bias = torch.randn(2, 21, 3, 2, 16, device=device), torch.randn(2, 21, 32, device=device)
    compiled: Any = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (qkv, bias)]
    out = compiled(*leaves, backend)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close([out, *grads], attend_all(backend, qkv, bias), atol=0, rtol=0)
