"""Derivatives that a custom op does not have: refused, because autograd leaves them out without a word.

Such an op has a gradient, once. PyTorch drops the tangents that forward mode gives it, and takes what its backward
computes from stored tensors for a constant.
"""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`) differentiates by one of `tensors`.
    """
    if any(t is not None and unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op} has no forward-mode derivative; use backward, or {op}_reference in plain PyTorch, which has all"
        )


def refuse_second_order(op: str, *grads: Tensor | None) -> None:
    """For the backward of an op, with the gradients that come in.

    Raises:
        RuntimeError: the gradient is to be differentiated too, backward or in forward mode.
    """
    # in a backward autograd switches this on for create_graph=True alone
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no second derivative, and create_graph=True asks for one: leave it out, or use {op}_reference "
            "in plain PyTorch, which has all"
        )
    refuse_tangents(op, *grads)
