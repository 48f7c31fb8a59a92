from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import PeakMemory
from fastbeit_kernels.backend import INTERPRETED
from fastbeit_kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from helpers.launchers import GuardZones, NoSync, Zeros, between_nans, shuffle_programs
from helpers.numerics import assert_within_budget


class Result(NamedTuple):
    """What an op gives, and the gradients of its loss: tensors, or None where none is wanted."""

    loss: Tensor
    grad_hidden: Any
    grad_weight: Any
    grad_bias: Any
    num_correct: Tensor


NAMES = Result._fields[:-1]
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def make_inputs(device: str, R: int, D: int, V: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    """hidden, weight, bias, labels: every other row is right and sure of it, every third has no label."""
    gen = torch.Generator(device).manual_seed(R * D * V)
    weight = torch.randn(V, D, generator=gen, device=device) * 2 / D**0.5
    hidden = torch.randn(R, D, generator=gen, device=device)
    labels = torch.randint(V, (R,), generator=gen, device=device)
    hidden[::2] += 4 * weight[labels[::2]]
    labels[2::3] = -100
    offsets = torch.randn(V, generator=gen, device=device) if bias else None
    floats = (None if t is None else between_nans(t.to(dtype)) for t in (hidden, weight, offsets))
    return *floats, between_nans(labels)


def run(fn: Callable, *inputs: Any, grad_loss: float = 1.0, wanted: Any = (True,) * 3, **kwargs: Any) -> Any:
    """A `Result`; Any, because which gradients it holds depends on `wanted`."""
    floats = [
        None if t is None else t.detach().requires_grad_(want) for t, want in zip(inputs[:3], wanted, strict=True)
    ]
    loss, num_correct = fn(*floats, *inputs[3:], **kwargs)
    leaves = [t for t in floats if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(loss, leaves, loss.new_tensor(grad_loss)) if leaves else ())
    hidden, weight, bias = (next(grads) if t is not None and t.requires_grad else None for t in floats)
    return Result(loss, hidden, weight, bias, num_correct)


def double(*inputs: Any) -> list[Any]:
    return [t.double() if t is not None and t.is_floating_point() and t.ndim else t for t in inputs]


def assert_all_within_budget(fast: Result, eager: Result, exact: Result) -> None:
    # a gradient sums over words or rows, whichever its shape has not
    terms = max(size for grad in exact[1:4] if grad is not None for size in grad.shape)
    for name, *fast_eager_exact in zip(NAMES, fast, eager, exact, strict=False):
        if fast_eager_exact[0] is not None:
            assert_within_budget(name, *fast_eager_exact, terms=terms)
    assert fast.num_correct.dtype == torch.int64 and fast.num_correct == eager.num_correct


def assert_equal(first: Result, other: Result) -> None:
    for name, a, b in zip(Result._fields, first, other, strict=True):
        assert a is b is None or torch.equal(a, b), f"{name} differs"


# BEiT-B's and L's own widths; everything ragged, in chunks that leave a remainder, of more rows than there are, and of
# one; the loop of the kernel, with more rows a chunk than the 3 for which MKL adds 9001 products one after the other
@pytest.mark.parametrize(
    "R, D, V, chunk",
    [(6, 768, 8192, None), (5, 1024, 8192, 2), (37, 50, 99, 8), (37, 50, 99, 64), (5, 16, 40, 1), (9, 24, 9001, 5)],
)
@BACKENDS
@DTYPES
def test_linear_cross_entropy(device: str, dtype: torch.dtype, backend: str, R: int, D: int, V: int, chunk: int | None):
    inputs = *make_inputs(device, R, D, V, dtype), torch.tensor(9600, device=device)
    grad_loss = 2.0**16  # a loss scale
    fast = run(linear_cross_entropy, *inputs, grad_loss=grad_loss, chunk=chunk, backend=backend)
    eager = run(linear_cross_entropy_reference, *inputs, grad_loss=grad_loss)
    exact = run(linear_cross_entropy_reference, *double(*inputs), grad_loss=grad_loss)
    assert_all_within_budget(fast, eager, exact)
    assert (fast.grad_hidden[inputs[3] == -100] == 0).all() and 0 < fast.num_correct < R


@BACKENDS
@DTYPES
@pytest.mark.parametrize("weights", [dict(label_smoothing=0.1), dict(label_smoothing=0.3, z_loss=1e-2)])
def test_smoothing_and_z_loss(device: str, weights: dict[str, float], dtype: torch.dtype, backend: str):
    inputs = make_inputs(device, 37, 50, 99, dtype)
    fast = run(linear_cross_entropy, *inputs, chunk=8, backend=backend, **weights)
    eager = run(linear_cross_entropy_reference, *inputs, **weights)
    exact = run(linear_cross_entropy_reference, *double(*inputs), **weights)
    assert_all_within_budget(fast, eager, exact)


@BACKENDS
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_master_weights(device: str, hidden_dtype: torch.dtype, backend: str):
    """Training under autocast: float32 weights, products in bfloat16, and a weight gradient that was never rounded."""
    hidden, *inputs = make_inputs(device, 64, 48, 200, torch.float32)
    hidden = hidden.to(hidden_dtype)
    exact = run(linear_cross_entropy_reference, *double(hidden, *inputs))
    with torch.autocast(device, torch.bfloat16):
        fast = run(linear_cross_entropy, hidden, *inputs, chunk=2, backend=backend)
        eager = run(linear_cross_entropy_reference, hidden, *inputs)
    given = run(linear_cross_entropy, hidden, *inputs, chunk=2, dtype=torch.bfloat16, backend=backend)
    assert_all_within_budget(fast, eager, exact)
    assert_equal(fast, given)
    assert [t.dtype for t in fast[1:4]] == [hidden_dtype, torch.float32, torch.float32]
    for fast_grad, eager_grad, exact_grad in zip(fast[2:4], eager[2:4], exact[2:4], strict=True):
        assert (fast_grad != fast_grad.bfloat16()).float().mean() > 0.9  # chance: 2^-16 are multiples of 2^16 ulp
        # 32 chunks: rounded sums would err more than eager's one product
        assert (fast_grad - exact_grad).norm() < (eager_grad - exact_grad).norm()


@BACKENDS
def test_sums_over_rows_are_float32(device: str, backend: str):
    """Of products in bfloat16: if they were rounded, 32 partial sums and one would differ by 1e-3 of their norm."""
    inputs = make_inputs(device, 64, 48, 200, torch.float32)
    one, many = (run(linear_cross_entropy, *inputs, chunk=n, dtype=torch.bfloat16, backend=backend) for n in (64, 2))
    for name, a, b in zip(NAMES[2:], one[2:4], many[2:4], strict=True):
        assert (a - b).norm() < 1e-5 * a.norm(), name


@BACKENDS
def test_autocast_does_not_reach_a_given_dtype(device: str, backend: str):
    inputs = make_inputs(device, 9, 16, 40, torch.float32)
    plain = run(linear_cross_entropy, *inputs, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        given = run(linear_cross_entropy, *inputs, dtype=torch.float32, backend=backend)
    assert_equal(plain, given)


def test_float16_gradients_are_scaled_in_float32(device: str):
    """2^16 is no float16, and its quotient by the count is rounded by one; of the sum over rows, it is neither."""
    inputs = make_inputs(device, 40, 32, 64, torch.float16)
    exact = run(linear_cross_entropy_reference, *double(*inputs), torch.tensor(1), grad_loss=2.0**16)
    # a residual, a gradient before its factor and one after it are each rounded to 2^-11 = 5e-4
    for name, grad in enumerate(exact[1:4], start=1):
        scaled = run(linear_cross_entropy, *inputs, torch.tensor(1, device=device), grad_loss=2.0**9)[name]
        torch.testing.assert_close(scaled.double() * 2.0**7, grad, rtol=2e-3, atol=2e-3 * grad.abs().max().item())
    tiny = [t if t is None or not t.is_floating_point() else t * 2.0**-6 for t in inputs[1:]]
    loss_scaled = run(
        linear_cross_entropy, inputs[0], *tiny, torch.tensor(1, device=device), grad_loss=2.0**16
    ).grad_hidden
    assert torch.isfinite(loss_scaled).all() and loss_scaled.any()


@BACKENDS
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_subset_of_gradients(device: str, with_bias: bool, backend: str):
    """Those that are wanted, to the bit, at the cost of their own products; none: the loss alone."""
    R, D, V = 9, 16, 40
    inputs = make_inputs(device, R, D, V, torch.float32, with_bias)
    everything = run(linear_cross_entropy, *inputs, chunk=4, backend=backend)
    for wanted in product((True, False), repeat=3):
        with FlopCounterMode(display=False) as counter:
            some = run(linear_cross_entropy, *inputs, wanted=wanted, chunk=4, backend=backend)
        assert counter.get_total_flops() == 2 * R * D * V * (1 + sum(wanted[:2]))
        assert_equal(
            some,
            everything._replace(**{name: None for name, want in zip(NAMES[1:], wanted, strict=True) if not want}),
        )
        assert some.loss.requires_grad == (any(wanted[:2]) or with_bias and wanted[2])
    exact = run(linear_cross_entropy_reference, *double(*inputs))
    assert_all_within_budget(everything, run(linear_cross_entropy_reference, *inputs), exact)


@BACKENDS
def test_nobody_fills_zeros_in_the_backward(device: str, backend: Any):
    """What is stored are outputs that nothing depends on: autograd would make zeros of their sizes the gradients."""
    hidden, weight, bias, labels = make_inputs(device, 9, 16, 40, torch.float32)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), bias, labels, backend=backend)
    with Zeros() as zeros:
        loss.backward()
    assert max(zeros.sizes, default=0) < min(hidden.numel(), weight.numel())


