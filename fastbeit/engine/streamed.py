"""Tensors that are whole only while somebody reads them, one after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streamed:
    """A tensor whose parts are on several ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    # the whole of it, on the host of each rank; all ranks must call it, and several in the same order
    read: Callable[[], Tensor]


Tensors = Mapping[str, Tensor | Streamed]  # by name


def in_order(tensors: Tensors) -> list[tuple[str, Tensor | Streamed]]:
    """An order that is the same on all ranks: wide values first, so that each tensor is aligned in a file."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def read(tensor: Tensor | Streamed) -> Tensor:
    """The tensor on the host."""
    return tensor.read() if isinstance(tensor, Streamed) else tensor.detach().cpu()


def take_part(tensors: Tensors) -> None:
    """What a rank does while another one reads these tensors: it gives its parts."""
    for _, tensor in in_order(tensors):
        if isinstance(tensor, Streamed):
            tensor.read()
