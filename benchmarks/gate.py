"""What is wrong is not timed: results against float64, with the error of plain PyTorch as the budget."""

import torch
from torch import Tensor

# where eager happens to be exact; Liger and PyTorch round the loss to bfloat16
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int64: 1e-3}


def first_fault(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> str | None:
    """The first result that errs by over twice what `eager` does, by worst element or by norm; None: all are right.

    Args:
        got, eager, exact: results by name; `exact` in float64, or integers.
    """
    for name, value in got.items():
        for order in (float("inf"), 2):
            size = torch.linalg.vector_norm(exact[name].double(), order).clamp_min(1e-30)
            errors = (torch.linalg.vector_norm(x.double() - exact[name], order) for x in (value, eager[name]))
            error, allowed = (float(error / size) for error in errors)
            budget = 2 * allowed + FLOOR[value.dtype]
            if not error <= budget:  # NaN is a fault too
                return f"{name} errs by {error:.1e}, over its budget of {budget:.1e}"
    return None
