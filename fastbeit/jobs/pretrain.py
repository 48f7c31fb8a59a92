"""Pre-training, top to bottom:

index -> two views -> blockwise mask -> visual tokens -> masked embedding -> encoder -> masked head -> loss -> AdamW
"""

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.data.batch import Batch
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.given import index_sources, missing
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.data.sampling import drop_path_keep
from fastbeit.data.to_device import move, on_device
from fastbeit.engine.fitting import Rehearsal
from fastbeit.engine.memory import Footprint, footprint
from fastbeit.engine.protocol import compute_dtype
from fastbeit.engine.ranks import World, start_world
from fastbeit.engine.sharded import count_weights
from fastbeit.engine.work import step_flops
from fastbeit.engine.zero import check_deepspeed
from fastbeit.errors import DATA_MISSING, ConfigError, RunError
from fastbeit.evaluate.masked import evaluate
from fastbeit.evaluate.probe import open_probe
from fastbeit.model.beit import Beit, make_beit, num_outputs
from fastbeit.model.kernels import chosen_kernels
from fastbeit.plural import counted
from fastbeit.tokenizer.disk import BUNDLED_NOTE, is_bundled
from fastbeit.tokenizer.source import TokenSource, open_token_source
from fastbeit.train.beginning import how, kernels_before
from fastbeit.train.checkpoint import newest_first
from fastbeit.train.log import RunLog
from fastbeit.train.loop import Look, Reading, check_batch, train
from fastbeit.train.pipeline import settle_pipeline
from fastbeit.train.rundir import claim
from fastbeit.train.stop import Stop
from fastbeit.train.wandb_board import check_wandb
from fastbeit.weights.start import Start, lines_of, missing_init, start_of


def pretrain(config: Config, command: list[str]) -> int:
    """Train until `optim.steps` or `optim.epochs` are done, or go on with a run that was interrupted.

    Args:
        command: what the user typed, said again where the run stops early.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad config, data or checkpoint; the message says what to do.
    """
    _check_paths(config)
    check_wandb(config.log)
    warnings = masking.try_rule(masking.rule_of(config))
    began = time.perf_counter()
    world = start_world(config.engine)
    check_batch(config.optim, world)
    check_deepspeed(config.engine, world)
    tokens = Path(config.data.tokens) if config.data.tokens else None
    config, pipeline = settle_pipeline(config, world, Path(config.out), tokens)
    out, checkpoints = Path(config.out), Path(config.out) / "checkpoints"
    with world.within_first(lambda: claim(out, config)):
        is_fresh = not newest_first(checkpoints)
        data, indexed = index_sources(config.data, out, not is_fresh, world.from_first)
        config = config.model_copy(update={"data": data})
        index = open_index(Path(data.index), data.levels)
        source = open_token_source(config, index, world.device)
        start = start_of(config, lambda: make_beit(config, source.vocab_size), world, is_fresh)
        opened = time.perf_counter()
        before = kernels_before(checkpoints) if world.rank == 0 else None
        chosen = chosen_kernels(config, num_outputs(config, source.vocab_size), world, before)
        tried = time.perf_counter()
        took = f"start: ranks, index and tokenizer {opened - began:.1f} s, trials of kernels {tried - opened:.1f} s"
        lines = [*indexed, str(pipeline), *chosen.lines, how(config.engine, world.device), took, *warnings]
        kept = {"kernels": chosen.kept, "tokenizer_path": source.tokenizer_path}
        task = Pretraining(chosen.config, world, index, source, start, lines, kept)
        with Stop() as stop:
            world.barrier()
            outcome = train(task, config, world, out, stop, command)
    world.leave()
    if world.rank == 0 and outcome.checkpoint:
        print(f"checkpoint: {outcome.checkpoint}")
    return outcome.exit_code


