"""Triton kernels of fastbeit, each beside the plain PyTorch function that defines it.

Importing needs torch alone. Without Triton the references serve; the first use of a Triton path says what to install.
The names here are the functions; modules of the same names hold kernels and references.
"""

from fastbeit_kernels.block_masks import block_masks, random_masks
from fastbeit_kernels.cross_entropy import IGNORE_INDEX, cross_entropy, cross_entropy_reference
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastbeit_kernels.masked_embed import masked_embed, masked_embed_reference
from fastbeit_kernels.relative_attention import relative_attention, relative_attention_reference

__all__ = [
    "IGNORE_INDEX",
    "block_masks",
    "cross_entropy",
    "cross_entropy_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "masked_embed",
    "masked_embed_reference",
    "random_masks",
    "relative_attention",
    "relative_attention_reference",
]
