"""What visual tokens cost: `python -m benchmarks.tokenizer [--only PART ...] [--threads N] [--json FILE]`.

    encode     images a second at OpenAI's size, random weights: the dall-e package, its logits and their argmax, in
               turn with ours
    memory     peak bytes beside weights and images, counted on tensors without memory
    agreement  share of tokens that are those of fp32: by --tokenizer, on photos; and by random weights of OpenAI's
               size, of whose words none is likelier than another, on a few
    step       a training step of BEiT-B with tokens made on the fly and, in turn, read from a cache

Times are medians. On a machine with CUDA all but `memory` run there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.card import cuda_clock, environment
from benchmarks.kernels.__main__ import medians
from benchmarks.memory import PeakMemory
from fastbeit import masking
from fastbeit.checksums import check_blocks
from fastbeit.config.pretrain import Config
from fastbeit.config.tokenizer import Architecture
from fastbeit.data.demo_photos import gather_photos
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World
from fastbeit.model.beit import make_beit
from fastbeit.tokenizer.cache.reader import FORMAT, Card, Recipe, TokenCache, npy_header, view_path
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.tokenizer.dvae import Encoder, to_mapped
from fastbeit.tokenizer.fast import TOGETHER_ON_GPU, DiscreteVAE, FastEncoder
from fastbeit.tokenizer.precision import DTYPES, encoding_dtype, token_agreement
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.train.optim import make_optimizer

VIEW, GRID = (112, 112), (14, 14)  # pixels and tokens of BEiT's token view
MEMORY_BATCH = 128  # images of a rank, as the authors train
FEW_PHOTOS = 8
CACHED_IMAGES = 4096
Row = dict[str, Any]
Work = dict[str, Callable[[], object]]


def in_turn(work: Work, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each."""

    def clock(one: Callable[[], object]) -> float:
        start = time.perf_counter()
        one()
        return 1e6 * (time.perf_counter() - start)

    turns = {who: lambda _, one=one: one for who, one in work.items()}
    us = medians(turns, cuda_clock if device.type == "cuda" else clock, rounds)
    return {who: taken / 1e6 for who, taken in us.items()}


