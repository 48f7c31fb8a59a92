"""Every kernel compiles at its production shape, without a GPU: no stack, no spill, bulk accesses 128 bits wide.

`python tests/kernels/test_compile.py` prints the table. The tests run it in a process of its own, because a kernel that
was decorated under TRITON_INTERPRET=1 cannot be compiled.
"""

import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.compiled import CUDA, compiled_for_cuda, compiled_for_mi300
from benchmarks.production import cases

SHARED_LIMIT = 64 * 1024  # bytes a block may have on every target: gfx942's limit, the lowest
COLUMNS = ("kernel", "variant", "dtype", "target", "registers", "stack", "spills", "shared")
COLUMNS += ("wide_loads", "narrow_loads", "wide_stores", "narrow_stores")  # wide: 128 bits


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
