"""In what dtype a run's images become visual tokens, and how many tokens the rounding turns.

Rounding never changes an image's logits by much, but where two words are nearly as likely it changes the token. auto
takes float16 on CUDA, as fast there as bfloat16 and with 11 significant bits against 8, so that eight times fewer such
places turn; OpenAI's release computes in it too. Its largest number is 65504: an overflow is an error, not a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastbeit.errors import TokenizerError
from fastbeit.tokenizer.protocol import Tokenizer

MIN_AGREEMENT = 0.99
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Chosen(NamedTuple):
    tokenizer: Tokenizer
    precision: str  # a key of DTYPES
    agreement: float  # share of tokens that are those of fp32
    line: str  # to be logged


def encoding_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `tokenizer.precision` means on a device."""
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[precision]


def token_agreement(tokenizer: Tokenizer, exact: Tokenizer, images: Tensor) -> float:
    """Share of the tokens of images uint8 [B, h, w, 3] that two tokenizers agree on."""
    return (tokenizer.encode(images) == exact.encode(images)).double().mean().item()


def choose_tokenizer(
    load: Callable[[torch.dtype], Tokenizer], precision: str, device: torch.device, images: Tensor
) -> Chosen:
    """Load a tokenizer in the precision that a run asks for, and measure what it costs.

    Below 99 % agreement `auto` falls back to fp32, and a precision that was asked for by name is kept with a warning.

    Args:
        load: reads the tokenizer in a dtype.
        images: uint8 [B, h, w, 3] of the run, some dozens.

    Raises:
        TokenizerError: a precision that was asked for by name overflows.
    """
    dtype = encoding_dtype(precision, device)
    exact = load(torch.float32)
    if dtype == torch.float32:
        return Chosen(exact, "fp32", 1.0, "tokenizer: fp32")
    name = NAMES[dtype]
    tokenizer = load(dtype)
    try:
        agreement = token_agreement(tokenizer, exact, images)
    except TokenizerError as err:
        if precision != "auto":
            raise
        return Chosen(exact, "fp32", 1.0, f"tokenizer: fp32, since {name} overflows: {err}")
    line = f"{100 * agreement:.2f} % of tokens are those of fp32, on {len(images)} images"
    if agreement >= MIN_AGREEMENT:
        return Chosen(tokenizer, name, agreement, f"tokenizer: {name}, {line}")
    wanted = f"{MIN_AGREEMENT:.0%} are wanted"
    if precision == "auto":
        return Chosen(exact, "fp32", 1.0, f"tokenizer: fp32, since in {name} {line}; {wanted}")
    return Chosen(
        tokenizer, name, agreement, f"WARNING: tokenizer: {name}, {line}; {wanted}: set tokenizer.precision=fp32"
    )
