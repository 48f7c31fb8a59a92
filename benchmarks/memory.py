"""How much memory a computation takes: bytes of the tensors alive at once, seen inside ops too.

Deterministic, on any device, and on tensors that have no memory (meta, FakeTensor); temporaries within a PyTorch
operation are not seen.
"""

from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class InsideOps(TorchDispatchMode):
    """Looks inside an op of the kernels: its launcher runs as plain Python, so that each PyTorch call it makes is seen.

    Under FakeTensor, and to any other mode, an op is one opaque call.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name in OPDEFS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class PeakMemory(InsideOps):
    """Counts bytes that are allocated while it is on; `peak` is the most that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given:
                storage = t.untyped_storage()
                self.alive[_key(t)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.alive.values()))
        return out


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata
