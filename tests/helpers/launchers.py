"""Modes that look inside an op (`InsideOps`) while its launcher runs: what it may not do or touch."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import InsideOps
from fastbeit_kernels.backend import INTERPRETED

aten = torch.ops.aten
GUARD_BYTES = 4096  # on each side of a buffer; a multiple of 16, so that accesses stay aligned
UNTOUCHED = 0xA5


class NoSync(InsideOps):
    """Refuses what makes the host wait for the device."""

    REFUSED = (aten.item, aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        assert func.overloadpacket not in self.REFUSED, f"a launcher waits for the device: {func}"
        return func(*args, **kwargs)


class GuardZones(InsideOps):
    """Puts each buffer that an op allocates between two zones; `check` fails when a kernel wrote into one."""

    ALLOCATE = (aten.empty, aten.empty_like, aten.new_empty)

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        if func.overloadpacket not in self.ALLOCATE or not out.numel():
            return out
        self.buffers.append(
            torch.full((out.nbytes + 2 * GUARD_BYTES,), UNTOUCHED, dtype=torch.uint8, device=out.device)
        )
        return self.buffers[-1][GUARD_BYTES:-GUARD_BYTES].view(out.dtype).view(out.shape).copy_(out)

    def check(self) -> None:
        assert self.buffers, "no buffer was allocated: nothing was tested"
        for buffer in self.buffers:
            for zone in (buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]):
                assert (zone == UNTOUCHED).all(), f"a kernel wrote outside its buffer of {buffer.numel()} bytes"


def between_nans(values: Tensor) -> Tensor:
    """Copy `values` to between two zones of NaN (floats) or of absurd numbers: an access past its ends shows."""
    absurd = float("nan") if values.is_floating_point() else 2**40
    padded = values.new_full((values.numel() + 2 * GUARD_BYTES,), absurd)
    return padded[GUARD_BYTES:-GUARD_BYTES].view(values.shape).copy_(values)


def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the programs of each interpreted launch in a shuffled order; a GPU has an order of its own."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx = builder.set_grid_idx

    def shuffled(*index: int) -> None:
        (columns, rows, layers), (x, y, z) = builder.grid_dim, index
        order = list(range(columns * rows * layers))
        random.Random(len(order)).shuffle(order)
        place = order[(z * rows + y) * columns + x]
        set_grid_idx(place % columns, place // columns % rows, place // (columns * rows))

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)


class Zeros(TorchDispatchMode):
    """Keeps the sizes of tensors that are filled with zeros, as autograd does for a gradient that nobody gave."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zeros" in func.name():
            self.sizes.append(out.numel())
        return out
