"""No step of a training makes the host wait: on tensors without memory, where reading a value is an error."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastbeit.config.finetune import AugmentConfig, FinetuneConfig, VitConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.tokenizer import Architecture
from fastbeit.data import to_device
from fastbeit.data.batch import Batch
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World
from fastbeit.jobs.finetune import Finetuning
from fastbeit.jobs.pretrain import Pretraining
from fastbeit.tokenizer.dvae import Encoder
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.precision import Chosen
from fastbeit.tokenizer.source import EncodedTokens
from fastbeit.train.loop import micro_batches
from fastbeit.train.meter import Meter
from fastbeit.train.optim import make_optimizer, set_learning_rate

META = torch.device("meta")
B = 8


class Copies(TorchDispatchMode):
    """Notes what is copied from the CPU to the device of no memory, but for what was pinned before."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.seen: list[str] = []
        self.num_moved = 0

    def pin(self, x: Tensor, device: torch.device) -> Tensor:
        self.pinned.append(x)
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        outs = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        if any(x.is_meta for x in (*tensors, *outs)):
            # a scalar of no dimension travels as an argument of the kernel
            from_host = [x for x in tensors if x.device.type == "cpu" and (x.ndim or "_to_copy" in func.name())]
            self.num_moved += sum(any(x is p for p in self.pinned) for x in from_host)
            self.seen += [f"{func.name()} {tuple(x.shape)}" for x in from_host if not any(x is p for p in self.pinned)]
        return out


class _Index:
    fingerprint = "none"
    class_names = [str(i) for i in range(1000)]

    def __len__(self) -> int:
        return 1000


def make_task(config: Config, world: World) -> Pretraining:
    with META:
        encoder = Encoder(Architecture(vocab_size=8192))
    tokenizer = DiscreteVAE(encoder, lambda: pytest.fail("decodes"), "none")  # pyright: ignore[reportArgumentType]
    source = EncodedTokens(Chosen(tokenizer, "fp32", 1.0, ""), config, META)
    return Pretraining(config, world, _Index(), source)  # pyright: ignore[reportArgumentType]


def make_fine_tuning(config: FinetuneConfig, world: World) -> Finetuning:
    return Finetuning(config, world, _Index(), None)  # pyright: ignore[reportArgumentType]


def make_batch(config: VitConfig) -> Batch:
    """As on a GPU: views and labels are on the device already, numbers on the host."""
    height, width = config.data.image_size
    images = torch.empty(B, height, width, 3, dtype=torch.uint8, device=META)
    labels = torch.empty(B, dtype=torch.int64, device=META)
    views = images[:, :112, :112]
    return Batch(images, views, torch.arange(B), torch.zeros(B, dtype=torch.int64), labels=labels)


def steps(
    copies: Copies,
    monkeypatch: pytest.MonkeyPatch,
    change: Any = lambda batch: batch,
    kind: Any = Config,
    make: Callable[[Any, World], Any] = make_task,
) -> None:
    """Two full steps of BEiT-B, of two micro-batches, as train/loop.py takes them."""
    monkeypatch.setattr(to_device, "_pinned", copies.pin)
    # the fused optimizer runs on no tensors without memory, but for this check
    adam = import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    config = kind.model_validate({"optim": {"batch_size": B}, "kernels": {"backend": "reference"}})
    world = World(0, 1, META)
    task = make(config, world)
    with META:
        model = task.make_model().to(META)
    optimizer = make_optimizer(model, config.optim)
    engine, meter = make_engine(config.engine, config.optim, model, optimizer, world, 2), Meter(world, B)
    for step in range(2):
        batch = change(make_batch(config))
        with copies:
            tensors, count = task.inputs(batch, step)
            set_learning_rate(optimizer, 1e-3)
            for part, is_last in micro_batches(tensors, 2):
                meter.add(engine.accumulate(part, count.clamp_min(1), is_last))
            meter.end_step(count, grad_norm=engine.step())


def test_a_step_copies_nothing_but_from_pinned_memory(monkeypatch: pytest.MonkeyPatch):
    """Sample, epoch and drop path of each step travel; nothing else, and no tensor is made of Python numbers."""
    copies = Copies()
    steps(copies, monkeypatch)
    assert copies.seen == []
    assert copies.num_moved == 2 * 3


@pytest.mark.parametrize("augment", [{"cutmix": 0}, {"mixup": 0, "erase": 1.0}], ids=str)
def test_a_step_of_fine_tuning_copies_nothing_else_either(monkeypatch: pytest.MonkeyPatch, augment):
    """Drop path and the table of erased boxes travel."""
    copies = Copies()
    monkeypatch.setitem(augment, "repeats", 2)
    steps(
        copies,
        monkeypatch,
        kind=FinetuneConfig,
        make=lambda config, world: make_fine_tuning(
            config.model_copy(update={"augment": AugmentConfig.model_validate(augment)}), world
        ),
    )
    assert copies.seen == []
    assert copies.num_moved == 2 * 2


def test_the_test_sees_a_copy(monkeypatch: pytest.MonkeyPatch):
    """Token views that come from memory that is not pinned would be told."""
    copies = Copies()
    monkeypatch.setattr(
        "fastbeit.tokenizer.source.move", lambda x, device: x.to(device) if x.device.type == "cpu" else x
    )
    steps(
        copies, monkeypatch, lambda batch: replace(batch, token_images=torch.zeros(B, 112, 112, 3, dtype=torch.uint8))
    )
    assert copies.seen == ["aten::_to_copy (8, 112, 112, 3)"] * 2


def test_reading_a_value_is_an_error_here():
    for read in (Tensor.item, Tensor.nonzero, Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(torch.zeros(1, device=META))
