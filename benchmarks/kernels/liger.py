"""Liger's cross-entropies, which ours are held against. Its package need not be installed."""

from importlib.util import find_spec

from torch import Tensor

from benchmarks.kernels.compiled import Case

INSTALLED = find_spec("liger_kernel") is not None
HOW_TO_INSTALL = "Liger: pip install liger-kernel"


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Writes the gradient over `logits`. Counts the right rows too, as ours does."""
    from liger_kernel.transformers.functional import liger_cross_entropy  # pyright: ignore[reportMissingImports]

    return liger_cross_entropy(logits, labels, return_token_accuracy=True).loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return liger_fused_linear_cross_entropy(hidden, weight, labels, bias, return_token_accuracy=True).loss


def cross_entropy_cases() -> list[Case]:
    """Its kernel at 8192 words, without the count: as its launcher launches it, and at its best.

    The launcher passes the number of columns as an argument, so the code reads a row in a loop, twice. Were it a
    constant, one block would hold the row, and the loop would fold to one pass.
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel  # pyright: ignore[reportMissingImports]

    absent = dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap"))
    strides = dict(Y_stride=1, loss_stride=1, token_accuracy_stride=0, predicted_tokens_stride=0)
    loss = dict(lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", BLOCK_SIZE=8192)
    flags = dict(RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False)
    flags |= dict(HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=True)
    constants = absent | strides | loss | flags
    types = dict(Y_ptr="*i64")
    return [
        Case(liger_cross_entropy_kernel, "shipped", "bf16", types, constants, dict(num_warps=32)),
        Case(liger_cross_entropy_kernel, "folded", "bf16", types, constants | dict(n_cols=8192), dict(num_warps=8)),
    ]
