"""Bytes that interpreted kernels move: between memory and L2, and between L2 and the programs.

    with Traffic(resident=264, once=("weight_ptr",)) as traffic:
        ...  # launches, with TRITON_INTERPRET=1
    traffic.total("_some_fwd_kernel", "x_ptr").unique_loads

Unique bytes, what memory must move: each 32-byte sector of a tensor once a launch, and again only when it is touched
more than `resident` programs after its last touch, for then the L2 may have let go of it. `resident` is how many
programs a GPU runs at a time. Requested bytes, what the L2 must move: the sectors of each access, each time.

Programs count in the order in which a GPU starts them, x first. A GPU runs them side by side; here they take turns.
"""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

SECTOR = 32  # bytes; the least that an NVIDIA GPU moves
ONCE_BYTES = 4 * 2**20  # an operand up to here, read by all programs, stays in the L2 (A100 40 MB, H100 50 MB)
NEVER, ALWAYS = -(2**40), 2**39  # the program that touched an untouched sector; how long the L2 keeps one of `once`


@dataclass
class Bytes:
    """What the programs of the launches moved of one tensor."""

    unique_loads: int = 0
    unique_stores: int = 0
    requested_loads: int = 0
    requested_stores: int = 0

    @property
    def unique(self) -> int:
        return self.unique_loads + self.unique_stores

    @property
    def requested(self) -> int:
        return self.requested_loads + self.requested_stores

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Bytes)))


class _Operand:
    """A tensor argument of one launch, and which program touched each of its sectors last."""

    def __init__(self, tensor: torch.Tensor, reuse: int, count: Bytes) -> None:
        items = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.first, self.end = tensor.data_ptr(), tensor.data_ptr() + items * tensor.element_size()
        self.reuse, self.count = reuse, count
        sectors = (self.end - 1) // SECTOR - self.first // SECTOR + 1
        self.touched, self.stored = np.full(sectors, NEVER), np.full(sectors, NEVER)

    def access(self, addresses: np.ndarray, program: int, loads: bool, stores: bool) -> None:
        # addresses are multiples of their element's size: none lies in two sectors
        touched = np.zeros(self.touched.size, dtype=bool)
        touched[(addresses // SECTOR).astype(np.int64) - self.first // SECTOR] = True
        sectors = np.flatnonzero(touched)
        # a load finds what a load or a store left in the L2; a store joins only a store that memory has not seen yet
        if loads:
            self.count.requested_loads += SECTOR * sectors.size
            self.count.unique_loads += SECTOR * int((program - self.touched[sectors] > self.reuse).sum())
        if stores:
            self.count.requested_stores += SECTOR * sectors.size
            self.count.unique_stores += SECTOR * int((program - self.stored[sectors] > self.reuse).sum())
            self.stored[sectors] = program
        self.touched[sectors] = program


class Traffic:
    """Counts while it is entered; `counts` by kernel and name of the argument, over all launches."""

    def __init__(self, resident: int, once: tuple[str, ...] = ()) -> None:
        """Count sectors of the arguments `once` once a launch, of others again when `resident` programs came between.

        Weights and tables belong into `once`; they are refused above 4 MB. It is by name and not by size, because
        in a problem made small for the interpreter everything is small.
        """
        self.resident, self.once = resident, once
        self.counts: defaultdict[tuple[str, str], Bytes] = defaultdict(Bytes)

    def total(self, kernel: str = "", *names: str) -> Bytes:
        """The sum over the arguments `names` of `kernel`; over all where none is named.

        An argument that a kernel is given twice, to work in place, counts under the first of its names.
        """
        mine = {name: count for (fn, name), count in self.counts.items() if kernel in (fn, "")}
        found = [count for name, count in mine.items() if not names or name in names]
        if not found:
            raise KeyError(f"no traffic of {kernel} {names}; there is {sorted(self.counts)}")
        return sum(found, Bytes())

    def __enter__(self) -> "Traffic":
        from triton.runtime.interpreter import GridExecutor, interpreter_builder

        self._builder = interpreter_builder
        launch = GridExecutor.__call__

        def counted(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self._begin(executor.fn.__name__, dict(zip(executor.arg_names, args, strict=False)) | kwargs)
            launch(executor, *args, **kwargs)

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(GridExecutor, "__call__", counted))
        self._patches.enter_context(patch.object(interpreter_builder, "set_grid_idx", self._next_program))
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            counting = self._counting(name, getattr(interpreter_builder, name))
            self._patches.enter_context(patch.object(interpreter_builder, name, counting))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.program = -1
        self.operands: list[_Operand] = []
        for name, tensor in arguments.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            if name in self.once and tensor.nbytes > ONCE_BYTES:
                raise ValueError(f"{name} of {kernel} has {tensor.nbytes} bytes; up to {ONCE_BYTES} stay in the L2")
            reuse = ALWAYS if name in self.once else self.resident
            self.operands.append(_Operand(tensor, reuse, self.counts[kernel, name]))

    def _next_program(self, *_: int) -> None:
        """Let the loop of the interpreter, z first, run the programs in the order of a GPU, x first."""
        self.program += 1
        columns, rows, _ = self._builder.grid_dim
        self._builder.grid_idx = self.program % columns, self.program // columns % rows, self.program // columns // rows

    def _counting(self, name: str, original: Any) -> Any:
        mask_at = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}.get(name)
        pointers_at = 1 if name == "create_atomic_rmw" else 0  # after the operation

        def counted(*args: Any, **kwargs: Any) -> Any:
            pointers = args[pointers_at]
            # the interpreter makes integers of masks joined by `&`
            mask = args[mask_at].data.astype(bool) if mask_at else np.ones_like(pointers.data, bool)
            addresses = np.broadcast_to(pointers.data, mask.shape)[mask]
            self._count(addresses, loads=name != "create_masked_store", stores=name != "create_masked_load")
            return original(*args, **kwargs)

        return counted

    def _count(self, addresses: np.ndarray, loads: bool, stores: bool) -> None:
        for operand in self.operands:
            if not addresses.size:
                return
            within = (addresses >= operand.first) & (addresses < operand.end)
            if within.any():
                operand.access(addresses[within], self.program, loads, stores)
                addresses = addresses[~within]
        if addresses.size:
            got = f"{addresses.size} addresses that lie in no argument of its kernel"
            raise IndexError(f"program {self.program} touches {got}")
