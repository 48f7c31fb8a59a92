"""How a fast implementation is judged: against float64, with eager PyTorch's own error as its budget."""

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}  # where eager happens to be exact


def assert_within_budget(name: str, fast: Tensor, eager: Tensor, exact: Tensor, *, terms: int = 0) -> None:
    """Fail unless `fast` errs at most twice what `eager` does, in the worst element and in norm.

    Args:
        fast, eager: any one shape and dtype; the kernel's result and plain PyTorch's in the same dtype.
        exact: the same shape, float64.
        terms: products that a result sums in float32. A library that adds n of them one after the other errs by some
            sqrt(n) roundings of 2^-24, and eager's own error is but one draw of that: MKL chooses by shape and CPU.
    """
    assert fast.shape == exact.shape and fast.dtype == eager.dtype, f"{name}: {tuple(fast.shape)} {fast.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the exact result is {exact.dtype}"
    assert torch.isfinite(fast).all(), f"{name}: {(~torch.isfinite(fast)).sum().item()} values not finite"
    for kind, order in (("worst element", float("inf")), ("norm", 2)):
        size = torch.linalg.vector_norm(exact, order).clamp_min(1e-30)
        got, ref = (torch.linalg.vector_norm(t.double() - exact, order).div(size).item() for t in (fast, eager))
        budget = 2 * ref + FLOOR[fast.dtype] + 2**-24 * terms**0.5
        assert got <= budget, f"{name}: {kind} error {got:.1e} over its budget {budget:.1e} (eager errs {ref:.1e})"
