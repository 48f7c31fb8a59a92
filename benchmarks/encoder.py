"""OpenAI's dVAE in half precision: images a second, and how many tokens are those of fp32. Random weights of its size.

python -m benchmarks.encoder [--batch N] [--rounds N] [--json FILE]     without a card a narrow one
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.card import cuda_clock, environment, host_laps
from benchmarks.kernels.__main__ import medians
from benchmarks.results import Row, keep
from fastbeit.config.tokenizer import Architecture
from fastbeit.tokenizer.dvae import Encoder, to_mapped
from fastbeit.tokenizer.fast import FastEncoder
from fastbeit.tokenizer.precision import DTYPES

VIEW = 112  # pixels a side of the token view
COARSE = 14  # random colours a side that are blown up to it
KINDS = "fp16", "bf16"
NARROW = Architecture(n_hid=8, n_init=8, vocab_size=64)


@torch.no_grad()
def rows(arch: Architecture, device: torch.device, batch: int, rounds: int) -> Iterator[Row]:
    """A row a precision, timed in turn with fp32, whose products are not rounded to tf32 where tokens are compared."""
    torch.manual_seed(0)
    encoder, images = Encoder(arch).to(device), soft_images(batch, device)
    # no word is likelier than another, as in a tokenizer that is trained
    encoder.get_parameter("blocks.output.conv.b").sub_(encoder(to_mapped(images)).mean((0, 2, 3)))
    exact = FastEncoder(encoder, torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = exact(to_mapped(images))
    clock = cuda_clock if device.type == "cuda" else lambda work: 1e3 * host_laps(work, 1)[0]
    for kind in KINDS:
        fast = FastEncoder(encoder, DTYPES[kind])
        same = (fast(to_mapped(images)) == expected).double().mean().item()
        works = {"fp32": exact, kind: fast}
        us = medians(
            {who: lambda _, one=one: partial(one, to_mapped(images)) for who, one in works.items()}, clock, rounds
        )
        for name in ("fp32", kind) if kind == KINDS[0] else (kind,):
            row: Row = dict(case=f"{name}, batch of {batch}", images_per_s=1e6 * batch / us[name])
            yield row | (dict(speedup=us["fp32"] / us[name], same_tokens=same) if name == kind else {})


def soft_images(batch: int, device: torch.device) -> Tensor:
    """uint8 [B, VIEW, VIEW, 3]."""
    coarse = torch.rand(batch, 3, COARSE, COARSE, device=device)
    return (F.interpolate(coarse, VIEW, mode="bilinear") * 255).byte().permute(0, 2, 3, 1).contiguous()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="images (128)")
    parser.add_argument("--rounds", type=int, default=20, help="times that each is timed (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = Architecture() if device.type == "cuda" else NARROW
    keep(rows(arch, device, args.batch, args.rounds), environment(), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