def test_what_is_not_wanted_is_not_stored(device: str):
    hidden, weight, bias, labels = make_inputs(device, 9, 16, 40, torch.float32)
    one = torch.ones((), device=device)
    for triton, *wanted in product((True, False), repeat=4):
        args = hidden, weight, bias, labels, one, torch.float32, 4, 0.0, 0.0, triton, True, wanted
        _, _, *grads = torch.ops.fastbeit.linear_cross_entropy_fwd(*args)
        assert [g.numel() for g in grads] == [n * w for n, w in zip((9 * 16, 40 * 16, 40), wanted, strict=True)]
    hidden.requires_grad_()
    with torch.no_grad(), PeakMemory() as memory:
        linear_cross_entropy(hidden, weight, bias, labels)
    assert memory.peak < hidden.nbytes + 9 * 40 * 4 + 9 * 100


@BACKENDS
def test_chunks_change_nothing(device: str, backend: str):
    """But the order of the sums, and the kernels that BLAS chooses: some 50 roundings of 2^-24 = 6e-8."""
    inputs = make_inputs(device, 50, 16, 40, torch.float32)
    whole, *others = (run(linear_cross_entropy, *inputs, chunk=chunk, backend=backend) for chunk in (50, 1, 16, 49, 51))
    for other in others:
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_chunks_follow_the_memory():
    """All rows of BEiT-B in one chunk on cards of 24 GB or more; equal chunks where they do not fit."""
    GB = 2**30
    assert [chunk_rows(19_200, 8192, 2, memory * GB) for memory in (80, 24, 16, 8)] == [19_200, 19_200, 9_600, 6_400]
    assert chunk_rows(19_200, 8192, 4, 24 * GB) == 9_600
    assert chunk_rows(0, 8192, 2, GB) == 1 == chunk_rows(5, 2**40, 2, GB)
    assert [chunk_rows(19_200, 8192, itemsize, None) for itemsize in (2, 4)] == [1024, 512]


