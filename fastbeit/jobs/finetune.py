"""Fine-tuning, top to bottom (section 2.6):

index with labels -> view -> RandAugment -> random erasing -> Mixup or CutMix -> encoder -> feature -> head -> loss ->
AdamW, with a rate of its own for each block
"""

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.data.augment import draw_erasures, erase_
from fastbeit.data.batch import Batch
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.given import index_sources, missing
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.labelled import check_labels, make_labelled_loader
from fastbeit.data.mix import draw_mix, mix
from fastbeit.data.sampling import drop_path_keep
from fastbeit.data.to_device import move, on_device
from fastbeit.engine.fitting import Rehearsal
from fastbeit.engine.memory import footprint
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World, start_world
from fastbeit.engine.sharded import count_weights
from fastbeit.engine.work import step_flops
from fastbeit.engine.zero import check_deepspeed
from fastbeit.errors import DATA_MISSING, DONE, ConfigError, RunError
from fastbeit.evaluate.classify import check_classes, classify
from fastbeit.model.classify import Classifier, make_classifier
from fastbeit.model.kernels import chosen_kernels
from fastbeit.model.vit import normalise
from fastbeit.plural import counted
from fastbeit.train.beginning import how, kernels_before
from fastbeit.train.checkpoint import newest_first, resolve_checkpoint
from fastbeit.train.log import RunLog
from fastbeit.train.loop import Look, Reading, check_batch, train
from fastbeit.train.pipeline import settle_pipeline
from fastbeit.train.rundir import claim
from fastbeit.train.stop import Stop
from fastbeit.train.wandb_board import check_wandb
from fastbeit.weights.start import Start, lines_of, missing_init, start_of

FEWEST = 2  # classes that there is something to tell apart


def finetune(config: FinetuneConfig, command: list[str]) -> int:
    """Train until `optim.steps` or `optim.epochs` are done, or go on with a run that was interrupted.

    Args:
        command: what the user typed, said again where the run stops early.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad config, data, weights or checkpoint; the message says what to do.
    """
    _check_paths(config)
    check_wandb(config.log)
    out, checkpoints = Path(config.out), Path(config.out) / "checkpoints"
    world = start_world(config.engine)
    check_batch(config.optim, world)
    check_deepspeed(config.engine, world)
    config, pipeline = settle_pipeline(config, world, out, None)
    with world.within_first(lambda: claim(out, config)):
        is_fresh = not newest_first(checkpoints)
        data, indexed = index_sources(config.data, out, not is_fresh, world.from_first)
        config = config.model_copy(update={"data": data})
        index = open_index(Path(data.index), data.levels)
        val_index = open_index(Path(data.val_index), data.levels) if data.val_index else None
        _check_classes(index, val_index)
        classes = index.class_names
        start = start_of(config, lambda: make_classifier(config, len(classes)), world, is_fresh, classes)
        before = kernels_before(checkpoints) if world.rank == 0 else None
        chosen = chosen_kernels(config, len(classes), world, before)
        lines = [*indexed, str(pipeline), *chosen.lines, how(config.engine, world.device)]
        task = Finetuning(chosen.config, world, index, val_index, start, lines, {"kernels": chosen.kept})
        with Stop() as stop:
            world.barrier()
            outcome = train(task, config, world, out, stop, command)
    world.leave()
    if world.rank == 0 and outcome.checkpoint:
        print(f"checkpoint: {outcome.checkpoint}")
        if outcome.exit_code == DONE and val_index:
            print(f"best: {resolve_checkpoint(out / 'best')}")
    return outcome.exit_code


