"""Which implementation PyTorch's scaled_dot_product_attention takes for given arguments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

NOT_TOLD = "not told"


def chosen_backend(*args: Any, **kwargs: Any) -> str:
    """The backend's name, for arguments as F.scaled_dot_product_attention takes them.

    PyTorch has no public question for this; where the private one is gone or has changed: "not told".
    """
    try:
        return SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name  # pyright: ignore[reportPrivateImportUsage]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return NOT_TOLD


class SdpaChoices(TorchFunctionMode):
    """Notes what each attention takes that is called while it is on; not for compiled models."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.names[chosen_backend(*args, **(kwargs or {}))] = None
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return ", ".join(self.names) or NOT_TOLD