def random_images(num_images: int, size: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randint(0, 256, (num_images, *size, 3), dtype=torch.uint8, device=device)


@torch.no_grad()
def encode(args: argparse.Namespace, device: torch.device) -> list[Row]:
    import dall_e

    official, encoder = dall_e.Encoder().to(device), Encoder(Architecture()).to(device)
    encoder.load_state_dict(official.state_dict())
    images = random_images(args.batch, VIEW, device)
    x = to_mapped(images).contiguous()  # what the official transform gives
    kinds = ("fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    ours = {f"ours, {kind}": FastEncoder(encoder, DTYPES[kind]) for kind in kinds}
    expected = official(x).argmax(1).flatten(1)
    same = {who: (one(to_mapped(images)) == expected).double().mean().item() for who, one in ours.items()}
    work: Work = {who: lambda one=one: one(to_mapped(images)) for who, one in ours.items()}
    rule, sample = masking.rule_of(Config()), torch.arange(args.batch, device=device)
    places = masking.draw(rule, torch.zeros_like(sample), sample).predict_idx
    work[f"ours, {kinds[0]}, masked slots"] = lambda: ours[f"ours, {kinds[0]}"](to_mapped(images), places)
    seconds = in_turn({"dall-e": lambda: official(x).argmax(1), **work}, device, args.rounds)
    return [
        dict(who=who, img_per_s=args.batch / s, times=seconds["dall-e"] / s, same_tokens=same.get(who, 1.0))
        for who, s in seconds.items()
    ]


@torch.no_grad()
def memory(args: argparse.Namespace, device: torch.device) -> list[Row]:
    with torch.device("meta"):
        encoder, x = Encoder(Architecture()), torch.empty(MEMORY_BATCH, 3, *VIEW)
    rows: list[Row] = []
    for kind, together in (("", 0), ("fp32", 1), ("fp32", TOGETHER_ON_GPU), ("fp16", TOGETHER_ON_GPU)):
        ours = FastEncoder(encoder, DTYPES[kind or "fp32"])
        ours.together = together
        with PeakMemory() as counted:
            ours(x) if kind else encoder(x).argmax(1)
        who = f"ours, {kind}, {together} at a time" if kind else f"dall-e, fp32, {MEMORY_BATCH} images"
        rows.append(dict(who=who, peak_mib=counted.peak / 2**20))
        rows[-1]["of_dall_e"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    return rows


def photos(size: tuple[int, int]) -> Tensor:
    """uint8 [B, h, w, 3]: each photo of the demo, and its quarters."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        gather_photos(Path(folder) / "photos", None)
        for path in sorted(Path(folder).rglob("*.jpg")):
            photo = Image.open(path).convert("RGB")
            w, h = photo.width // 2, photo.height // 2
            corners = [(0, 0), (0, h), (w, 0), (w, h)]
            for part in (photo, *(photo.crop((left, top, left + w, top + h)) for left, top in corners)):
                found.append(np.asarray(ImageOps.fit(part, (size[1], size[0]), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(found))


def agreement(args: argparse.Namespace, device: torch.device) -> list[Row]:
    encoder, few = Encoder(Architecture()).to(device), photos(VIEW)[:: 5 * 3][:FEW_PHOTOS]
    with torch.no_grad():
        mean = encoder(to_mapped(few.to(device))).mean((0, 2, 3))
        encoder.get_parameter("blocks.output.conv.b").sub_(mean)

    def no_decoder() -> Any:
        raise AssertionError("nothing is decoded")

    loads: dict[str, Callable[[torch.dtype], Tokenizer]] = {
        args.tokenizer or "bundled": lambda dtype: load_tokenizer(args.tokenizer, device, dtype),
        "random weights": lambda dtype: DiscreteVAE(encoder, no_decoder, "", dtype),
    }
    rows = []
    for who, load in loads.items():
        exact = load(torch.float32)
        images = few if who == "random weights" else photos(exact.view_size(GRID))
        for kind in ("bf16", "fp16"):
            same = token_agreement(load(DTYPES[kind]), exact, images)
            rows.append(dict(who=f"{who}, {kind}, {len(images)} images", same_tokens=same))
    return rows


def open_random_cache(folder: Path) -> TokenCache:
    """A cache as `fastbeit tokenize` writes it, of random tokens."""
    tokens = np.random.default_rng(0).integers(0, 8192, (CACHED_IMAGES, GRID[0] * GRID[1]), np.uint16)
    header = npy_header(*tokens.shape)
    view_path(folder, 0).write_bytes(header + tokens.tobytes())
    facts: Row = dict(num_images=CACHED_IMAGES, views=1, grid=GRID, token_size=VIEW, vocab_size=8192)
    recipe = Recipe(
        **facts, seed=0, index="", crop_scale=(0.08, 1), crop_ratio=(0.75, 1.33), flip=0.5, jitter=0.4,
        jitter_on="", image_size=(224, 224), levels="high_byte", pipeline="", tokenizer="",
    )  # fmt: skip
    card = Card(format=FORMAT, recipe=recipe, precision="fp32", chunk_rows=1, command="")
    view = np.memmap(view_path(folder, 0), "<u2", "r", len(header), tokens.shape)
    return TokenCache(folder, card, [view], check_blocks({}, {}))


def step(args: argparse.Namespace, device: torch.device) -> list[Row]:
    config, batch = Config(), args.step_batch
    model = make_beit(config, vocab_size=8192).to(device)
    engine = make_engine(config.engine, config.optim, model, make_optimizer(model, config.optim), World(0, 1, device))
    dtype = encoding_dtype("auto", device)
    encoder = FastEncoder(Encoder(Architecture()).to(device), dtype)
    images, views = random_images(batch, config.data.image_size, device), random_images(batch, VIEW, device)
    sample = torch.arange(batch)

    def train(tokens: Callable[[Tensor], Tensor]) -> None:
        ids = sample.to(device)
        slots = masking.draw(masking.rule_of(config), torch.zeros_like(ids), ids)
        labels = masking.label(slots, tokens(slots.predict_idx))
        inputs = images, slots.masked, slots.predict_idx, labels, None
        engine.accumulate(inputs, (labels != masking.UNUSED).sum(), is_last=True)
        engine.step()

    @torch.no_grad()
    def on_the_fly(places: Tensor) -> Tensor:
        return encoder(to_mapped(views), places)

    with tempfile.TemporaryDirectory() as folder:
        cache = open_random_cache(Path(folder))

        def cached() -> Tensor:
            return cache.read(torch.randint(CACHED_IMAGES, (batch,)), sample * 0)

        seconds = in_turn(
            {
                "on the fly": lambda: train(on_the_fly),
                "cached": lambda: train(lambda places: cached().to(device).gather(1, places)),
            },
            device,
            args.rounds,
        )
        num_bytes = cache.views[0][0].nbytes
    return [
        dict(who=who, step_ms=1e3 * s, img_per_s=batch / s, times=seconds["on the fly"] / s, bytes_per_image=of)
        for (who, s), of in zip(seconds.items(), (0, num_bytes), strict=True)
    ]


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], list[Row]]] = {
    "encode": encode,
    "memory": memory,
    "agreement": agreement,
    "step": step,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="times that each takes its turn, after three to warm up")
    parser.add_argument("--batch", type=int, help="images encoded together (8; on CUDA 128)")
    parser.add_argument("--step-batch", type=int, help="images a training step (2; on CUDA 128)")
    parser.add_argument("--tokenizer", default="", metavar="DIR", help="judged by `agreement` (the bundled one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (128 if device.type == "cuda" else 8)
    args.step_batch = args.step_batch or (128 if device.type == "cuda" else 2)
    torch.set_num_threads(args.threads)
    where = environment() | dict(threads=args.threads, batch=args.batch, step_batch=args.step_batch)
    print(json.dumps(where))
    found = {}
    for part in args.only:
        torch.manual_seed(0)
        found[part] = PARTS[part](args, device)
        for row in found[part]:
            cells = (f"{name} {value:,.4g}" for name, value in row.items() if name != "who")
            print(f"{part:10} {row['who']:32}", "  ".join(f"{cell:>22}" for cell in cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(where | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
