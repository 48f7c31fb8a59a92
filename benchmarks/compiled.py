"""Kernels compiled without a GPU, and what came out: registers, stack, spills, shared memory, width of accesses, MMA.

Needs Triton, and a process without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CUDA = (80, 90, 100)


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
