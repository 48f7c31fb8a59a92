"""The counter counts right, and the kernels move little more than they must; on the interpreter, without a GPU."""

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch

from benchmarks.kernels.moved import (
    IMAGES,
    LONG_ROWS,
    ROWS,
    Moved,
    moved_by_cross_entropy,
    moved_by_linear_cross_entropy,
    moved_by_masked_embed,
)
from benchmarks.kernels.ops import DTYPE, Shapes
from benchmarks.kernels.traffic import ONCE_BYTES, Bytes, Traffic
from fastbeit_kernels.backend import INTERPRETED, tl, triton
from fastbeit_kernels.cross_entropy import cross_entropy
from fastbeit_kernels.masked_embed import product_tiles

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts on the interpreter, which serves where no GPU is")


@triton.jit
def _gather_kernel(x_ptr, out_ptr, N, STRIDE: tl.constexpr, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    """Program p copies items p % PERIOD * BLOCK + i * STRIDE, those below N."""
    pid = tl.program_id(0)
    offs = pid % PERIOD * BLOCK + tl.arange(0, BLOCK) * STRIDE
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), tl.load(x_ptr + offs, mask=offs < N, other=0.0))


def gather(resident: int, programs: int, N: int, stride: int = 1, period: int = 2**20, once: tuple = ()) -> Traffic:
    x, out = torch.zeros(1024), torch.zeros(programs * 16)
    with Traffic(resident, once) as traffic:
        _gather_kernel[(programs,)](x_ptr=x, out_ptr=out, N=N, STRIDE=stride, PERIOD=period, BLOCK=16)
    return traffic


@pytest.mark.parametrize(
    "kwargs, loads, requested",
    [
        # 16 floats a program: 2 sectors
        (dict(resident=1, programs=8, N=1024), 8 * 64, 8 * 64),
        # lanes that are masked off touch nothing; what is left of a sector still moves the whole of it
        (dict(resident=1, programs=8, N=20), 64 + 32, 64 + 32),
        # one float of each of 16 sectors
        (dict(resident=1, programs=1, N=1024, stride=8), 16 * 32, 16 * 32),
        # the same items again 4 programs later: still in the L2 when as many run at a time, else not
        (dict(resident=4, programs=8, N=1024, period=4), 4 * 64, 8 * 64),
        (dict(resident=3, programs=8, N=1024, period=4), 8 * 64, 8 * 64),
        (dict(resident=3, programs=8, N=1024, period=4, once=("x_ptr",)), 4 * 64, 8 * 64),
    ],
    ids=["all", "masked", "strided", "near", "far", "once"],
)
def test_loads_are_counted(kwargs: dict, loads: int, requested: int):
    traffic = gather(**kwargs)
    stores = kwargs["programs"] * 64
    assert traffic.total("_gather_kernel", "x_ptr") == Bytes(loads, 0, requested, 0)
    assert traffic.total("_gather_kernel", "out_ptr") == Bytes(0, stores, 0, stores)
    assert traffic.total().unique == loads + stores and traffic.total().requested == requested + stores


