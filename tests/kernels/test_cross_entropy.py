import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastbeit_kernels import backend as backend_module
from fastbeit_kernels.backend import INTERPRETED
from fastbeit_kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    launch_forward,
    launch_options,
    row_options,
)
from helpers.launchers import GuardZones, NoSync, Zeros, between_nans, shuffle_programs
from helpers.numerics import assert_within_budget
from helpers.waiting import finished

LOGITS = {
    "flat": lambda x, word: 0.1 * x,  # the first steps of a run
    "peaked": lambda x, word: 2 * x + 12 * word,  # a softmax that knows
    "equal": lambda x, word: 0 * x + 3,
    "certain": lambda x, word: x + 60 * word,  # a probability of 1: what is left of it must not be lost
    "negative": lambda x, word: 2 * x - 40,  # no logit is above 0, where a maximum might begin
    "huge": lambda x, word: 1e4 * x.sign() - word,  # exp(1e4) is inf: only differences may be taken
}


def make_inputs(device: str, R: int, V: int, dtype: torch.dtype, kind: str = "peaked") -> tuple[Tensor, Tensor]:
    """Logits and labels; every third row, but never the first, is not labelled."""
    gen = torch.Generator(device).manual_seed(R * V)
    labels = torch.randint(V, (R,), generator=gen, device=device)
    word = torch.nn.functional.one_hot(labels, V).float()
    word[1::2] = word[1::2].roll(1, dims=1)  # every other row is wrong
    logits = LOGITS[kind](torch.randn(R, V, generator=gen, device=device), word).to(dtype)
    labels[2::3] = -100
    return between_nans(logits), between_nans(labels)


class Result(NamedTuple):
    """What an op gives, and the gradient of its loss."""

    loss: Tensor
    grad_logits: Tensor
    num_correct: Tensor


def run(
    fn, logits: Tensor, labels: Tensor, count: Tensor | None = None, grad_loss: float = 1.0, **kwargs: Any
) -> Result:
    logits = logits.detach().requires_grad_()
    loss, num_correct = fn(logits, labels, count, **kwargs)
    (grad_logits,) = torch.autograd.grad(loss, logits, loss.new_tensor(grad_loss))
    return Result(loss, grad_logits, num_correct)


def run_triton(*args: Any, **kwargs: Any):
    return run(cross_entropy, *args, backend="triton", **kwargs)


# 8192 words and 75 slots are BEiT's own; 1000 is no power of two; 50 ends inside 128 bits; 20,000 are three blocks of
# the loop, the last one ragged, and 65,536 are eight
@pytest.mark.parametrize("R, V", [(1, 8192), (12, 8192), (7, 1000), (150, 50), (3, 20_000), (2, 65_536)])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy(device: str, dtype: torch.dtype, kind: str, R: int, V: int):
    logits, labels = make_inputs(device, R, V, dtype, kind)
    count = torch.tensor(8, device=device) if R == 1 else None  # else 2^16 overflows the one row's float16 gradient
    grad_loss = 2.0**16 if dtype == torch.float16 else 3.0  # a loss scale

    with GuardZones() as zones:
        fast = run_triton(logits, labels, count, grad_loss)
    zones.check()
    eager = run(cross_entropy_reference, logits, labels, count, grad_loss)
    exact = run(cross_entropy_reference, logits.double(), labels, count, grad_loss)
    for name, *fast_eager_exact in zip(("loss", "grad_logits"), fast, eager, exact, strict=False):
        assert_within_budget(name, *fast_eager_exact)
    assert fast.num_correct.dtype == torch.int64 and fast.num_correct == eager.num_correct
    assert (fast.grad_logits[labels == -100] == 0).all()


def test_an_image(device: str):
    test_cross_entropy(device, torch.bfloat16, "peaked", R=75, V=8192)


