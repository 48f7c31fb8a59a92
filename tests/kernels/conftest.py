import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastbeit_kernels.backend import INTERPRETED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that a value no kernel wrote cannot pass for a right one.

    Deterministic algorithms do so by default (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpret_as_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter, which in Triton 3.7.1 asserts nothing, and does three things wrong with bfloat16.

    It cuts bfloat16 off instead of rounding it, and takes it for the integers that it keeps it in: in a product, and in
    a cast from integers.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def round_to_nearest(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        return torch.from_numpy(np.asarray(values)).bfloat16().view(torch.uint16).numpy()

    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def cast_through_float32(self, values, target):
        if target.scalar == tl.bfloat16 and not values.dtype.scalar.is_floating():
            values = cast(self, values, tl.float32)
        return cast(self, values, target)

    def dot_in_float32(self, a, b, *args):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *args)

    monkeypatch.setattr(interpreter, "_convert_float", round_to_nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_through_float32)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_float32)
    asserting = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", asserting)
