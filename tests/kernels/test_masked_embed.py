import sys
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels.traffic import Traffic
from fastbeit_kernels.backend import INTERPRETED
from fastbeit_kernels.masked_embed import masked_embed, masked_embed_reference
from helpers.launchers import GUARD_BYTES, GuardZones, NoSync, between_nans, shuffle_programs
from helpers.numerics import assert_within_budget
from helpers.waiting import finished

module = import_module("fastbeit_kernels.masked_embed")  # the package has the function by this name

PARAMETERS = "weight", "bias", "cls_token", "mask_token", "positions"
DTYPES = torch.float32, torch.bfloat16, torch.float16
Size = tuple[int, int]


def make_inputs(
    device: str, B: int = 2, grid: Size = (2, 3), patch: Size = (8, 8), D: int = 40, share: float = 0.4
) -> dict[str, Any]:
    """Arguments of `masked_embed` with a share of the patches masked; floats between NaNs, parameters float32."""
    gen = torch.Generator(device).manual_seed(B * D)
    size, N, K = (grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1], 3 * patch[0] * patch[1]

    def normal(*shape: int) -> Tensor:
        return between_nans(torch.randn(shape, generator=gen, device=device))

    return dict(
        images=torch.randint(256, (B, *size, 3), generator=gen, device=device, dtype=torch.uint8),
        masked=torch.rand(B, N, generator=gen, device=device) < share,
        weight=normal(D, 3, *patch) / K**0.5,
        bias=normal(D),
        cls_token=normal(D),
        mask_token=normal(D),
        positions=normal(N + 1, D),
        mean=between_nans(torch.tensor([0.485, 0.456, 0.406], device=device)),
        std=between_nans(torch.tensor([0.229, 0.224, 0.225], device=device)),
    )


def run(fn, inputs: dict[str, Any], dtype: torch.dtype | None = None, scale: float = 1.0, **kwargs: Any):
    """Tokens, then the gradients of the parameters that there are."""
    args = inputs | {name: inputs[name].detach().requires_grad_() for name in PARAMETERS if inputs[name] is not None}
    tokens = fn(**args, dtype=dtype, **kwargs)
    gen = torch.Generator(tokens.device).manual_seed(1)
    grad = torch.randn(tokens.shape, generator=gen, device=tokens.device) * scale
    given = [args[name] for name in PARAMETERS if args[name] is not None]
    return tokens, *torch.autograd.grad(tokens, given, grad.to(tokens.dtype))


def embed(backend: Any = "triton", **kwargs: Any) -> Tensor:
    return masked_embed(**kwargs, backend=backend)


def run_triton(*args: Any, **kwargs: Any):
    return run(masked_embed, *args, backend="triton", **kwargs)


def run_exact(inputs: dict[str, Any], scale: float = 1.0):
    doubles = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
    return run(masked_embed_reference, doubles, torch.float64, scale, out_dtype=torch.float64)


def assert_all_within_budget(fast, eager, exact) -> None:
    B, S, _ = exact[0].shape
    terms = max(B * S, *(grad[0].numel() for grad in exact[1:]))  # tokens sum over a patch, gradients over tokens
    for name, *fast_eager_exact in zip(("tokens", *PARAMETERS), fast, eager, exact, strict=False):
        assert_within_budget(name, *fast_eager_exact, terms=terms)