class Pretraining:
    """BEiT's task: a masked image in, the visual tokens of its masked patches out (section 2.3)."""

    sums: tuple[str, ...] = ("loss", "right")
    layer_decay: float = 1.0
    best: str | None = None
    judged_by: str | None = None

    def __init__(
        self,
        config: Config,
        world: World,
        index: Index,
        source: TokenSource,
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
        self.weights, self.lines, self.kept = start, lines, kept or {}
        self.config, self.optim, self.world, self.index, self.source = config, config.optim, world, index, source
        self.origin = {"index": index.fingerprint, "tokenizer": source.fingerprint}
        self.num_images, optim = len(index), config.optim
        self.ema_decay = optim.ema_decay
        self.epoch_steps = steps_per_epoch(len(index), optim.batch_size, config.data.tail)
        self.num_steps = optim.steps or optim.epochs * self.epoch_steps
        self.num_warmup = min(optim.warmup_steps or optim.warmup_epochs * self.epoch_steps, self.num_steps)
        self.mask_rule = masking.rule_of(config)
        self.flops_per_image = step_flops(config, num_outputs(config, source.vocab_size))
        self.rehearsal: Rehearsal | None = Rehearsal(
            self._footprint(), lambda num_images: blank_inputs(config, num_images, world.device)
        )
        val_index, levels = config.data.val_index, config.data.levels
        self.val_index = open_index(Path(val_index), levels) if val_index else None
        self.looks: list[Look] = [Look("validation", config.log.val_every, self.look)] if self.val_index else []
        labelled = Path(config.probe.index), Path(config.probe.val_index)
        self.knn = open_probe(config.data, *labelled, config.probe_block) if config.probe.index else None
        if self.knn:
            self.looks.append(Look("probe", config.probe.every_epochs * self.epoch_steps, self.probe))

    def make_model(self) -> Beit:
        return make_beit(self.config, vocab_size=self.source.vocab_size)

    def start(self, model: nn.Module, stop: Stop) -> None:
        """From the authors' initialisation, or from weights of another model where they fit."""
        if self.weights:
            self.weights.load(model)

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        loader = make_loader(
            self.config.data,
            self.index,
            token_size=self.source.token_size,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            first_step=first_step,
            num_steps=self.num_steps,
        )
        return on_device(loader, self.world.device)

    def inputs(self, batch: Batch, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The paper in a few lines: hide patches, look up their visual tokens, and ask the model for them."""
        epoch, sample = (move(numbers, self.world.device) for numbers in (batch.epoch, batch.sample))
        slots = masking.draw(self.mask_rule, epoch, sample)
        labels = masking.label(slots, self.source.tokens(batch, slots))
        keep = drop_path_keep(self.config.seed, step, batch.sample.numpy(), self.config.model.drop_rates)
        keep = move(torch.from_numpy(keep), self.world.device)
        return (batch.images, slots.masked, slots.predict_idx, labels, keep), (labels != masking.UNUSED).sum()

    def _footprint(self) -> Footprint:
        return footprint(
            self.config,
            num_outputs=num_outputs(self.config, self.source.vocab_size),
            token_size=self.source.token_size,
            num_ranks=self.world.size,
            itemsize=compute_dtype(self.config.engine, self.world.device).itemsize,
        )

    def read(self, sums: dict[str, Tensor], count: float) -> Reading:
        loss, accuracy = (sums[name].item() / count for name in ("loss", "right"))
        line = f"loss {loss:.4f}  masked accuracy {accuracy:.4f}"
        return Reading({"loss": loss, "masked_accuracy": accuracy}, line)

    def look(self, model: nn.Module, log: RunLog, step: int, stop: Stop) -> Reading:
        """Loss and accuracy on held-out images."""
        assert self.val_index and isinstance(model, Beit)
        num_crops = self.config.log.val_crops * len(self.val_index)
        found = evaluate(self.config, model, self.source.tokenizer(), self.val_index, self.world, num_crops, stop)
        line = f"held-out loss {found.loss:.4f}  masked accuracy {found.accuracy:.4f}"
        return Reading({"loss": found.loss, "accuracy": found.accuracy}, line)

    def probe(self, model: nn.Module, log: RunLog, step: int, stop: Stop) -> Reading:
        """Classes of labelled images by k-NN on frozen features."""
        assert self.knn and isinstance(model, Beit)
        found = self.knn.see(model, compute_dtype(self.config.engine, self.world.device), self.world, stop)
        line = f"probe of block {self.knn.block}: k-NN top-1 {found.top1:.4f}  top-5 {found.top5:.4f}"
        return Reading({"knn_top1": found.top1, "knn_top5": found.top5}, line)

    def greet(self, log: RunLog, model: nn.Module) -> None:
        config, source, world = self.config, self.source, self.world
        log.say(
            f"{counted(self.num_images, 'image')}, {count_weights(model):,} parameters, {counted(world.size, 'rank')} "
            f"on {world.device.type}, steps {log.first_step} to {log.num_steps}, out {config.out}"
        )
        for line in [*lines_of(self.weights, config.init, log.first_step), *self.lines]:
            log.say(line)
        if world.device.type == "cuda":
            gflop = f"{self.flops_per_image / 1e9:.1f} GFLOP an image"
            log.say(f"MFU counts {gflop}: products of this model, without tokenizer or recomputation")
        log.say(f"index: {self.index.checked}; `fastbeit index check` compares all, and decodes the images")
        log.say(f"visual tokens: {source}")
        if source.agreement is not None:
            log.write({"step": log.first_step, "event": "tokenizer", "agreement_with_fp32": source.agreement})
        if source.fingerprint and is_bundled(source.fingerprint):
            log.say(BUNDLED_NOTE)
        if config.data.num_crops:
            log.say(
                f"data.num_crops={config.data.num_crops}: only so many crops an image; the official recipe draws new "
                "ones (num_crops=0)"
            )


def blank_inputs(config: Config, num_images: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `Pretraining.inputs` gives the model, without content: black images, the first patches masked."""
    images = torch.zeros(num_images, *config.data.image_size, 3, dtype=torch.uint8, device=device)
    slots = torch.arange(config.num_slots, device=device).repeat(num_images, 1)
    masked = torch.zeros(num_images, config.num_patches, dtype=torch.bool, device=device)
    keep = torch.ones(num_images, config.model.depth, 2, device=device)
    return images, masked.scatter_(1, slots, config.mask != "none"), slots, torch.zeros_like(slots), keep


def _check_paths(config: Config) -> None:
    """What a run cannot do without is said before anything is started, all of it at once."""
    unset = [key for key, value in {"out": config.out, "data.index": config.data.index}.items() if not value]
    lines = [f"{key} is not set; add {key}=PATH" for key in unset]
    lines += missing(config.data, Path(config.out))
    for key, path in {"probe.index": config.probe.index, "probe.val_index": config.probe.val_index}.items():
        if path and not Path(path).is_file():
            found = "is no index" if Path(path).exists() else "does not exist"
            lines.append(f"{key}: '{path}' {found}; make one with `fastbeit index SOURCE -o labelled.idx`")
    lines += missing_init(config.init, Path(config.out))
    path = config.tokenizer.path
    if config.objective == "tokens" and path and not Path(path).exists():
        lines.append(f"tokenizer.path: '{path}' does not exist; {_how_to_get(path)}")
    if unset:
        raise ConfigError("\n".join(lines))
    if lines:
        raise RunError("\n".join(lines), DATA_MISSING)


def _how_to_get(path: str) -> str:
    return (
        f"get OpenAI's with `fastbeit tokenizer fetch -o {path}`, or make it of weights that you have with `fastbeit "
        f"tokenizer import FILE -o {path}`, or of your images with `fastbeit tokenizer train --data INDEX -o {path}`; "
        "tokenizer.path= (nothing) takes the small one that comes with fastbeit"
    )
