"""A question about the embedding: its tiles, and whether a convolution would do."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.first_hour.bench import DTYPE, Bench, Results, against, case
from benchmarks.kernels.ops import masked_embed_op
from benchmarks.results import Row

me = import_module("fastbeit_kernels.masked_embed")  # the package has the function by this name

# tokens, width and bytes of a patch a tile, warps, stages
TILES = (
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 2),
    (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 3),
)


def masked_embed(bench: Bench) -> Iterator[Row]:
    """Which tiles the forward of `masked_embed` shall have, and whether the op earns its place beside a convolution."""
    shapes = bench.shapes
    op = masked_embed_op(shapes, "triton")
    inputs = op.make_inputs(bench.device, 0)
    exact, eager = _results(me.masked_embed_reference, _in_double(inputs)), _results(me.masked_embed_reference, inputs)
    visible = 1 - float(inputs["masked"].float().mean())
    num_bytes = round(visible * inputs["images"].nbytes) + shapes.B * shapes.S * shapes.D * DTYPE.itemsize
    ours = partial(me.masked_embed, backend="triton")
    for numbers in TILES:
        names = "BLOCK_T", "BLOCK_D", "BLOCK_K", "num_warps", "num_stages"
        tiles = dict(zip(names, numbers, strict=True))
        with patch.object(me, "product_tiles", lambda dtype, tiles=tiles: tiles):
            gate = against(exact, eager, partial(_results, ours, inputs))
            yield case(bench, f"tiles {numbers}", partial(_embed, ours, inputs), gate=gate, num_bytes=num_bytes)
    peers = {
        "convolution, eager": convolve,
        "convolution, torch.compile": bench.compiler(convolve),
        "reference, eager": me.masked_embed_reference,
        "reference, torch.compile": bench.compiler(me.masked_embed_reference),
    }
    for name, fn in peers.items():
        gate = against(exact, eager, partial(_results, fn, inputs))
        yield case(bench, name, partial(_embed, fn, inputs), gate=gate, num_bytes=num_bytes)


def convolve(
    images: Tensor,
    masked: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: None,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """As most code has it: normalise, convolve, choose, put the cls token in front. Arguments as the reference's."""
    pixels = ((images.float() / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)  # channels last, as it lies
    x = F.conv2d(pixels, weight.to(dtype), bias.to(dtype), stride=weight.shape[2:])
    x = torch.where(masked[:, :, None], mask_token.to(dtype), x.flatten(2).transpose(1, 2))
    return torch.cat((cls_token.to(dtype).expand(len(x), 1, -1), x), dim=1).to(out_dtype)


def _embed(fn: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return fn(**inputs)


def _results(fn: Any, inputs: dict[str, Any]) -> Results:
    return dict(tokens=_embed(fn, inputs))


def _in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    doubled = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    return doubled | dict(dtype=torch.float64, out_dtype=torch.float64)
