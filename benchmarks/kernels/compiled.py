"""Kernels compiled without a GPU, and what came out: registers, stack, spills, shared memory, width of accesses, MMA.

Needs Triton, and a process without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# bytes of shared memory that a block may have: of data-centre cards, and of consumer cards (86, 89, 120), which have
# less. CUDA C programming guide, technical specifications by compute capability; AMD CDNA 3 ISA, local data share
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_LIMIT |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 * 1024)
TARGETS = tuple(SHARED_LIMIT)
# the matrix instructions of each generation: HMMA serves a warp, HGMMA four, UTCHMMA and its kin a whole program
MMA: dict[str, str] = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"\bHMMA")
MMA |= {"sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"\bv_mfma"}
# a number that has more digits than the register that it is put into, as PTX writes it
TOO_LONG = r"mov\.[ub]16 [^;]*0x\w{5,};|mov\.[ub]32 [^;]*0x\w{9,};"


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher launches it, and what its code must look like.

    Pointers that `types` does not name are of `dtype`, other arguments int32. Bulk is what grows with the problem; a
    kernel that loads (stores) it does so 128 bits at a time, beside at most `narrow_loads` (`narrow_stores`) other
    accesses.
    """

    kernel: Any
    variant: str
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    loads_bulk: bool = True
    stores_bulk: bool = True
    narrow_loads: int = 0
    narrow_stores: int = 0
    multiplies: bool = False  # in the units for matrices, hence in 16 bits
    targets: tuple[str, ...] = TARGETS  # on which it is launched like this

    @property
    def name(self) -> tuple[str, str, str]:
        return self.kernel.fn.__name__, self.variant, self.dtype

    def source(self) -> Any:
        from triton.compiler import ASTSource

        def type_of(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            return self.types.get(name, f"*{self.dtype}" if name.endswith("_ptr") else "i32")

        signature = {name: type_of(name) for name in self.kernel.arg_names}
        # sizes and addresses are multiples of 16, as the launch would find; without this no access is 128 bits wide
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name] != "constexpr"}
        return ASTSource(self.kernel, signature, constexprs=self.constants, attrs=attrs)


class Compiled(NamedTuple):
    """What one thread uses and executes; `shared` is bytes of a block, `wide` 128 bits or more.

    `misfilled` counts registers that a masked load fills with a number too long for them: Triton repeats a negative
    `other` of 8 or 16 bits with its sign, and all but the first of the values in a register are wrong.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    mma: int
    misfilled: int


def compiled_for(case: Case, target: str) -> Compiled:
    return _for_amd(case, target) if target.startswith("gfx") else _for_nvidia(case, target)


def _accesses(assembly: str, load: str, store: str, wide: str) -> tuple[int, int, int, int]:
    """Count loads from global memory, wide ones and others, and stores alike."""
    loads, stores = (re.findall(rf"\b{pattern}\S*", assembly) for pattern in (load, store))
    wide_loads, wide_stores = (sum(bool(re.search(wide, access)) for access in found) for found in (loads, stores))
    return wide_loads, len(loads) - wide_loads, wide_stores, len(stores) - wide_stores


def _for_nvidia(case: Case, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    arch = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel = triton.compile(case.source(), target=arch, options=case.options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", sass)[0]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    wide = _accesses(sass, "LDG", "STG", r"\.(128|256)\b")  # LDGSTS too, straight into shared memory
    mma, misfilled = len(re.findall(MMA[target], sass)), len(re.findall(TOO_LONG, kernel.asm["ptx"]))
    return Compiled(int(registers), int(stack), spills, kernel.metadata.shared, *wide, mma, misfilled)


def _for_amd(case: Case, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    # a device assertion brings some 70 accesses of its own, to print with: width is judged without, the rest with it
    assertions = {case.options.get("debug", False), False}
    kernels = {
        debug: triton.compile(
            case.source(), target=GPUTarget("hip", target, 64), options=case.options | {"debug": debug}
        )
        for debug in assertions
    }
    shipped, silent = kernels[case.options.get("debug", False)], kernels[False]
    assembly = shipped.asm["amdgcn"]
    fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"
    registers, stack, *spills = (int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0]) for name in fields)
    wide = _accesses(silent.asm["amdgcn"], "(?:global|buffer|flat)_load", "(?:global|buffer|flat)_store", "dwordx4")
    mma = len(re.findall(MMA[target], assembly))
    return Compiled(registers, stack, sum(spills), shipped.metadata.shared, *wide, mma, misfilled=0)  # it has no PTX
