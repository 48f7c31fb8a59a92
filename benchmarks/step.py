"""Training steps of BEiT-B on random images, for each choice of kernels, with torch.compile and without.

    python -m benchmarks.step [--steps N] [--batch N] [--json FILE]     wants CUDA
    python -m benchmarks.step --device cpu                              a toy model, to see that all of it runs

A step is what the trainer does with a batch that is on the device: forward, backward, clipping, AdamW. Images, masks
and labels are drawn before; masks are BEiT's, labels random, so that the loss stays near log V. FLOPs are those of the
products of matrices, counted in a forward and a backward without recomputation (104.1 G an image of BEiT-B).
"""

import argparse
import gc
import itertools
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.card import cuda_laps, environment, host_laps
from benchmarks.results import Row, figures, first_line, write_json
from benchmarks.sdpa import SdpaChoices
from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.data.sampling import drop_path_keep
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World
from fastbeit.model.beit import make_beit
from fastbeit.train.optim import learning_rate, make_optimizer, set_learning_rate

# kernels, compiled; what is least likely to fail comes first, what is least missed where time runs out comes last
VARIANTS = ("reference", False), ("triton", False), ("triton", True), ("reference", True)
VOCAB_SIZE = 8192
BATCH = 256  # images; BEiT's 2048 on eight cards
IMAGE_MIB = 128  # about 100 that are saved for the backward in bfloat16, and room for what comes and goes
WARM_UP = 3  # steps after the first
NUM_BATCHES = 4  # that take turns
TOY: dict[str, Any] = {
    "data": {"image_size": 32},
    "masking": {"num_masked": 6, "min_block": 2},
    "model": {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 8},
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # as `Beit.forward` takes them


def config_of(kernels: str, compiled: bool, batch: int, device: str) -> Config:
    """The recipe of BEiT-B, as the defaults have it."""
    settings = dict(TOY) if device == "cpu" else {}
    settings |= {
        "optim": {"batch_size": batch},
        "engine": {"name": "single", "device": device, "compile": compiled},
        "kernels": {"backend": kernels},
    }
    return Config.model_validate(settings)


def fitting_batch() -> int:
    """Images a step that the free memory has room for, at most BEiT's own."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(BATCH, free // 2**20 // IMAGE_MIB // 8 * 8))


def draw_inputs(config: Config, device: torch.device, number: int) -> Inputs:
    B, (height, width) = config.optim.batch_size, config.data.image_size
    gen = torch.Generator(device).manual_seed(number)
    images = torch.randint(256, (B, height, width, 3), generator=gen, device=device, dtype=torch.uint8)
    tokens = torch.randint(VOCAB_SIZE, (B, config.num_patches), generator=gen, device=device)
    sample = torch.arange(B, device=device) + number * B
    slots = masking.draw(masking.rule_of(config), torch.zeros_like(sample), sample)
    labels = masking.label(slots, tokens.gather(1, slots.predict_idx))
    keep = torch.from_numpy(drop_path_keep(config.seed, number, sample.cpu().numpy(), config.model.drop_rates))
    return images, slots.masked, slots.predict_idx, labels, keep.to(device)


def flops_per_image(config: Config) -> int:
    """Of a forward and a backward, counted on tensors without memory."""
    with torch.device("meta"):
        model = make_beit(config, VOCAB_SIZE)
        images = torch.zeros(1, *config.data.image_size, 3, dtype=torch.uint8)
        masked = torch.zeros(1, config.num_patches, dtype=torch.bool)
        slots = torch.zeros(1, config.masking.num_masked, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.logits(images, masked, slots).sum().backward()
    return counter.get_total_flops()


def attention_choices(model: nn.Module, inputs: Inputs, device: torch.device) -> str:
    """What SDPA takes in a forward of training, on two images; a compiled model asks with the same arguments."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), SdpaChoices() as choices:
        model(*(tensor[:2] for tensor in inputs))
    return str(choices)


class Training:
    """The trainer's own parts, on batches that take turns."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        model = make_beit(config, VOCAB_SIZE).to(world.device)
        inputs = [draw_inputs(config, world.device, number) for number in range(NUM_BATCHES)]
        counts = [(labels != masking.UNUSED).sum().clamp_min(1) for _, _, _, labels, _ in inputs]
        self.sdpa = attention_choices(model, inputs[0], world.device)
        self.optimizer = make_optimizer(model, config.optim)
        self.engine = make_engine(config.engine, config.optim, model, self.optimizer, world)
        self.batches = itertools.cycle(zip(inputs, counts, strict=True))
        self.num_steps = 0
        self.loss = torch.zeros(())

    def step(self) -> None:
        """Never waits for the device."""
        inputs, count = next(self.batches)
        # the beginning of a long warm-up: labels are random, so that there is little to learn and nothing to lose
        lr = learning_rate(self.num_steps, num_steps=100_000, num_warmup=10_000, optim=self.config.optim)
        set_learning_rate(self.optimizer, lr)
        loss_sum, _ = self.engine.accumulate(inputs, count, is_last=True)
        self.engine.step()
        self.loss = loss_sum / count
        self.num_steps += 1


def measure(config: Config, num_steps: int, flops: int) -> Row:
    """Times, rates and memory of steps after the first; what the first takes longer is compilation."""
    world = World(0, 1, torch.device(config.engine.device))
    on_cuda = world.device.type == "cuda"
    training = Training(config, world)
    start = time.perf_counter()
    training.step()
    training.loss.item()  # waits for the device
    first_step_s = time.perf_counter() - start
    for _ in range(WARM_UP):
        training.step()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    laps = sorted((cuda_laps if on_cuda else host_laps)(training.step, num_steps))
    rate = config.optim.batch_size / median(laps) * 1e3
    return dict(
        step_ms=median(laps),
        p95_ms=laps[math.ceil(0.95 * num_steps) - 1],
        images_per_s=rate,
        tflop_per_s=rate * flops / 1e12,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None,
        first_step_s=first_step_s,
        loss=float(training.loss),
        sdpa=training.sdpa,
    )


def row_of(kernels: str, compiled: bool, batch: int, device: Literal["cuda", "cpu"], num_steps: int) -> Row:
    """One variant; what goes wrong with it is its row, and the next one has its turn."""
    name = f"{kernels} kernels, {'torch.compile' if compiled else 'eager'}, batch of {batch}"
    row: Row = dict(case=name, kernels=kernels, compile=compiled, batch=batch, steps=num_steps)
    config = config_of(kernels, compiled, batch, device)
    try:
        flops = flops_per_image(config_of("reference", False, batch, device))
        row |= dict(gflop_per_image=flops / 1e9) | measure(config, num_steps, flops)
    except torch.OutOfMemoryError:
        row["error"] = f"a batch of {batch} does not fit into the memory of this card; try --batch {max(1, batch // 2)}"
    # a kernel that this card refuses costs its own row, not those of the others
    except Exception as err:
        row["error"] = first_line(err)
    return row


def free_memory() -> None:
    """Nothing that a variant compiled or allocated is left to the next."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=summary)
    parser.add_argument("--steps", type=int, default=50, help="that are timed (default: 50)")
    parser.add_argument("--batch", type=int, help=f"images a step (default: {BATCH}, or what the memory has room for)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a toy model (default: cuda)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, after each")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch or 1) < 1:
        parser.error("--steps and --batch want at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device to take steps on; --device cpu runs a toy model", file=sys.stderr)
        return 2
    batch = args.batch or (4 if args.device == "cpu" else fitting_batch())
    where, rows = environment(), []
    print(json.dumps(where))
    for kernels, compiled in VARIANTS:
        rows.append(row_of(kernels, compiled, batch, args.device, args.steps))
        print(f"{rows[-1]['case']:50} {figures(rows[-1])}", flush=True)
        if args.json:
            write_json(args.json, dict(where, rows=rows))
        free_memory()
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
