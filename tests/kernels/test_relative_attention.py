from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastbeit_kernels.relative_attention import relative_attention, relative_attention_reference
from helpers.launchers import GuardZones, NoSync, between_nans, shuffle_programs
from helpers.numerics import assert_within_budget

module = import_module("fastbeit_kernels.relative_attention")  # the package has the function by this name

DTYPES = torch.float32, torch.bfloat16, torch.float16
NAMES = "out", "grad_qkv", "grad_bias"


def make_inputs(device: str, B: int = 2, S: int = 20, H: int = 2, K: int = 16, padding: int = 3) -> dict[str, Tensor]:
    """float32, between NaNs. Scores deviate by 3 or so: the softmax has peaks. Of the bias, what is past S is NaN."""
    gen = torch.Generator(device).manual_seed(B * S)
    qkv = torch.randn(B, S, 3, H, K, generator=gen, device=device)
    qkv[:, :, 0] *= 3
    bias = torch.randn(H, S, S + padding, generator=gen, device=device)
    bias[..., S:] = float("nan")
    return dict(qkv=between_nans(qkv), bias=between_nans(bias))


def run(fn: Any, inputs: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the gradients of qkv and bias; those of columns past S left out."""
    S = inputs["qkv"].shape[1]
    qkv, bias = inputs["qkv"].to(dtype).requires_grad_(), inputs["bias"].detach().requires_grad_()
    out = fn(qkv, bias.double() if dtype == torch.float64 else bias, **kwargs)
    gen = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=gen, device=out.device).to(torch.bfloat16).to(out.dtype)
    grad_qkv, grad_bias = torch.autograd.grad(out, (qkv, bias), grad)
    assert not grad_bias[..., S:].any()
    return out.detach(), grad_qkv, grad_bias[..., :S]


def run_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run(relative_attention, *args, **kwargs, backend="triton")


def assert_all_within_budget(inputs: dict[str, Tensor], fast: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    # in float64 from what the kernel was given: qkv as it was rounded
    rounded = inputs | dict(qkv=inputs["qkv"].to(dtype))
    eager, exact = (run(relative_attention_reference, rounded, kind) for kind in (dtype, torch.float64))
    for name, *fast_eager_exact in zip(NAMES, fast, eager, exact, strict=True):
        # gradients of the bias too err as 16 bits do: they are sums of such
        got, plain, truth = fast_eager_exact
        assert_within_budget(name, got.to(dtype), plain.to(dtype), truth.double(), terms=197)


# 197 tokens and heads of 64 are BEiT's own; 70 and 20 leave ragged last tiles, 16 fills its row of the bias
@pytest.mark.parametrize("B, S, H, K", [(2, 197, 1, 64), (3, 70, 2, 64), (5, 20, 3, 16), (2, 16, 1, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_attention(device: str, dtype: torch.dtype, B: int, S: int, H: int, K: int):
    inputs = make_inputs(device, B, S, H, K)
    with GuardZones() as zones:
        fast = run_triton(inputs, dtype)
    zones.check()
    assert fast[0].shape == (B, S, H * K) and [x.dtype for x in fast] == [dtype, dtype, torch.float32]
    assert_all_within_budget(inputs, fast, dtype)


# 5 images of 2 leave a ragged last workspace, and groups of 2 a ragged last group; 4 leave an empty one
@pytest.mark.parametrize("images, group", [(2, 1), (4, 2), (3, 2), (1, 16)])
def test_images_in_parts(device: str, images: int, group: int, monkeypatch: pytest.MonkeyPatch):
    """Sums over images are exact where the gradient has few bits, in any order: here they are merely close."""
    inputs = make_inputs(device, B=5)
    whole = run_triton(inputs, torch.float32)
    tiles = module.query_tiles(torch.float32, 0) | dict(GROUP=group)
    monkeypatch.setattr(module, "query_tiles", lambda *_: tiles)
    launches, kernel = [], module._relative_attention_bwd_keys_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid[2])
            return kernel[grid]

    monkeypatch.setattr(module, "_relative_attention_bwd_keys_kernel", Counted())
    parts = run_triton(inputs, torch.float32, workspace=images * 2 * 20 * 32 * 4)
    assert launches == [min(images, 5 - first) for first in range(0, 5, images)]
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_i, block_j", [(16, 32), (32, 16), (64, 64)])
def test_tiles_change_nothing(device: str, block_i: int, block_j: int, monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(device, S=70)
    expected = run_triton(inputs, torch.float32)
    for name in ("forward_tiles", "key_tiles"):
        tiles = dict(BLOCK_I=block_i, BLOCK_J=block_j, num_warps=4, num_stages=1)
        monkeypatch.setattr(module, name, lambda _, tiles=tiles: tiles)
    for got, same in zip(run_triton(inputs, torch.float32), expected, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)  # sums in another order


def test_query_tiles_fit_the_device():
    """What the compile gate holds against each chip."""
    stages = [module.query_tiles(torch.bfloat16, kib * 1024)["num_stages"] for kib in (227, 163, 99)]
    assert stages == [3, 3, 2]


def test_reference_is_fused_attention(device: str):
    """PyTorch's own, in float64."""
    inputs = make_inputs(device, S=33)

    def fused(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[..., :33]).transpose(1, 2).flatten(2)

    for got, expected in zip(
        run(relative_attention_reference, inputs, torch.float64), run(fused, inputs, torch.float64), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [200.0, -200.0])
def test_large_scores_do_not_overflow(device: str, size: float):
    inputs = make_inputs(device, S=33)
    inputs["bias"] += size
    fast, exact = run_triton(inputs, torch.float32), run(relative_attention_reference, inputs, torch.float64)
    for name, got, expected in zip(NAMES, fast, exact, strict=True):
        # a score near 289 bits is rounded to 2e-5
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < 1e-4, f"{name} errs by {error:.1e}"


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["qkv", "bias", "none"])
def test_every_subset_of_gradients(device: str, backend: Any, wanted: tuple[bool, bool]):
    inputs = make_inputs(device, S=33)
    everything = run(relative_attention, inputs, torch.float32, backend=backend)
    qkv, bias = (x.detach().requires_grad_(want) for x, want in zip(inputs.values(), wanted, strict=True))
    out = relative_attention(qkv, bias, backend=backend)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        gen = torch.Generator(device).manual_seed(1)
        out.backward(torch.randn(out.shape, generator=gen, device=device).to(torch.bfloat16).float())
    for x, want, expected in zip((qkv, bias), wanted, everything[1:], strict=True):
        assert (x.grad is not None) == want
        assert x.grad is None or torch.equal(x.grad[..., : expected.shape[-1]], expected)


