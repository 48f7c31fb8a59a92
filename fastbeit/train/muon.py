"""Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for all else.

The update of a matrix is its momentum, made orthogonal by five Newton-Schulz steps in bfloat16. It is scaled as in
2502.16982 (`match_rms_adamw`), so that learning rate and weight decay are those of AdamW.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def matrix_parts(name: str, parameter: nn.Parameter) -> int:
    """Matrices that Muon sees in a parameter; 0: it is AdamW's.

    Weights of attention and MLP are one, but queries, keys and values, which are packed, three. A table of relative
    positions looks like a matrix, and is a list of numbers by place and head.
    """
    is_weight = name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2
    return (3 if name.endswith("attn.qkv.weight") else 1) if is_weight else 0


class PackedMuon(torch.optim.Muon):
    """PyTorch's, of parameters that are several matrices on top of one another: `parts` of a group says how many.

    Its momentum has the shape of the parameter, and is one tensor in a checkpoint.
    """

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        """Gives views in place of the tensors; what is written into them in place reaches the whole."""
        wholes: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        has_complex = super()._init_group(group, *wholes)
        for given, whole in zip((params_with_grad, grads, muon_momentum_bufs), wholes, strict=True):
            given += [part for tensor in whole for part in tensor.chunk(group["parts"])]
        return has_complex


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one, with the groups and the state of both.

    Args:
        groups: as of any optimizer; Muon's have `parts` of 1 or more.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.muon = PackedMuon(
            [group for group in groups if group["parts"]],
            lr=lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [group for group in groups if not group["parts"]]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        # the very same, not copies
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closures here
        self.muon.step()
        self.adamw.step()