# 768 and 1024 are BEiT's own widths and 16 x 16 its patch; 40 and 33 end inside a block, 33 and 14 * 14 * 3 inside 128
# bits; 85 and 65 tokens are ragged blocks whose first token is not cls; 18 images are a ragged block of the sums
@pytest.mark.parametrize(
    "B, grid, patch, D",
    [
        (1, (2, 3), (16, 16), 768),
        (2, (1, 2), (16, 16), 1024),
        (5, (4, 4), (8, 8), 33),
        (3, (2, 2), (14, 14), 40),
        (2, (1, 2), (32, 32), 64),
        (5, (3, 4), (16, 8), 40),
        (18, (1, 1), (8, 8), 40),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_embed(device: str, dtype: torch.dtype, B: int, grid: Size, patch: Size, D: int):
    inputs = make_inputs(device, B, grid, patch, D)
    scale = 1e-6 * 2**16 if dtype == torch.float16 else 1.0  # a small gradient under a loss scale
    with GuardZones() as zones:
        fast = run_triton(inputs, dtype, scale)
    zones.check()
    eager = run(masked_embed_reference, inputs, dtype, scale, out_dtype=torch.float32)
    assert_all_within_budget(fast, eager, run_exact(inputs, scale))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none masked", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_parameters_of_16_bits(device: str, dtype: torch.dtype, share: float):
    """Their dtype is that of the product, of the tokens and of the gradients; without positions too."""
    inputs = make_inputs(device, share=share)
    inputs |= {name: inputs[name].to(dtype) for name in PARAMETERS} | dict(positions=None)
    fast = run_triton(inputs)
    eager = run(masked_embed_reference, inputs, dtype, out_dtype=dtype)
    assert {x.dtype for x in fast} == {dtype}
    assert_all_within_budget(fast, eager, run_exact(inputs))


def test_reference_is_a_convolution(device: str):
    inputs = make_inputs(device, patch=(16, 8))
    tokens, *_ = run_exact(inputs)
    x = (inputs["images"].double() / 255 - inputs["mean"]) / inputs["std"]
    patches = F.conv2d(x.permute(0, 3, 1, 2), *(inputs[n].double() for n in PARAMETERS[:2]), stride=(16, 8))
    for b, s in product(range(2), range(7)):
        shown = inputs["mask_token"] if s and inputs["masked"][b, s - 1] else patches[b].flatten(1)[:, s - 1]
        expected = (shown if s else inputs["cls_token"]) + inputs["positions"][s].double()
        torch.testing.assert_close(tokens[b, s], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_every_subset_of_gradients(device: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """Those that are wanted exist and are the same as all together; without the weight's, no pixel is unfolded."""
    inputs = make_inputs(device, D=16)
    _, *everything = run(masked_embed, inputs, backend=backend)
    unfolded_product = module._unfolded_product
    for wanted in product((False, True), repeat=len(PARAMETERS)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_unfolded_product", unfolded_product if wanted[0] else None)
            args = {n: inputs[n].detach().requires_grad_(w) for n, w in zip(PARAMETERS, wanted, strict=True)}
            tokens = embed(**inputs | args, backend=backend)
            assert tokens.requires_grad == any(wanted)
            if any(wanted):
                gen = torch.Generator(device).manual_seed(1)
                tokens.backward(torch.randn(tokens.shape, generator=gen, device=device))
        for (name, parameter), want, expected in zip(args.items(), wanted, everything, strict=True):
            assert (parameter.grad is not None) == want, (name, wanted)
            assert not want or torch.equal(parameter.grad, expected), (name, wanted)


@pytest.mark.parametrize("change", [0, 255])
def test_pixels_of_masked_patches_do_not_matter(device: str, change: int):
    inputs = make_inputs(device, B=3, grid=(4, 3))
    expected = run_triton(inputs)
    pixels = inputs["images"].unflatten(2, (3, 8)).unflatten(1, (4, 8)).transpose(2, 3)  # a view: a patch in one place
    pixels[inputs["masked"].unflatten(1, (4, 3))] = change
    for name, a, b in zip(("tokens", *PARAMETERS), expected, run_triton(inputs), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("beside", [0, 255])
def test_pixels_beside_the_batch_do_not_matter(device: str, beside: int):
    inputs = make_inputs(device, B=3, patch=(14, 14))
    expected = run_triton(inputs)
    padded = torch.full((inputs["images"].numel() + 8192,), beside, dtype=torch.uint8, device=device)
    inputs["images"] = padded[4096:-4096].view(inputs["images"].shape).copy_(inputs["images"])
    for name, a, b in zip(("tokens", *PARAMETERS), expected, run_triton(inputs), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(not INTERPRETED, reason="counts on the interpreter, which serves where no GPU is")
@pytest.mark.parametrize("patch", [(32, 32), (14, 14)])
def test_only_visible_pixels_are_read(device: str, patch: Size):
    """By address, and no address outside the arguments. A row of 32 pixels is 3 sectors; none is shared."""
    inputs = make_inputs(device, B=3, grid=(2, 2), patch=patch)
    with Traffic(resident=1000) as traffic:
        run_triton(inputs, torch.bfloat16)
    visible = int((~inputs["masked"]).sum()) * 3 * patch[0] * patch[1]
    assert 0 < visible < inputs["images"].numel()
    for kernel in ("_masked_embed_fwd_kernel", "_masked_embed_bwd_unfold_kernel"):
        read = traffic.total(kernel, "images_ptr").unique
        assert read == visible if patch == (32, 32) else read >= visible


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_add_up(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """78 tokens in chunks of 32, 32 and 14. Gradients are small integers, whose sums are exact in any order."""
    inputs = make_inputs(device, B=3, grid=(5, 5))
    grad = torch.randint(-3, 4, (3, 26, 40), device=device).float()
    grads = []
    for limit in (module.UNFOLD_BYTES, 32 * 192 * dtype.itemsize):
        monkeypatch.setattr(module, "UNFOLD_BYTES", limit)
        with GuardZones() as zones:
            weight = inputs["weight"].detach().requires_grad_()
            embed(**inputs | dict(weight=weight), dtype=dtype).backward(grad)
        zones.check()
        assert zones.buffers[-1].numel() <= limit + 2 * GUARD_BYTES  # what the patches were unfolded into
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_bias_is_corrected_by_the_weight_as_rounded(device: str):
    """An image of the mean colour embeds as the bias. The weight before rounding would correct it 1e-3 too far."""
    inputs = make_inputs(device, patch=(16, 16), share=0.0)
    inputs["images"][:], inputs["mean"][:], inputs["positions"][:] = 200, 200 / 255, 0
    for dtype in DTYPES:
        tokens = embed(**inputs, dtype=dtype)
        torch.testing.assert_close(tokens[:, 1:], inputs["bias"].expand(2, 6, -1), rtol=0, atol=1e-5)


def test_small_weights_survive_float16(device: str):
    """Of 1e-4: they would be subnormal numbers if 1 / 255 were folded into them."""
    inputs = make_inputs(device, patch=(16, 16), share=0.0)
    inputs["weight"] *= 1e-4 * 768**0.5
    inputs["bias"][:], inputs["positions"][:] = 0, 0
    fast = run_triton(inputs, torch.float16)
    eager = run(masked_embed_reference, inputs, torch.float16, out_dtype=torch.float32)
    assert_within_budget("tokens", *(x[0][:, 1:] for x in (fast, eager, run_exact(inputs))))


def test_programs_are_independent_and_write_only_their_own(device: str, monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(device, B=5, grid=(4, 4), D=136)
    monkeypatch.setattr(module, "UNFOLD_BYTES", 0)  # a chunk of 32 rows is the least
    first = run_triton(inputs, torch.bfloat16)
    again = run_triton(inputs, torch.bfloat16)
    with NoSync():
        run_triton(inputs, torch.bfloat16)
    shuffle_programs(monkeypatch)
    shuffled = run_triton(inputs, torch.bfloat16)
    for other in (again, shuffled):
        for name, a, b in zip(("tokens", *PARAMETERS), first, other, strict=True):
            assert torch.equal(a, b), f"{name} differs between two runs"


def test_gradients_in_any_layout(device: str):
    """Stride 0, as of `.sum()`, and transposed; the weight may be in any layout too."""
    inputs = make_inputs(device)
    weight = inputs["weight"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    tokens = embed(**inputs | dict(weight=weight))
    assert torch.equal(tokens, embed(**inputs))
    for grad in (torch.ones((), device=device).expand(2, 7, 40), torch.randn(40, 7, 2, device=device).permute(2, 1, 0)):
        got, expected = (torch.autograd.grad(tokens, weight, g, retain_graph=True) for g in (grad, grad.contiguous()))
        assert torch.equal(*got, *expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_chooses_the_dtype_of_the_product_alone(device: str, backend: str):
    inputs = make_inputs(device)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    for dtype in (None, torch.float32):
        expected = run(embed, inputs, dtype or torch.bfloat16, backend=backend)
        got = run(autocast(embed), inputs, dtype, backend=backend)
        if backend == "triton":  # going backward under autocast too; the reference's products would be cast
            expected, got = (*expected, *expected), (*got, *autocast(run)(embed, inputs, dtype))
        for a, b in zip(expected, got, strict=True):
            assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_ops_are_good_citizens(device: str):
    """Schema, fake kernels and autograd registration agree with what the ops do."""
    inputs = make_inputs(device, B=1, D=16)
    parameters = {name: inputs[name].detach().requires_grad_() for name in PARAMETERS}
    for changed in (parameters, parameters | dict(positions=None), {}):
        args = *(inputs | changed).values(), torch.float32, torch.float32
        torch.library.opcheck(torch.ops.fastbeit.masked_embed_fwd.default, args)
    shared = *(inputs[name] for name in ("images", "masked", "mean", "std")), [8, 8], torch.float32
    for wanted in ([True] * 5, [False, True, False, True, False]):
        args = torch.ones(1, 7, 16, device=device), *shared, wanted
        torch.library.opcheck(torch.ops.fastbeit.masked_embed_bwd.default, args)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_without_a_graph_break(device: str, backend: str):
    inputs = make_inputs(device, D=16)
    compiled = torch.compile(masked_embed, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, inputs, torch.bfloat16, backend=backend) for fn in (masked_embed, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_auto_means_triton_on_cuda_and_reference_elsewhere(place: str):
    """Traced with tensors of no memory, which may lie on a GPU that is not there; both count the same flops."""
    inputs = make_inputs("cpu", B=4, grid=(14, 14), patch=(16, 16), D=768)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fakes = {name: torch.empty(x.shape, dtype=x.dtype, device=place) for name, x in inputs.items()}
        tokens = embed(**fakes, dtype=torch.bfloat16, backend="auto")
        assert tokens.shape == (4, 197, 768) and tokens.dtype == torch.float32 and tokens.device.type == place
    assert counter.get_total_flops() == 2 * 4 * 196 * 768 * 768
    counted = counter.get_flop_counts()["Global"]
    assert (torch.ops.fastbeit.masked_embed_fwd in counted) == (place == "cuda")


def test_flops_of_both_ways(device: str):
    inputs = make_inputs(device)
    for backend in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter:
            run(masked_embed, inputs, backend=backend)
        assert counter.get_total_flops() == 2 * 2 * 2 * 6 * 192 * 40, backend


def test_wrong_input_is_named():
    inputs = make_inputs("cpu")
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(images=torch.zeros(2, 3, 16, 24)), r"images \[B, height, width, 3\].*got \[2, 3, 16, 24\] and \[40, 3"),
        (dict(weight=torch.zeros(40, 192)), r"weight \[D, 3, height, width\]; got .* and \[40, 192\]"),
        (dict(images=torch.zeros(2, 16, 25, 3)), r"whole patches \[8, 8\]; got \[16, 25\]: crop or resize"),
        (dict(masked=torch.zeros(2, 7, dtype=torch.bool)), r"masked \[2, 6\], torch.bool.*got \[2, 7\]"),
        (dict(masked=torch.zeros(2, 6)), r"masked \[2, 6\], torch.bool.*got \[2, 6\], torch.float32"),
        (dict(images=inputs["images"].float()), "images .* torch.uint8, .*; got .* torch.float32"),
        (
            dict(images=inputs["images"].repeat(1, 1, 2, 1)[:, :, ::2]),
            r"images .* contiguous.* strides \[2304, 144, 6, 1",
        ),
        (dict(weight=inputs["weight"].double()), "weight .* torch.float32 or torch.bfloat16 .*; got .* torch.float64"),
        (dict(bias=torch.zeros(41)), r"bias \[40\].*; got \[41\]"),
        (dict(cls_token=torch.zeros(1, 1, 40)), r"cls_token \[40\].*; got \[1, 1, 40\]"),
        (dict(mask_token=torch.zeros(80)[::2]), r"mask_token \[40\].* contiguous.*; got .* strides \[2\]"),
        (dict(positions=torch.zeros(6, 40)), r"positions \[7, 40\].*; got \[6, 40\]"),
        (dict(mean=torch.zeros(3, device="meta")), "mean .* on cpu; got .* on meta"),
        (dict(std=torch.zeros(3, dtype=torch.float64)), r"std \[3\], torch.float32, .*; got .* torch.float64"),
        (dict(dtype=torch.float64), "computes in and gives torch.float32 .*; got .*float64"),
        (dict(out_dtype=torch.int32), "computes in and gives .*; got .*int32"),
        (dict(backend="cuda"), "backend wants one of auto, triton, reference; got 'cuda'"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            embed(**inputs | dict(backend="reference") | change)


def test_serves_without_triton():
    """In a process of its own, where `import triton` finds nothing, as on macOS."""
    program = f"""if True:
        import sys
        sys.path[:0] = {[p for p in sys.path if p]!r}
        sys.modules["triton"] = None
        import torch
        from fastbeit_kernels.masked_embed import masked_embed
        images, masked = torch.zeros(1, 8, 16, 3, dtype=torch.uint8), torch.tensor([[True, False]])
        weight, token = torch.zeros(4, 3, 8, 8), torch.ones(4)
        args = images, masked, weight, token, 2 * token, 3 * token, None, torch.zeros(3), torch.ones(3)
        print(masked_embed(*args)[0, :, 0].tolist())
        try:
            masked_embed(*args, backend="triton")
        except ModuleNotFoundError as error:
            print(error)
    """
    out = finished([sys.executable, "-c", program], check=True).stdout
    assert out.splitlines()[0] == "[2.0, 3.0, 1.0]" and "pip install 'triton" in out.splitlines()[1]