@triton.jit
def _twice_kernel(x_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program of row y of the grid reads and writes, twice, what that row owns."""
    ptrs = x_ptr + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if ATOMIC:
        tl.atomic_add(ptrs, 1.0)
    else:
        tl.store(ptrs, tl.load(ptrs) + 1.0)
        tl.store(ptrs, tl.load(ptrs) + 1.0)


@pytest.mark.parametrize("atomic, each", [(False, 2), (True, 1)])
def test_programs_run_in_the_order_of_a_gpu(atomic: bool, each: int):
    """On a GPU x comes first, so the 3 programs of a row of the grid are neighbours; the interpreter begins with z."""
    x = torch.zeros(4 * 8)
    with Traffic(resident=1) as traffic:
        for _ in range(2):
            _twice_kernel[(3, 4)](x_ptr=x, BLOCK=8, ATOMIC=atomic)
    requested = 2 * 12 * each * 32
    assert traffic.total() == Bytes(2 * 4 * 32, 2 * 4 * 32, requested, requested)  # a second launch counts again
    assert (x == 2 * 3 * each).all()


def test_after_it_nothing_is_counted_and_kernels_run_as_before():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

    call = GridExecutor.__call__
    traffic = gather(1, 1, 16)
    assert GridExecutor.__call__ is call
    assert not set(vars(interpreter_builder)) & set(vars(InterpreterBuilder))
    before = traffic.total()
    cross_entropy(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), backend="triton")
    assert traffic.total() == before


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=f"x_ptr of _gather_kernel has .* up to {ONCE_BYTES}"):
        with Traffic(1, once=("x_ptr",)):
            _gather_kernel[(1,)](torch.zeros(ONCE_BYTES // 4 + 1), torch.zeros(16), 16, 1, 1, 16)
    with pytest.raises(Exception, match="program 0 touches 8 addresses that lie in no argument"):
        with Traffic(1):
            _gather_kernel[(1,)](torch.zeros(8), torch.zeros(16), 16, 1, 1, 16)
    with pytest.raises(KeyError, match="no traffic of _gather_kernel"):
        Traffic(1).total("_gather_kernel")


LIMIT = {"all": 1.10, "in place": 1.10, "pixels": 1.35}  # rows of a patch are 48 bytes, and straddle sectors


def over_the_limit(moved: Iterator[Moved]) -> list[Moved]:
    return [row for row in moved if row.ratio > LIMIT[row.part]]


@pytest.mark.parametrize(
    "moved_by, shapes",
    [
        (moved_by_cross_entropy, ROWS),
        (moved_by_cross_entropy, LONG_ROWS),
        (moved_by_linear_cross_entropy, ROWS),
        (moved_by_masked_embed, IMAGES),
    ],
)
def test_little_more_is_moved_than_must_be(moved_by: Callable[[Shapes], Iterator[Moved]], shapes: Shapes):
    rows = list(moved_by(shapes))
    assert rows and over_the_limit(iter(rows)) == []
    assert all(row.ratio > 0.9 for row in rows), "less than must be: the minimum is wrong, or an access went uncounted"


def test_a_second_pass_over_the_logits_is_caught(monkeypatch: pytest.MonkeyPatch):
    """As where one launch takes the sums and another the gradient."""
    module = import_module("fastbeit_kernels.cross_entropy")

    launch = module.launch_forward

    def twice(logits, labels, row_loss, row_correct, residual, *weights) -> None:
        launch(logits, labels, row_loss, row_correct, None, *weights)
        launch(logits, labels, row_loss, row_correct, residual, *weights)

    monkeypatch.setattr(module, "launch_forward", twice)
    (caught,) = over_the_limit(moved_by_cross_entropy(ROWS))
    assert caught.kernel == "_cross_entropy_fwd_kernel" and 1.4 < caught.ratio < 1.6


def test_reading_masked_patches_is_caught():
    caught = over_the_limit(moved_by_masked_embed(Shapes(B=4), show_all=True))
    assert {(row.kernel, row.part) for row in caught} >= {
        ("_masked_embed_fwd_kernel", "pixels"),
        ("_masked_embed_bwd_unfold_kernel", "pixels"),
    }


def test_programs_that_share_pixels_far_apart_are_caught(monkeypatch: pytest.MonkeyPatch):
    """All tokens for the first columns of the weight, then all for the next: pixels come from memory each time."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    program_id = InterpreterBuilder.create_get_program_id

    def columns_first(builder: InterpreterBuilder, axis: int) -> TensorHandle:
        handle = program_id(builder, axis)
        programs, tiles = builder.grid_dim[0], 768 // product_tiles(DTYPE)["BLOCK_D"]
        if builder.grid_dim[1] == 1:  # the forward alone has a grid of one dimension
            handle.data[:] = handle.data % (programs // tiles) * tiles + handle.data // (programs // tiles)
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", columns_first)
    caught = over_the_limit(moved_by_masked_embed(Shapes(B=4)))
    assert [(row.kernel, row.part) for row in caught][:1] == [("_masked_embed_fwd_kernel", "pixels")]
