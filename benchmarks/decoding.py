"""Pipelines against Pillow's, two views of photos each: PSNR, tokens that stay the same, images a second.

    python -m benchmarks.decoding [--json FILE]     on a card DALI decodes there ("mixed"); without one, in small

One after the other, each with its own decoding processes: a rate is that of the whole host, or of the card.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.card import environment
from benchmarks.photos import make_index
from benchmarks.results import Row, first_line, keep
from fastbeit.config.sections import DataConfig
from fastbeit.cores import num_cores
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.errors import RunError
from fastbeit.tokenizer.disk import load_tokenizer

PIPELINES = "pillow", "torch", "dali"  # the first is what the others are held against
TOKEN_SIZE = 112, 112
WARM_UP = 2  # batches
ENDLESS = 10**6


def rows(index: Index, device: torch.device, batch: int, num_batches: int) -> Iterator[Row]:
    tokenizer = load_tokenizer("", device, torch.float32)
    wanted: list[Batch] = []
    for pipeline in PIPELINES:
        row: Row = dict(case=f"{pipeline}, {'decodes on the card' if decodes_on(device, pipeline) else 'on the host'}")
        if pipeline == "dali" and not find_spec("nvidia.dali"):
            yield row | dict(left_out="nvidia.dali is not installed")
            continue
        try:
            with closing(loader(index, pipeline, batch, device)) as batches:
                found = [on_host(one) for one in islice(batches, WARM_UP)]
                began = time.perf_counter()
                for _ in islice(batches, num_batches):
                    pass
                if device.type == "cuda":
                    torch.cuda.synchronize()
                row["images_per_s"] = num_batches * batch / (time.perf_counter() - began)
        except (RunError, RuntimeError) as err:  # what one pipeline cannot is its row
            yield row | dict(error=first_line(err))
            continue
        wanted = wanted or found
        yield row | (compared(found, wanted, tokenizer, device) if pipeline != PIPELINES[0] else {})


def decodes_on(device: torch.device, pipeline: str) -> bool:
    return device.type == "cuda" and pipeline == "dali"


def loader(index: Index, pipeline: str, batch: int, device: torch.device) -> Any:
    workers = min(16, num_cores()) if device.type == "cuda" else 0
    data = DataConfig.model_validate(dict(pipeline=pipeline, num_workers=workers, tail="wrap"))
    place: dict[str, Any] = dict(seed=0, rank=0, world_size=1, first_step=0, num_steps=ENDLESS)
    return make_loader(data, index, token_size=TOKEN_SIZE, batch_size=batch, **place)


def on_host(batch: Batch) -> Batch:
    """A copy of its own: a pipeline may use its memory again."""
    assert batch.token_images is not None
    images, token_images = (x.to("cpu", copy=True) for x in (batch.images, batch.token_images))
    return Batch(images, token_images, batch.sample, batch.epoch)


def compared(found: list[Batch], wanted: list[Batch], tokenizer: Any, device: torch.device) -> Row:
    def views(batches: list[Batch], name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    patch, token = (psnr(views(found, name), views(wanted, name)) for name in ("images", "token_images"))
    tokens, expected = (tokenizer.encode(views(one, "token_images").to(device)) for one in (found, wanted))
    return dict(patch_view_db=patch, token_view_db=token, same_tokens=(tokens == expected).double().mean().item())


def psnr(one: Tensor, two: Tensor) -> float:
    """Decibels, mean over images [n, h, w, 3]; equal images count as 78."""
    errors = (one.double() - two.double()).square().mean((1, 2, 3)).clamp_min(1e-3)
    return (10 * torch.log10(255**2 / errors)).mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, num_batches = (128, 30) if device.type == "cuda" else (4, 2)
    with tempfile.TemporaryDirectory(prefix="fastbeit-decoding-") as folder:
        try:
            index = open_index(make_index("photos", Path(folder) / "photos", 0))
        except RunError:  # no photos are installed
            index = open_index(make_index("synthetic", Path(folder) / "synthetic", 4 * batch))
        found = keep(rows(index, device, batch, num_batches), environment(), args.json)
    return int(any("error" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