@pytest.mark.parametrize("V", [1000, pytest.param(8192, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_batch(device: str, dtype: torch.dtype, V: int):
    """9600 rows, 128 images: on the CPU the reference, whose sums are float32 whatever the logits are."""
    logits, labels = make_inputs(device, 9600, V, dtype)
    loss, grad_logits, num_correct = run(cross_entropy, logits, labels)
    exact = run(cross_entropy_reference, logits.double(), labels)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-6, atol=0)
    # a probability in float32 has the error of its exponent, a logit near 20 less the logarithm of a sum: on AVX2 2^-17
    # of it, on AVX-512 less. Four times that, over the 6400 rows whose mean is taken
    torch.testing.assert_close(
        grad_logits.double(), exact.grad_logits, rtol=2 * torch.finfo(dtype).eps, atol=2**-15 / 6400
    )
    assert num_correct == exact.num_correct and 0 < num_correct < 9600


WEIGHTS = [dict(label_smoothing=0.1), dict(z_loss=1e-2), dict(label_smoothing=0.3, z_loss=1e-4)]


@pytest.mark.parametrize("R, V", [(4, 8192), (7, 1000), (3, 20_000)])
@pytest.mark.parametrize("kind", ["peaked", "negative", "huge"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smoothing_and_z_loss(device: str, dtype: torch.dtype, weights: dict[str, float], kind: str, R: int, V: int):
    logits, labels = make_inputs(device, R, V, dtype, kind)
    count = torch.tensor(9600, device=device)
    fast = run_triton(logits, labels, count, 2.0**16, **weights)
    eager = run(cross_entropy_reference, logits, labels, count, 2.0**16, **weights)
    exact = run(cross_entropy_reference, logits.double(), labels, count, 2.0**16, **weights)
    for name, *fast_eager_exact in zip(("loss", "grad_logits"), fast, eager, exact, strict=False):
        assert_within_budget(name, *fast_eager_exact)
    assert fast.num_correct == eager.num_correct and (fast.grad_logits[labels == -100] == 0).all()


def test_reference_is_its_formula():
    logits, labels = make_inputs("cpu", 7, 50, torch.float64)
    e, z, used = 0.3, 0.01, labels != -100
    loss, grad_logits, _ = run(cross_entropy_reference, logits, labels, label_smoothing=e, z_loss=z)
    lse = logits.logsumexp(1)
    label_logits = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    rows = lse - (1 - e) * label_logits - e * logits.mean(1) + z * lse**2
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 50)
    residual = (1 + 2 * z * lse)[:, None] * logits.softmax(1) - (1 - e) * one_hot - e / 50
    torch.testing.assert_close(loss, rows[used].mean())
    torch.testing.assert_close(grad_logits, residual * used[:, None] / used.sum())


@pytest.mark.parametrize("V", [50, 8192, 20_000])
@pytest.mark.parametrize("weights", [{}, *WEIGHTS])
def test_the_residual_may_replace_its_logits(device: str, weights: dict[str, float], V: int):
    """As linear_cross_entropy launches it."""
    logits, labels = make_inputs(device, 5, V, torch.bfloat16)
    settings = weights.get("label_smoothing", 0.0), weights.get("z_loss", 0.0)
    results = []
    for residual in (torch.empty_like(logits), logits):
        row_loss, row_correct = logits.new_empty(5, dtype=torch.float32), labels.new_empty(5, dtype=torch.int32)
        launch_forward(logits, labels, row_loss, row_correct, residual, *settings)
        results.append((row_loss, row_correct, residual))
    for apart, in_place in zip(*results, strict=True):
        assert torch.equal(apart, in_place)


def test_float16_gradient_is_not_flushed(device: str):
    """Each entry, not their norm: p / count is below the smallest normal float16, p and p * 2^16 / count are above."""
    logits, labels = make_inputs(device, 40, 8192, torch.float16, "flat")
    count = torch.tensor(9600, device=device)
    grad_logits = run_triton(logits, labels, count, 2.0**16).grad_logits
    exact = run(cross_entropy_reference, logits.double(), labels, count, 2.0**16).grad_logits
    torch.testing.assert_close(
        grad_logits.double(), exact, rtol=2**-9, atol=0
    )  # two roundings of 2^-11, and twice that


@pytest.mark.parametrize("V", [50, 8192, 20_000])
def test_lowest_of_equal_words_is_the_answer(device: str, V: int):
    logits = torch.zeros(4, V, device=device)
    logits[:, [V // 2, V - 1]] = 1.0  # in two blocks of the loop
    labels = torch.tensor([V // 2, V - 1, V // 2 - 1, 0], device=device)
    for backend in ("triton", "reference"):
        correct = [cross_entropy(logits[r : r + 1], labels[r : r + 1], backend=backend)[1].item() for r in range(4)]
        assert correct == [1, 0, 0, 0], backend


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("R, V", [(0, 8192), (3, 8192), (2, 20_000)])
@pytest.mark.parametrize("count", [None, 0, 7])
def test_no_labelled_row_costs_nothing(device: str, count: int | None, R: int, V: int, backend: str):
    logits = torch.randn(R, V, device=device)
    labels = torch.full((R,), -100, device=device)
    given = None if count is None else torch.tensor(count, device=device)
    weights = dict(label_smoothing=0.1, z_loss=1e-4)
    loss, grad_logits, num_correct = run(cross_entropy, logits, labels, given, backend=backend, **weights)
    assert loss == 0 and num_correct == 0 and (grad_logits == 0).all() and grad_logits.shape == (R, V)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("count_dtype", [torch.int64, torch.float32])
def test_count_divides_the_sum(device: str, count_dtype: torch.dtype, backend: str):
    logits, labels = make_inputs(device, 6, 50, torch.float32)
    one, five = (torch.tensor(n, device=device, dtype=count_dtype) for n in (1, 5))
    total, mean, default = (run(cross_entropy, logits, labels, n, backend=backend) for n in (one, five, None))
    for summed, divided, by_labelled in zip(total[:2], mean[:2], default[:2], strict=True):
        torch.testing.assert_close(divided, summed / 5)
        torch.testing.assert_close(by_labelled, summed / 4)


@pytest.mark.parametrize("V", [50, 20_000])
def test_rows_without_a_label_are_not_read(device: str, V: int):
    logits, labels = make_inputs(device, 6, V, torch.float32)
    loss = run_triton(logits, labels)[0]
    logits[labels == -100] = float("nan")
    unread = run_triton(logits, labels)
    assert unread[0] == loss and torch.isfinite(unread[1]).all()


@pytest.mark.parametrize("V", [50, 20_000])
def test_words_of_no_probability(device: str, V: int):
    """-inf bans a word; in a row of 20,000 the whole first block of the loop is banned."""
    logits, labels = make_inputs(device, 2, V, torch.float32)
    labels[:] = V - 1
    logits[:, : V // 2] = -float("inf")
    fast, eager = run_triton(logits, labels), run(cross_entropy_reference, logits, labels)
    for got, want in zip(fast, eager, strict=True):
        torch.testing.assert_close(got, want)
    assert (fast.grad_logits[:, : V // 2] == 0).all()


@pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("V", [50, 20_000])
@pytest.mark.parametrize("weights", [{}, *WEIGHTS])
def test_a_label_of_no_probability(device: str, weights: dict[str, Any], V: int):
    """Costs an infinite loss, not NaN, also where the first block of the loop holds nothing but such words."""
    logits, labels = make_inputs(device, 2, V, torch.float32)
    labels[:] = 3
    logits[:, : V // 2] = -float("inf")
    fast = run_triton(logits, labels, **weights)
    eager = run(cross_entropy_reference, logits, labels, **weights)
    for got, want in zip(fast, eager, strict=True):
        torch.testing.assert_close(got, want)
    assert fast.loss == float("inf") and torch.isfinite(fast.grad_logits).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("V", [50, 20_000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_reach_the_loss(device: str, bad: float, V: int):
    """The trainer's check for finite values must see them."""
    logits, labels = make_inputs(device, 5, V, torch.float32)
    logits[3, 7] = bad
    loss, grad_logits, _ = run_triton(logits, labels)
    assert not torch.isfinite(loss) and grad_logits[3].isnan().any() and torch.isfinite(grad_logits[0]).all()


@pytest.mark.parametrize("label", [-1, -101, 50, 2**32 + 3])
def test_label_out_of_range(label: int):
    """On the CPU: on a GPU the assertion ends the process's CUDA context, and with it the other tests."""
    logits, labels = torch.zeros(3, 50), torch.tensor([3, label, -100])
    with pytest.raises(IndexError, match=f"{label} is out of bounds"):
        cross_entropy(logits, labels)
    if INTERPRETED:
        with pytest.raises(Exception, match="a label is neither a word nor the ignore index"):
            cross_entropy(logits, labels, backend="triton")
        with pytest.raises(Exception, match="a label is neither a word nor the ignore index"):
            cross_entropy(torch.zeros(3, 9000), torch.where(labels == 50, 9000, labels), backend="triton")


@pytest.mark.parametrize("V", [1000, 20_000])
def test_programs_are_independent_and_write_only_their_own(device: str, monkeypatch: pytest.MonkeyPatch, V: int):
    logits, labels = make_inputs(device, 7, V, torch.bfloat16)
    first = run_triton(logits, labels)
    again = run_triton(logits, labels)
    with GuardZones() as zones:
        guarded = run_triton(logits, labels)
    zones.check()
    with NoSync():
        run_triton(logits, labels, torch.tensor(5, device=device))
    shuffle_programs(monkeypatch)
    shuffled = run_triton(logits, labels)
    for other in (again, guarded, shuffled):
        for name, a, b in zip(("loss", "grad_logits", "num_correct"), first, other, strict=True):
            assert torch.equal(a, b), f"{name} differs between two runs"


def test_labels_are_asserted_on_the_device():
    """In every launch: a label out of range is no silent loss."""
    for options in (launch_options(8192), row_options(8192, (9, 0)), row_options(8192, (0, 0))):
        assert options["debug"] is True and options["sanitize_overflow"] is False
    assert row_options(8192, (9, 0))["maxnreg"] == row_options(8192, (8, 6))["maxnreg"] == 80
    assert "maxnreg" not in row_options(8192, (10, 0)) | row_options(8192, (0, 0))


def test_without_a_gradient_none_is_written(device: str):
    logits, labels = make_inputs(device, 5, 1000, torch.float32)
    loss, num_correct = cross_entropy(logits, labels, backend="triton")
    assert not loss.requires_grad
    with torch.no_grad():
        same, _ = cross_entropy(logits.requires_grad_(), labels, backend="triton")
    with_grad, correct_with_grad = cross_entropy(logits, labels, backend="triton")
    assert with_grad.requires_grad and not correct_with_grad.requires_grad
    assert torch.equal(loss, same) and torch.equal(loss, with_grad) and num_correct == correct_with_grad
    count = torch.ones((), device=device)
    for wanted, size in ((False, 0), (True, logits.numel())):
        residual = torch.ops.fastbeit.cross_entropy_fwd(logits, labels, count, 0.0, 0.0, wanted)[2]
        assert residual.numel() == size


def test_nobody_fills_zeros_in_the_backward(device: str):
    """The residual is an output that nothing depends on: autograd would make a [R, V] of zeros its gradient."""
    logits, labels = make_inputs(device, 6, 1000, torch.float32)
    loss, _ = cross_entropy(logits.requires_grad_(), labels, backend="triton")
    with Zeros() as zeros:
        loss.backward()
    assert max(zeros.sizes, default=0) < logits.numel()


def test_backward_twice(device: str):
    """The stored gradient is not used up."""
    logits, labels = make_inputs(device, 5, 1000, torch.float32)
    logits.requires_grad_()
    loss, _ = cross_entropy(logits, labels, backend="triton")
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("V", [50, 9000])
def test_ops_are_good_citizens(device: str, V: int):
    """Schema, fake kernels and autograd registration agree with what the ops do."""
    logits, labels = make_inputs(device, 5, V, torch.float32)
    count = torch.tensor(4.0, device=device)
    settings = count, 0.1, 1e-4
    for args in ((logits.requires_grad_(), labels, *settings, True), (logits.detach(), labels, *settings, False)):
        torch.library.opcheck(torch.ops.fastbeit.cross_entropy_fwd.default, args)
    torch.library.opcheck(torch.ops.fastbeit.cross_entropy_bwd.default, (count, count, logits.detach()))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_without_a_graph_break(device: str, backend: str):
    inputs = make_inputs(device, 5, 1000, torch.float32)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, *inputs, backend=backend) for fn in (cross_entropy, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_auto_means_triton_on_cuda_and_reference_elsewhere():
    """Traced with tensors of no memory, which may lie on a GPU that is not there; the flops are Triton's alone."""
    for place, flops in (("cuda", 3 * 75 * 8192), ("cpu", 0)):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            logits = torch.empty(75, 8192, device=place, dtype=torch.bfloat16)
            loss, num_correct = cross_entropy(logits, torch.empty(75, device=place, dtype=torch.int64))
        assert loss.dtype == torch.float32 and num_correct.dtype == torch.int64
        assert loss.device.type == num_correct.device.type == place and not loss.shape and not num_correct.shape
        assert counter.get_total_flops() == flops


def test_flops_of_both_ways(device: str):
    inputs = make_inputs(device, 5, 50, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run_triton(*inputs)
    assert counter.get_total_flops() == 6 * 5 * 50


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(8)), r"logits \[R, V\] and labels \[R\].*got \(8,\) and \(4,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"got \(4, 8\) and \(3,\): flatten"),
        (dict(logits=torch.zeros(4, 0)), r"V > 0; got \(4, 0\)"),
        (dict(logits=torch.zeros(4, 8, dtype=torch.float64)), "logits torch.float32.*got torch.float64"),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), "labels torch.int64; got .* torch.int32"),
        (dict(logits=torch.zeros(8, 4).T), r"contiguous.*got strides \(1, 4\).*call \.contiguous"),
        (dict(labels=torch.zeros(8, dtype=torch.int64)[::2]), r"contiguous.*\(2,\)"),
        (dict(count=torch.ones(1)), r"scalar count.*\(1,\) on cpu"),
        (dict(labels=torch.zeros(4, dtype=torch.int64, device="meta")), r"on the device of the logits.*on meta"),
        (dict(label_smoothing=1.0), r"label_smoothing in \[0, 1\); got 1.0"),
        (dict(label_smoothing=float("nan")), "label_smoothing .* got nan"),
        (dict(z_loss=-1e-4), "a finite z_loss of at least 0; got -0.0001"),
        (dict(z_loss=float("inf")), "a finite z_loss of at least 0; got inf"),
        (dict(backend="cuda"), "backend wants one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str):
    inputs: dict[str, Any] = dict(
        logits=torch.zeros(4, 8), labels=torch.zeros(4, dtype=torch.int64), count=None, backend="reference"
    )
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(inputs | change))


def test_triton_on_a_cpu_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module, "INTERPRETED", False)
    with pytest.raises(ValueError, match="wants tensors on cuda; got cpu.*TRITON_INTERPRET=1"):
        cross_entropy(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), backend="triton")


def test_serves_without_triton():
    """In a process of its own, where `import triton` finds nothing, as on macOS."""
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from fastbeit_kernels.cross_entropy import cross_entropy
        args = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
        print(round(cross_entropy(*args)[0].item(), 4))
        try:
            cross_entropy(*args, backend="triton")
        except ModuleNotFoundError as error:
            print(error)
    """
    path = [p for p in sys.path if p]
    program = f"import sys; sys.path[:0] = {path!r}\n{program}"
    out = finished([sys.executable, "-c", program], check=True).stdout
    assert out.splitlines()[0] == "2.0794" and "pip install 'triton" in out.splitlines()[1]
