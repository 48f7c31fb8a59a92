"""What a step computes and moves, counted on tensors without memory: the same on every machine.

An operation is one call that PyTorch dispatches, a kernel of ours being one; views, which touch no data, are not among
them. Bytes are those of the operations' tensors, as they stand: eager code, whatever a compiler would join. Of the
weights' and AdamW's there is a fixed share in each step, so that bytes an image are those of one image more.

Host milliseconds are measured, not counted: a step of a narrow model with as many blocks, on images of four patches,
in plain PyTorch, whose arithmetic takes no time to speak of. It is what Python, autograd and the dispatcher cost this
machine's CPU in an eager step; a CUDA kernel's launch comes on top.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import saved_bytes, without_memory
from benchmarks.predictions import CHIPS
from benchmarks.results import Row
from benchmarks.step.drawn import draw_inputs
from benchmarks.step.rates import VOCAB_SIZE, model_flops, work_of
from benchmarks.step.variants import VARIANTS, Case
from fastbeit.config.pretrain import Config
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World
from fastbeit.engine.update import clip_and_step
from fastbeit.model.beit import make_beit
from fastbeit.train.optim import make_optimizer

BATCH = 128  # images, for what is kept until the backward
EAGER = "triton", "reference"  # whose operations are counted
NARROW = ("model.width={}", "model.mlp_width=16", "data.image_size=32", "masking.num_masked=2", "masking.min_block=1")
NARROW_VOCAB = 16
HOST_STEPS = 21
OTHER_COUNTS = 2  # beside BATCH: images of the smaller of two steps


class Operations(TorchDispatchMode):
    """Counts operations and the bytes that they read and write, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _bytes((args, kwargs)), _bytes(out)
        # a view gives memory that it was given, and changes nothing in it
        if func._schema.is_mutable or not made.keys() <= given.keys():
            self.number += 1
            self.read += sum(given.values())
            self.written += sum((_changed(func, args, kwargs or {}) | made).values())
        return out


def _changed(func: Any, args: tuple, kwargs: dict) -> dict[int, int]:
    """Of the tensors that an operation writes into."""
    arguments = func._schema.arguments
    named = dict(zip((arg.name for arg in arguments), args, strict=False)) | kwargs
    return _bytes([named.get(arg.name) for arg in arguments if arg.alias_info and arg.alias_info.is_write])


def _bytes(values: Any) -> dict[int, int]:
    """By place in memory: what is expanded is there once, and so is what two tensors share."""
    found: dict[int, int] = {}
    for t in tree_leaves(values):
        if isinstance(t, Tensor):
            storage = t.untyped_storage()
            found[storage._cdata] = min(found.get(storage._cdata, 0) + t.nbytes, storage.nbytes())
    return found


@dataclass(frozen=True)
class Counted:
    operations: int
    read: int  # bytes
    written: int  # bytes
    saved: int  # bytes, that the forward leaves to the backward


def count(config: Config, num_images: int) -> Counted:
    """A step in bfloat16: forward, backward, clipping, AdamW."""
    with without_memory(config, num_images, VOCAB_SIZE) as (model, inputs):
        optimizer = make_optimizer(model, config.optim)
        # moments are made in the first step alone
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        clip_and_step(optimizer, config.optim.clip_grad)
        own = [*inputs, *model.parameters(), *model.buffers()]
        with Operations() as found:
            with torch.autocast("cpu", torch.bfloat16), saved_bytes(own) as saved:
                loss_sum, _ = model(*inputs)
            loss_sum.backward()
            clip_and_step(optimizer, config.optim.clip_grad)
    return Counted(found.number, found.read, found.written, saved[0])


def host_ms(config: Config) -> float:
    """Of this machine's CPU, for all that a step calls; `config` is of a narrow model."""
    world = World(0, 1, torch.device("cpu"))
    model = make_beit(config, NARROW_VOCAB)
    engine = make_engine(config.engine, config.optim, model, make_optimizer(model, config.optim), world)
    images, masked, slots, labels, keep = draw_inputs(config, world, 0)
    inputs, one = (images, masked, slots, labels.clamp_max(NARROW_VOCAB - 1), keep), torch.ones(())
    laps = []
    for _ in range(HOST_STEPS):
        began = time.process_time()
        engine.accumulate(inputs, one, is_last=True)
        engine.step()
        laps.append(1e3 * (time.process_time() - began))
    return median(laps)


def narrow(size: str) -> Config:
    """As deep, with as many heads; plain PyTorch, which a CPU runs."""
    heads = Case(size, VARIANTS["reference"], 1).config.model.num_heads
    settings = (NARROW[0].format(heads), *NARROW[1:])
    case = Case(size, VARIANTS["reference"], 1, settings=("engine.device=cpu", *settings))
    return case.config


def rows(sizes: list[str]) -> Iterator[Row]:
    for size in sizes:
        yield _work(size)
        for name in EAGER:
            yield _operations(size, name)
        ms = host_ms(narrow(size))
        yield dict(case=f"{size}, the host's part of an eager step, measured here", size=size, cpu_ms=ms)


def _work(size: str) -> Row:
    """FLOPs, of which an MFU takes ours; and what each chip should need."""
    config, batch = Case(size, VARIANTS["triton"], BATCH).config, BATCH
    ours, authors, work = model_flops(config), model_flops(config, authors=True), work_of(config)
    row: Row = dict(case=f"{size}, products of matrices", size=size, gflop_per_image=ours / 1e9)
    row |= dict(gflop_per_image_authors=authors / 1e9, mfu_uses="gflop_per_image")
    return row | {f"predicted_ms_{chip.name}": work.step_ms(chip, batch) for chip in CHIPS} | dict(batch=batch)


def _operations(size: str, name: str) -> Row:
    config = Case(size, VARIANTS[name], BATCH).config
    few, many = count(config, BATCH - OTHER_COUNTS), count(config, BATCH)
    read, written = (many.read - few.read) / OTHER_COUNTS, (many.written - few.written) / OTHER_COUNTS
    return dict(
        case=f"{size}, {VARIANTS[name]}, batch of {BATCH}",
        size=size,
        variant=name,
        batch=BATCH,
        operations=many.operations,
        read_mb_per_image=read / 1e6,
        written_mb_per_image=written / 1e6,
        saved_mib=many.saved / 2**20,
    )