@BACKENDS
@pytest.mark.parametrize("garbage", [1e30, 3e38])
def test_rows_without_a_label_have_no_say(device: str, garbage: float, backend: str):
    """Whatever is in them, as long as it is finite; the products of 3e38 are not."""
    hidden, *inputs = make_inputs(device, 9, 16, 40, torch.float32)
    ignored = inputs[-1] == -100
    hidden[ignored] = 0
    clean = run(linear_cross_entropy, hidden, *inputs, backend=backend)
    hidden[ignored] = garbage
    assert_equal(clean, run(linear_cross_entropy, hidden, *inputs, backend=backend))
    assert (clean.grad_hidden[ignored] == 0).all()


@BACKENDS
@pytest.mark.parametrize("R", [0, 3])
@pytest.mark.parametrize("count", [None, 0, 7])
def test_no_labelled_row_costs_nothing(device: str, count: int | None, R: int, backend: str):
    inputs = make_inputs(device, R, 16, 40, torch.float32)
    inputs[3][:] = -100
    given = None if count is None else torch.tensor(count, device=device)
    weights = dict(label_smoothing=0.1, z_loss=1e-4)
    result = run(linear_cross_entropy, *inputs, given, backend=backend, **weights)
    assert (
        all((t == 0).all() for t in result)
        and result.grad_hidden.shape == (R, 16)
        and result.grad_weight.shape == (40, 16)
    )


