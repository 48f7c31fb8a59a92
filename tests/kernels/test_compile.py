"""Every kernel compiles at its production shape, without a GPU: no stack, no spill, bulk accesses 128 bits wide.

`python tests/kernels/test_compile.py` prints the table. The tests run it in a process of its own, because a kernel that
was decorated under TRITON_INTERPRET=1 cannot be compiled.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CUDA = (80, 90, 100)
SHARED_LIMIT = 64 * 1024  # bytes a block may have on every target: gfx942's limit, the lowest
COLUMNS = ("kernel", "variant", "dtype", "target", "registers", "stack", "spills", "shared")
COLUMNS += ("wide_loads", "narrow_loads", "wide_stores", "narrow_stores")  # wide: 128 bits


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher launches it; pointers that `pointers` does not name are of `dtype`."""

    kernel: Any
    variant: str
    dtype: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> Any:
        from triton.compiler import ASTSource

        def type_of(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            return self.pointers.get(name, f"*{self.dtype}") if name.endswith("_ptr") else "i32"

        signature = {name: type_of(name) for name in self.kernel.arg_names}
        # sizes and addresses are multiples of 16, as the launch would find; without this no access is 128 bits wide
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name] != "constexpr"}
        return ASTSource(self.kernel, signature, constexprs=self.constants, attrs=attrs)


def cases() -> Iterator[Case]:
    from fastbeit_kernels import cross_entropy as ce

    rows = dict(labels_ptr="*i64", row_loss_ptr="*fp32", row_correct_ptr="*i32")
    scalars = dict(grad_loss_ptr="*fp32", count_ptr="*fp32")
    options = ce.launch_options(ce.MAX_BLOCK)
    for dtype in ("bf16", "fp32"):
        for kernel in (ce._cross_entropy_fwd_kernel, ce._cross_entropy_fwd_loop_kernel):
            for with_grad in (True, False) if dtype == "bf16" else (True,):
                constants = dict(IGNORE_INDEX=ce.IGNORE_INDEX, WITH_GRAD=with_grad, BLOCK_V=ce.MAX_BLOCK)
                yield Case(kernel, "grad" if with_grad else "loss", dtype, rows, constants, options)
        yield Case(ce._cross_entropy_bwd_kernel, "grad", dtype, scalars, dict(BLOCK_N=ce.MAX_BLOCK), options)


def accesses(assembly: str, load: str, store: str, wide: str) -> tuple[int, int, int, int]:
    """Count loads from global memory, 128-bit ones and others, and stores alike."""
    loads, stores = (re.findall(rf"\b{pattern}\S*", assembly) for pattern in (load, store))
    wide_loads, wide_stores = (sum(wide in access for access in found) for found in (loads, stores))
    return wide_loads, len(loads) - wide_loads, wide_stores, len(stores) - wide_stores


def compiled_for_cuda(case: Case, arch: int) -> tuple[int, ...]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(case.source(), target=GPUTarget("cuda", arch, 32), options=case.options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", sass)[0]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return int(registers), int(stack), spills, kernel.metadata.shared, *accesses(sass, "LDG", "STG", ".128")


def compiled_for_mi300(case: Case) -> tuple[int, ...]:
    import triton
    from triton.backends.compiler import GPUTarget

    # a device assertion brings some 70 accesses of its own, to print with: width is judged without, the rest with it
    shipped, silent = (
        triton.compile(case.source(), target=GPUTarget("hip", "gfx942", 64), options=case.options | dict(debug=debug))
        for debug in (case.options["debug"], False)
    )
    assembly = shipped.asm["amdgcn"]
    fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"
    registers, stack, *spills = (int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0]) for name in fields)
    wide = accesses(silent.asm["amdgcn"], "(?:global|buffer|flat)_load", "(?:global|buffer|flat)_store", "dwordx4")
    return registers, stack, sum(spills), shipped.metadata.shared, *wide


def print_table() -> None:
    row = "{:32} {:8} {:6} {:7}" + " {:>13}" * 8
    print(row.format(*COLUMNS))
    for case in cases():
        name = case.kernel.fn.__name__, case.variant, case.dtype
        for arch in CUDA:
            print(row.format(*name, f"sm_{arch}", *compiled_for_cuda(case, arch)))
        print(row.format(*name, "gfx942", *compiled_for_mi300(case)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= dict(
        TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")), PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def rows_of(table: str) -> list[dict[str, Any]]:
    rows = [dict(zip(COLUMNS, line.split(), strict=True)) for line in table.splitlines()[1:]]
    return [{name: int(value) if value.isdigit() else value for name, value in row.items()} for row in rows]


def test_every_kernel_compiles(table: str, capsys: pytest.CaptureFixture[str]):
    with capsys.disabled():
        print(f"\n{table}")
    assert {row["target"] for row in rows_of(table)} == {*(f"sm_{arch}" for arch in CUDA), "gfx942"}


def test_nothing_spills(table: str):
    assert [row for row in rows_of(table) if row["stack"] or row["spills"] or row["shared"] > SHARED_LIMIT] == []


def test_bulk_accesses_are_128_bits_wide(table: str):
    """Two scalars are read (a label and its logit; the gradient of the loss and the count) and at most four written."""
    for row in rows_of(table):
        assert row["wide_loads"] and row["narrow_loads"] <= 2, row
        assert bool(row["wide_stores"]) == (row["variant"] == "grad") and row["narrow_stores"] <= 4, row


if __name__ == "__main__":
    print_table()