class Finetuning:
    """The task: an image in, its class out, from an encoder that was pre-trained (section 2.6)."""

    sums: tuple[str, ...] = ("loss", "right")
    best: str | None = "top1"

    def __init__(
        self,
        config: FinetuneConfig,
        world: World,
        index: Index,
        val_index: Index | None,
        start: Start | None = None,
        lines: Sequence[str] = (),
        kept: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            start: weights that a fresh run starts with; None: the authors' start, and on ranks other than 0.
            lines: what the log shall say of how this is run.
            kept: what checkpoints shall say of it.
        """
        self.config, self.world, self.index, self.val_index = config, world, index, val_index
        self.optim: OptimConfig = config.optim
        self.weights, self.lines = start, lines
        self.classes = index.class_names
        self.kept = {**(kept or {}), "classes": self.classes}
        self.origin = {"index": index.fingerprint, "list of classes": _digest(self.classes)}
        self.judged_by = val_index.fingerprint if val_index else None
        optim = config.optim
        self.ema_decay, self.layer_decay = optim.ema_decay, optim.layer_decay
        self.num_images, self.epoch_steps = len(index), steps_per_epoch(len(index), optim.batch_size, config.data.tail)
        self.num_steps = optim.steps or optim.epochs * self.epoch_steps
        self.num_warmup = min(optim.warmup_steps or optim.warmup_epochs * self.epoch_steps, self.num_steps)
        self.flops_per_image = step_flops(config, len(self.classes))
        self.rehearsal: Rehearsal | None = Rehearsal(
            footprint(
                config,
                num_outputs=len(self.classes),
                token_size=None,
                num_ranks=world.size,
                itemsize=compute_dtype(config.engine, world.device).itemsize,
            ),
            lambda num_images: blank_inputs(config, num_images, world.device),
        )
        self.looks: list[Look] = (
            [Look("validation", config.log.val_every or self.epoch_steps, self.look)] if val_index else []
        )
        self.mean, self.std = (
            torch.tensor(values, device=world.device) for values in (config.data.mean, config.data.std)
        )

    def make_model(self) -> Classifier:
        return make_classifier(self.config, len(self.classes))

    def start(self, model: nn.Module, stop: Stop) -> None:
        """From pre-trained weights, or the authors' initialisation."""
        if self.weights:
            self.weights.load(model)

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        loader = make_labelled_loader(
            self.config.data,
            self.config.augment,
            self.index,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            first_step=first_step,
            num_steps=self.num_steps,
        )
        return on_device(loader, self.world.device)

    def inputs(self, batch: Batch, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Normalise, erase, mix: what the authors' recipe does to images that were cropped and augmented."""
        config, size, device = self.config, self.config.data.image_size, self.world.device
        epoch, sample = batch.epoch.numpy(), batch.sample.numpy()
        pixels = normalise(batch.images, self.mean, self.std)
        boxes = draw_erasures(config.seed, epoch, sample, size, config.augment.erase)
        erase_(pixels, boxes, config.seed, epoch, sample)
        how_mixed = draw_mix(config.augment, config.seed, step, self.world.rank, size)
        assert batch.labels is not None
        pixels, others, share = mix(pixels, batch.labels, how_mixed)
        # copies of an image (Repeated Augmentation) are dropped from different blocks
        place = sample + self.num_images * (epoch % config.augment.repeats)
        keep = torch.from_numpy(drop_path_keep(config.seed, step, place, config.model.drop_rates))
        count = torch.full((), len(sample), device=device)
        return (pixels, batch.labels, others, share, move(keep, device)), count

    def read(self, sums: dict[str, Tensor], count: float) -> Reading:
        loss, accuracy = (sums[name].item() / count for name in ("loss", "right"))
        # of mixed images it is an undercount
        return Reading({"loss": loss, "accuracy": accuracy}, f"loss {loss:.4f}  accuracy {accuracy:.3f}")

    def look(self, model: nn.Module, log: RunLog, step: int, stop: Stop) -> Reading:
        """Top-1 and top-5 on all held-out images."""
        assert self.val_index and isinstance(model, Classifier)
        found = classify(model, self.config.data, self.val_index, self.classes, self.world, stop)
        line = f"held-out top-1 {found.top1:.4f}  top-5 {found.top5:.4f}  loss {found.loss:.4f}"
        figures = {"top1": found.top1, "top5": found.top5, "loss": found.loss, "bad": found.num_bad}
        warning = f"; {counted(found.num_bad, 'bad image')} left out" if found.num_bad else ""
        return Reading(figures, line + warning)

    def greet(self, log: RunLog, model: nn.Module) -> None:
        config, world = self.config, self.world
        log.say(
            f"{counted(self.num_images, 'image')} of {counted(len(self.classes), 'class')}, {count_weights(model):,} "
            f"parameters, {counted(world.size, 'rank')} on {world.device.type}, steps {log.first_step} to "
            f"{log.num_steps}, out {config.out}"
        )
        log.say(_spread(self.index))
        if not config.init:
            log.say("start: from scratch, for init is not set")
        for line in [*lines_of(self.weights, config.init, log.first_step), *self.lines]:
            log.say(line)
        log.say(f"index: {self.index.checked}; `fastbeit index check` compares all, and decodes the images")
        if not self.val_index:
            log.say("no held-out images: set data.val_index to know what the model is worth, and to keep the best one")


def blank_inputs(config: FinetuneConfig, num_images: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `Finetuning.inputs` gives the model, without content."""
    pixels = torch.zeros(num_images, *config.data.image_size, 3, device=device)
    labels = torch.zeros(num_images, dtype=torch.int64, device=device)
    keep = torch.ones(num_images, config.model.depth, 2, device=device)
    return pixels, labels, labels, torch.ones(num_images, device=device), keep


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def _spread(index: Index) -> str:
    """How many images the classes have; those that have none are never learnt, and that is said."""
    counts = np.bincount(index.labels[index.labels >= 0], minlength=len(index.class_names))
    empty = np.flatnonzero(counts == 0)
    line = f"images a class: {counts[counts > 0].min():,} to {counts.max():,}"
    if not len(empty):
        return line
    first = index.class_names[int(empty[0])]
    return (
        f"{line}; WARNING: {counted(len(empty), 'class')} without an image, such as '{first}': the model cannot know it"
    )


def _check_classes(index: Index, val_index: Index | None) -> None:
    """
    Raises:
        DataError: an image has no label (66).
        ConfigError: there are too few classes, or held-out images are of others.
    """
    for one in filter(None, (index, val_index)):
        check_labels(one)
    if len(index.class_names) < FEWEST:
        raise ConfigError(
            f"all images, such as '{index.name(0)}', are of one class, '{index.class_names[0]}': nothing can be told "
            "apart; give images of two classes or more"
        )
    if val_index:
        check_classes(val_index, index.class_names)


def _check_paths(config: FinetuneConfig) -> None:
    """What a run cannot do without is said before anything is started, all of it at once."""
    unset = [key for key, value in {"out": config.out, "data.index": config.data.index}.items() if not value]
    lines = [f"{key} is not set; add {key}=PATH" for key in unset]
    lines += [*missing(config.data, Path(config.out)), *missing_init(config.init, Path(config.out))]
    if unset:
        raise ConfigError("\n".join(lines))
    if lines:
        raise RunError("\n".join(lines), DATA_MISSING)