@BACKENDS
def test_count_divides_the_sum(device: str, backend: str):
    inputs = make_inputs(device, 6, 16, 40, torch.float32)
    counts = (torch.tensor(1.0, device=device), torch.tensor(5, device=device), None)
    total, mean, default = (run(linear_cross_entropy, *inputs, n, backend=backend)[:4] for n in counts)
    for summed, divided, by_labelled in zip(total, mean, default, strict=True):
        torch.testing.assert_close(divided, summed / 5)
        torch.testing.assert_close(by_labelled, summed / 4)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_independent_and_write_only_their_own(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str
):
    def again():
        return run(linear_cross_entropy, *inputs, torch.tensor(5, device=device), chunk=3, backend=backend)

    inputs = make_inputs(device, 11, 20, 1000, dtype)
    first = again()
    assert_equal(first, again())
    with GuardZones() as zones:
        assert_equal(first, again())
    zones.check()
    with NoSync():
        again()
    shuffle_programs(monkeypatch)
    assert_equal(first, again())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice(device: str, dtype: torch.dtype, backend: Any):
    """What is stored is written over by the last backward alone."""
    inputs = make_inputs(device, 9, 16, 40, dtype)
    once = run(linear_cross_entropy, *inputs, backend=backend)[1:4]
    hidden, weight, bias = leaves = [t.requires_grad_() for t in inputs[:3] if t is not None]
    loss, _ = linear_cross_entropy(hidden, weight, bias, inputs[3], backend=backend)
    for retain_graph in (True, True, False):
        for a, b in zip(once, torch.autograd.grad(loss, leaves, retain_graph=retain_graph), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@BACKENDS
def test_ops_are_good_citizens(device: str, backend: str):
    """Schema, fake kernels and autograd registration agree with what the ops do."""
    hidden, weight, bias, labels = make_inputs(device, 5, 16, 40, torch.float32)
    one = torch.ones((), device=device)
    for dtype, wanted in ((torch.float32, [True] * 3), (torch.bfloat16, [False, True, False])):
        floats = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
        args = *floats, labels, one, dtype, 4, 0.1, 1e-4, backend == "triton"
        torch.library.opcheck(torch.ops.fastbeit.linear_cross_entropy_fwd.default, (*args, False, wanted))
        # with `overwrite` the backward writes over what the last check looks at after it
        checks = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(
            torch.ops.fastbeit.linear_cross_entropy_fwd.default, (*args, True, wanted), test_utils=checks
        )
    torch.library.opcheck(torch.ops.fastbeit.linear_cross_entropy_bwd.default, (one, one, weight, torch.bfloat16))


@BACKENDS
def test_compiles_without_a_graph_break(device: str, backend: str):
    inputs = make_inputs(device, 5, 16, 40, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, *inputs, chunk=2, backend=backend) for fn in (linear_cross_entropy, compiled))
    assert_equal(eager, traced)


@BACKENDS
def test_compiled_backward_twice(device: str, backend: str):
    """A graph keeps what is stored as it is: a second backward gives the same gradients."""
    hidden, weight, bias, labels = make_inputs(device, 5, 16, 40, torch.float32)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    torch._dynamo.reset()  # what another test compiled takes one backward alone
    compiled: Any = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with functorch_config.patch(donated_buffer=False):  # else it takes one backward alone, by itself
        loss, _ = compiled(*leaves, labels, chunk=2, backend=backend)
    first = [g.clone() for g in torch.autograd.grad(3 * loss, leaves, retain_graph=True)]
    again = torch.autograd.grad(3 * loss, leaves)
    torch.testing.assert_close(list(again), first, rtol=0, atol=0)


def test_auto_means_triton_on_cuda_and_chunks_everywhere():
    """Traced with tensors of no memory, which may lie on a GPU that is not there."""
    for place in ("cuda", "cpu"):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            hidden, weight = (torch.empty(n, 768, device=place, dtype=torch.bfloat16) for n in (75, 8192))
            labels = torch.empty(75, device=place, dtype=torch.int64)
            loss, num_correct = linear_cross_entropy(hidden, weight, None, labels)
        assert loss.dtype == torch.float32 and num_correct.dtype == torch.int64
        assert loss.device.type == num_correct.device.type == place and not loss.shape and not num_correct.shape
        assert counter.get_total_flops() == 2 * 75 * 768 * 8192