def test_programs_are_independent_and_write_only_their_own(device: str, monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(device, S=70)
    first = run_triton(inputs, torch.bfloat16)
    again = run_triton(inputs, torch.bfloat16)
    with NoSync():
        relative_attention(inputs["qkv"].requires_grad_(), inputs["bias"], backend="triton").sum().backward()
    inputs["qkv"].requires_grad_(False)
    shuffle_programs(monkeypatch)
    shuffled = run_triton(inputs, torch.bfloat16)
    for other in (again, shuffled):
        for name, a, b in zip(NAMES, first, other, strict=True):
            assert torch.equal(a, b), f"{name} differs between two runs"


def test_images_do_not_touch_each_other(device: str):
    """An image's result does not depend on what else is in the batch."""
    inputs = make_inputs(device, B=3, S=33)
    expected = relative_attention(inputs["qkv"], inputs["bias"], backend="triton")[1]
    inputs["qkv"][0], inputs["qkv"][2] = 1e3, -1e3
    assert torch.equal(relative_attention(inputs["qkv"], inputs["bias"], backend="triton")[1], expected)


def test_gradients_in_any_layout(device: str):
    """Stride 0, as of `.sum()`, and transposed."""
    inputs = make_inputs(device)
    qkv = inputs["qkv"].detach().requires_grad_()
    out = relative_attention(qkv, inputs["bias"], backend="triton")
    ones, turned = torch.ones((), device=device).expand(out.shape), torch.randn(32, 20, 2, device=device)
    for grad in (ones, turned.permute(2, 1, 0)):
        got, expected = (torch.autograd.grad(out, qkv, g, retain_graph=True) for g in (grad, grad.contiguous()))
        assert torch.equal(*got, *expected)


def test_ops_are_good_citizens(device: str):
    """Schema, fake kernels and autograd registration agree with what the ops do."""
    inputs = make_inputs(device, B=1, H=1)
    inputs["bias"] = inputs["bias"].nan_to_num()  # compared elsewhere
    qkv, bias = (x.detach().requires_grad_() for x in inputs.values())
    torch.library.opcheck(torch.ops.fastbeit.relative_attention_fwd.default, (qkv, bias, 0))
    with torch.no_grad():
        out, lse = torch.ops.fastbeit.relative_attention_fwd(qkv, bias, 0)
    args = torch.ones_like(out), qkv.detach(), bias.detach(), out, lse, 0
    torch.library.opcheck(torch.ops.fastbeit.relative_attention_bwd.default, args)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_without_a_graph_break(device: str, backend: str):
    inputs = make_inputs(device)
    compiled = torch.compile(relative_attention, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, inputs, torch.float32, backend=backend) for fn in (relative_attention, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_auto_means_triton_on_cuda_and_reference_elsewhere(place: str):
    """Traced with tensors of no memory, which may lie on a GPU that is not there."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        qkv = torch.empty(4, 197, 3, 12, 64, device=place, dtype=torch.bfloat16)
        out = relative_attention(qkv, torch.empty(12, 197, 208, device=place))
        assert out.shape == (4, 197, 768) and out.dtype == torch.bfloat16 and out.device.type == place
    assert counter.get_total_flops() == 4 * 4 * 12 * 197 * 197 * 64
    assert (torch.ops.fastbeit.relative_attention_fwd in counter.get_flop_counts()["Global"]) == (place == "cuda")


def test_flops_are_those_of_fused_attention(device: str):
    """4 a score and value forward, 10 backward: FlopCounterMode counts scores that are computed again."""
    inputs = make_inputs(device)
    with FlopCounterMode(display=False) as counter:
        run_triton(inputs, torch.float32)
    assert counter.get_total_flops() == 14 * 2 * 2 * 20 * 20 * 16


def test_wrong_input_is_named():
    inputs = make_inputs("cpu")
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(qkv=torch.zeros(2, 20, 96)), r"qkv \[B, S, 3, H, K\]; got \[2, 20, 96\]"),
        (dict(qkv=torch.zeros(2, 20, 2, 2, 16)), r"qkv \[B, S, 3, H, K\]; got \[2, 20, 2, 2, 16\]"),
        (dict(bias=torch.zeros(2, 20, 19)), r"bias \[2, 20, 20 or more\]; got \[2, 20, 19\]"),
        (dict(bias=torch.zeros(3, 20, 20)), r"bias \[2, 20, 20 or more\]; got \[3, 20, 20\]"),
        (dict(bias=torch.zeros(2, 20, 20).half()), "bias float32 on one device; got .* torch.float16 on cpu"),
        (dict(bias=torch.zeros(2, 20, 20, device="meta")), "on one device; got .* torch.float32 on meta"),
        (dict(qkv=inputs["qkv"].double()), "qkv torch.float32 or .*; got torch.float64"),
        (dict(qkv=inputs["qkv"].transpose(0, 1).contiguous().transpose(0, 1)), "contiguous qkv; got strides"),
        (dict(workspace=0), "a workspace of at least 1 byte; got 0"),
        (dict(backend="cuda"), "backend wants one of auto, triton, reference; got 'cuda'"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            args: dict[str, Any] = inputs | dict(backend="reference") | change
            relative_attention(**args)


def test_what_triton_refuses(device: str):
    for S, K, message in ((257, 16, "at most 256 tokens; got 257"), (20, 24, "power of two, 16 or more; got 24")):
        qkv, bias = torch.zeros(1, S, 3, 1, K, device=device), torch.zeros(1, S, S, device=device)
        with pytest.raises(ValueError, match=message):
            relative_attention(qkv, bias, backend="triton")
        assert relative_attention(qkv, bias, backend="reference").shape == (1, S, K)
