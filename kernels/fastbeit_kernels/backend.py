"""Which implementation of an op runs: its Triton kernels or its reference in plain PyTorch."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
HAS_TRITON = find_spec("triton") is not None


class _NoTriton:
    """Stands in for `triton` and `triton.language`, so that a kernel file can be imported where they do not exist."""

    constexpr = int  # kernels are annotated with it

    def jit(self, kernel: Any) -> "_NoTriton":
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise ModuleNotFoundError("the Triton kernels of fastbeit need triton; on Linux: pip install 'triton>=3.6'")

    __getitem__ = __getattr__  # kernel[grid]


if TYPE_CHECKING:
    import triton.language as tl
    from triton import knobs

    triton: Any  # its types refuse an int for a `tl.constexpr`
elif HAS_TRITON:
    import triton
    import triton.language as tl
    from triton import knobs
else:
    triton = tl = knobs = _NoTriton()
# asked once, because torch.compile of PyTorch 2.11 and 2.12 cannot trace the question
AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
# asked once, as Triton does when it decorates a kernel: changing the variable later does nothing
INTERPRETED: bool = HAS_TRITON and knobs.runtime.interpret


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """Whether an op on `device` runs its Triton kernels; "auto": on CUDA.

    Raises:
        ValueError: there is no such backend, or no Triton for such a device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend wants one of {', '.join(get_args(Backend))}; got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return False
    if HAS_TRITON and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f'backend "triton" wants tensors on cuda; got {device.type}: move them there, take backend "auto", '
            "or, to debug, set TRITON_INTERPRET=1 before anything imports triton"
        )
    return True


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raise where an op on `device` would: ValueError as `uses_triton`, ModuleNotFoundError for a missing Triton."""
    if uses_triton(backend, device):
        triton.cdiv  # noqa: B018 - an attribute that the stand-in has not


def product_dtype(dtype: torch.dtype | None, like: Tensor) -> torch.dtype:
    """What a matrix product computes in: `dtype` if given, else autocast's where it is on, else that of `like`."""
    if dtype is not None:
        return dtype
    device = like.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For products whose dtype is chosen already; a device of no autocast ("meta") has none to switch off."""
    if device.type in AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