def peak_bytes(fn: Callable[..., Tensor], dtype: torch.dtype) -> int:
    """Of a forward and backward on 128 images of BEiT-B, with tensors that have no memory."""
    with FakeTensorMode():
        shapes = (9600, 768), (8192, 768), (8192,)
        floats = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        labels = torch.empty(9600, dtype=torch.int64)
        with PeakMemory() as memory:
            torch.autograd.grad(fn(*floats, labels), floats)
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, say: Callable[[str], None]):
    """At most what PyTorch's own chunks take, and a quarter of what logits in memory do."""
    ours = peak_bytes(lambda *args: linear_cross_entropy(*args)[0], dtype)
    eager = peak_bytes(lambda *args: linear_cross_entropy_reference(*args)[0], dtype)
    peaks = dict(ours=ours, eager=eager)
    if hasattr(F, "linear_cross_entropy"):  # from PyTorch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()
        peaks["PyTorch's chunks"] = peak_bytes(
            lambda h, w, b, y: F.linear_cross_entropy(h, w, y, linear_bias=b, options=options), dtype
        )
    say(f"peak MB of the loss in {dtype}: " + ", ".join(f"{who} {peak / 1e6:.1f}" for who, peak in peaks.items()))
    assert ours == min(peaks.values()) and ours <= eager / 4


def test_memory_is_counted_as_it_is(device: str):
    """The counter of the last test, with memory: logits of a chunk, three gradients, and some scalars a row."""
    inputs = make_inputs(device, 40, 16, 64, torch.float32)
    with PeakMemory() as memory:
        run(linear_cross_entropy, *inputs, chunk=8, backend="reference")
    assert 0 <= memory.peak - 4 * (8 * 64 + 40 * 16 + 64 * 16 + 64) < 40 * 8 + 8 * 100


@pytest.mark.parametrize("R, D, V", [(9600, 16, 100), pytest.param(9600, 768, 8192, marks=pytest.mark.long)])
def test_a_whole_batch(device: str, R: int, D: int, V: int):
    inputs = make_inputs(device, R, D, V, torch.float32)
    eager, exact = run(linear_cross_entropy_reference, *inputs), run(linear_cross_entropy_reference, *double(*inputs))
    assert_all_within_budget(run(linear_cross_entropy, *inputs), eager, exact)


@pytest.mark.parametrize("label", [-1, -101, 40, 2**32 + 3])
def test_label_out_of_range(label: int):
    """On the CPU: on a GPU the assertion ends the process's CUDA context, and with it the other tests."""
    hidden, weight, bias, _ = make_inputs("cpu", 3, 16, 40, torch.float32)
    labels = torch.tensor([3, label, -100])
    with pytest.raises(IndexError, match=f"{label} is out of bounds"):
        linear_cross_entropy(hidden, weight, bias, labels)
    if INTERPRETED:
        with pytest.raises(Exception, match="a label is neither a word nor the ignore index"):
            linear_cross_entropy(hidden, weight, bias, labels, backend="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(2, 2, 8)), r"hidden \[R, D\].*got \[\(2, 2, 8\), .*flatten"),
        (dict(weight=torch.zeros(6, 7)), r"weight \[V, D\].*\(6, 7\)"),
        (dict(weight=torch.zeros(0, 8), bias=None), r"V > 0; got .*\(0, 8\)"),
        (dict(bias=torch.zeros(8)), r"bias \[V\].*\(8,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels \[R\].*\(3,\)"),
        (dict(hidden=torch.zeros(4, 8, dtype=torch.float64)), "wants torch.float32.*got torch.float64"),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), "labels torch.int64; got .* torch.int32"),
        (dict(dtype=torch.float64), "products torch.float64"),
        (dict(weight=torch.zeros(8, 6).T), r"contiguous.*got strides .*\(1, 6\).*call \.contiguous"),
        (dict(count=torch.ones(1)), r"scalar count.*\(1,\) on cpu"),
        (dict(labels=torch.zeros(4, dtype=torch.int64, device="meta")), r"on the device of hidden.*on meta"),
        (dict(chunk=0), "a chunk of at least 1 row; got 0"),
        (dict(label_smoothing=1.0), r"linear_cross_entropy wants label_smoothing in \[0, 1\); got 1.0"),
        (dict(z_loss=-1.0), "linear_cross_entropy wants a finite z_loss of at least 0; got -1.0"),
        (dict(backend="cuda"), "backend wants one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str):
    inputs: dict[str, Any] = dict(
        hidden=torch.zeros(4, 8),
        weight=torch.zeros(6, 8),
        bias=torch.zeros(6),
        labels=torch.zeros(4, dtype=torch.int64),
        backend="reference",
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(inputs | change))
