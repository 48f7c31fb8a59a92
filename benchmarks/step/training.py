"""Steps as the trainer takes them, timed: forward, backward, sum over ranks, clipping, AdamW."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from statistics import median

import torch

from benchmarks.card import cuda_laps, host_laps
from benchmarks.predictions import chip_of
from benchmarks.results import Row
from benchmarks.sdpa import SdpaChoices
from benchmarks.step.drawn import Source
from benchmarks.step.rates import VOCAB_SIZE, work_of
from benchmarks.step.sources import SOURCES
from benchmarks.step.variants import Case
from fastbeit.config.pretrain import Config
from fastbeit.engine.cards import peak_of
from fastbeit.engine.protocol import compute_dtype, make_engine
from fastbeit.engine.ranks import World
from fastbeit.model.attention import attention_choice
from fastbeit.model.beit import make_beit
from fastbeit.train.optim import learning_rate, make_optimizer, set_learning_rate

WARM_UP = 3  # steps after the first
HOST_STEPS = 5


class Training:
    """The trainer's own parts; batches and their inputs come from `source`."""

    def __init__(self, config: Config, world: World, source: Source) -> None:
        self.config, self.world, self.source = config, world, source
        torch.manual_seed(config.seed)
        self.model = make_beit(config, VOCAB_SIZE).to(world.device)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.engine = make_engine(config.engine, config.optim, self.model, self.optimizer, world)
        self.num_steps = 0
        self.waited_s = 0.0
        self.loss = torch.zeros(())

    def step(self) -> None:
        """Never waits for the device."""
        began = time.perf_counter()
        batch = next(self.source.batches)
        self.waited_s += time.perf_counter() - began
        inputs, count = self.source.inputs(batch, self.num_steps)
        count = self.world.add(count.clone()).clamp_min(1)
        # the beginning of a long warm-up: labels are random, so that there is little to learn and nothing to lose
        lr = learning_rate(self.num_steps, num_steps=100_000, num_warmup=10_000, optim=self.config.optim)
        set_learning_rate(self.optimizer, lr)
        loss_sum, *_ = self.engine.accumulate(inputs, count, is_last=True)
        self.engine.step()
        self.loss = self.world.add(loss_sum.clone()) / count
        self.num_steps += 1


def measure(case: Case, world: World, num_steps: int, source: str) -> Row:
    """Times, rates and memory of steps after the first; what the first takes longer is compilation.

    With one step, that one alone.
    """
    config = case.config
    with closing(SOURCES[source](config, world)) as sources:
        training = Training(config, world, next(sources))
        began = time.perf_counter()
        training.step()
        loss = training.loss.item()  # waits for the device
        row: Row = _facts(config, world) | dict(source=source, first_step_s=time.perf_counter() - began)
        if num_steps == 1:
            return row | dict(loss=loss)
        for _ in range(WARM_UP):
            training.step()
        laps, timed = _timed(training, num_steps)
        step_ms = max(world.gather([median(laps)]))
        row |= dict(step_ms=step_ms, p95_ms=laps[math.ceil(0.95 * num_steps) - 1]) | timed
        row |= _rates(config, world, row) | dict(loss=float(training.loss))
        if row["attention"] == "sdpa":
            row["sdpa"] = attention_choices(training)
    return row


def _timed(training: Training, num_steps: int) -> tuple[list[float], Row]:
    """Milliseconds of each step, sorted; and what else is seen while they are taken."""
    on_cuda = training.world.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    training.waited_s, began = 0.0, time.perf_counter()
    laps = sorted((cuda_laps if on_cuda else host_laps)(training.step, num_steps))
    found: Row = dict(data_wait_share=training.waited_s / (time.perf_counter() - began))
    if on_cuda:
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["host_ms"] = median(host_ms(training.step) for _ in range(HOST_STEPS))
    return laps, found


def host_ms(step: Callable[[], object]) -> float:
    """Milliseconds until a step is enqueued on an idle card: at most, for a full launch queue makes the host wait."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def _facts(config: Config, world: World) -> Row:
    """Who computes in which precision."""
    ops, model = config.kernels.by_op, config.model
    head_width, has_bias = model.width // model.num_heads, model.relative_position != "none"
    attention, _ = attention_choice(ops.attention, world.device, config.num_patches + 1, head_width, has_bias)
    dtype = str(compute_dtype(config.engine, world.device)).removeprefix("torch.")
    return dict(precision=dtype, attention=attention, ops=asdict(ops))


def _rates(config: Config, world: World, row: Row) -> Row:
    work, images = work_of(config), config.optim.batch_size // world.size
    flops, rank_rate = work.flops, images / row["step_ms"] * 1e3
    found: Row = dict(
        images_per_s=rank_rate,  # of a rank
        all_images_per_s=rank_rate * world.size,
        gflop_per_image=flops / 1e9,
        tflop_per_s=rank_rate * flops / 1e12,
    )
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else ""
    if row["precision"] == "bfloat16":
        if peak := peak_of(gpu):
            found |= dict(mfu=rank_rate * flops / peak, peak_tflop_per_s=peak / 1e12)
        if chip := chip_of(gpu):
            found["predicted_ms"] = work.step_ms(chip, images)
    return found


def attention_choices(training: Training) -> str:
    """What SDPA takes in a forward of training, on two images; a compiled model asks with the same arguments."""
    device, source = training.world.device, training.source
    inputs, _ = source.inputs(next(source.batches), training.num_steps)
    dtype = compute_dtype(training.config.engine, device)
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        torch.compiler.set_stance("force_eager"),
        SdpaChoices() as choices,
    ):
        training.model(*(tensor[:2] for tensor in inputs))
    return str(choices)
