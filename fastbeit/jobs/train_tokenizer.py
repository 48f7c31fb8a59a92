"""Train a dVAE of one's own, top to bottom: crops -> words, drawn -> pixels -> loss -> AdamW -> averaged weights."""

import contextlib
import shlex
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbeit.config.sections import DataConfig
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.data.batch import Batch
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.given import index_sources
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.data.progress import reported
from fastbeit.data.to_device import on_device
from fastbeit.engine.fitting import Rehearsal
from fastbeit.engine.ranks import World, start_world
from fastbeit.engine.sharded import count_weights, whole
from fastbeit.engine.zero import check_deepspeed
from fastbeit.errors import DONE, PREEMPTED, TokenizerError
from fastbeit.plural import counted
from fastbeit.tokenizer.disk import load_tokenizer, save_tokenizer
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.tokenizer.quality import Quality, WordUsage, measure_quality, verdict
from fastbeit.tokenizer.training.kmeans_start import solve_both_ends
from fastbeit.tokenizer.training.objective import DvaeTrainer, gumbel_noise
from fastbeit.train.checkpoint import newest_first
from fastbeit.train.log import RunLog
from fastbeit.train.loop import Look, Outcome, Reading, check_batch, train
from fastbeit.train.pipeline import settle_pipeline
from fastbeit.train.rundir import claim
from fastbeit.train.stop import Stop, StopWanted
from fastbeit.train.wandb_board import check_wandb

NUM_SHOWN = 8  # images on TensorBoard, above their reconstructions


def train_tokenizer(
    config: TokenizerTrainConfig, source: Path, val_source: Path | None, out: Path, command: list[str]
) -> int:
    """Train until `optim.steps`, or go on with a training that was interrupted, and write the tokenizer to `out`.

    Args:
        source: the images: an index, or what `build_index` takes.
        val_source: held-out images that the tokenizer is judged by; None: not judged.
        command: what the user typed; said again when the training stops early, and kept on the tokenizer's card.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad data, or `out` holds something else; the message says what to do.
    """
    check_wandb(config.log)
    images = DataConfig().model_copy(update={"index": str(source), "val_index": str(val_source or "")})
    world = start_world(config.engine)
    check_batch(config.optim.whole, world)
    check_deepspeed(config.engine, world)
    config, pipeline = settle_pipeline(config, world, out, None)
    levels = config.data.levels
    with world.within_first(lambda: claim(out, config)):
        images, lines = index_sources(images, out, bool(newest_first(out / "checkpoints")), world.from_first)
        val_index = open_index(Path(images.val_index), levels) if images.val_index else None
        index = open_index(Path(images.index), levels)
        task = DvaeTraining(config, world, index, val_index, [*lines, str(pipeline)])
        with Stop() as stop:
            world.barrier()
            outcome = train(task, config, world, out, stop, command)
            code = outcome.exit_code
            if code == DONE:
                with outcome.kept() as model:
                    if world.rank == 0:
                        code = _finish(task, model, outcome, out, stop, command)
    world.leave()
    return code


def _finish(task: "DvaeTraining", model: nn.Module, outcome: Outcome, out: Path, stop: Stop, command: list[str]) -> int:
    try:
        with stop.interrupts():
            _keep(task, model, outcome, out, command)
    except StopWanted:
        print(f"stopped while the tokenizer was judged; to go on: {shlex.join(command)}", file=sys.stderr)
        return PREEMPTED
    return DONE


def _keep(task: "DvaeTraining", model: nn.Module, outcome: Outcome, out: Path, command: list[str]) -> None:
    """The tokenizer of the averaged weights, and its card."""
    is_new = outcome.num_steps_taken or not _is_whole(out)
    said = ""
    if is_new:
        assert isinstance(model, DvaeTrainer)
        held_out = task.held_out or task.judge(model)
        origin = {
            "command": shlex.join(command),
            "index": task.index.fingerprint,
            "num_images": len(task.index),
            "steps": task.num_steps,
            "hours": round(outcome.seconds / 3600, 2),
            "held_out": held_out,
        }
        save_tokenizer(out, model.encoder, model.decoder, origin)
        said = "not judged: --val INDEX, of held-out images, says what it is worth"
        if held_out:
            said = verdict(held_out, task.config.model.vocab_size, task.judge_bundled())
    print("\n".join(filter(None, [said, f"tokenizer: {out}{'' if is_new else ' (was finished before)'}"])))


def _is_whole(out: Path) -> bool:
    """Whether a tokenizer was written before; a kill can have come between its two files."""
    try:
        return bool(load_tokenizer(out))
    except TokenizerError:
        return False


class DvaeTraining:
    """An image in, the image out, through words (arXiv 2102.12092, section 2.1)."""

    sums: tuple[str, ...] = ("loss", "error", "words")
    rehearsal: Rehearsal | None = None
    flops_per_image: int = 0
    layer_decay: float = 1.0
    best: str | None = None
    judged_by: str | None = None
    kept: dict[str, Any] = {}

    def __init__(
        self, config: TokenizerTrainConfig, world: World, index: Index, val_index: Index | None, lines: Sequence[str]
    ) -> None:
        """
        Args:
            lines: what the log shall say of how this is run.
        """
        self.lines = lines
        self.config, self.world, self.index, self.val_index = config, world, index, val_index
        self.optim = config.optim.whole
        self.ema_decay: float | None = config.objective.ema_decay
        self.origin, self.num_images = {"index": index.fingerprint}, len(index)
        self.num_steps, self.num_warmup = config.optim.steps, self.optim.warmup_steps
        self.epoch_steps = steps_per_epoch(len(index), config.optim.batch_size, "wrap")
        self.grid = [side // config.model.stride for side in config.data.image_size]
        self.looks = [Look("held_out", config.log.save_every, self.look)]
        self.held_out: dict[str, float] = {}  # what the last look found

    def make_model(self) -> nn.Module:
        model = DvaeTrainer(self.config, self.world.size)
        return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch does not declare it

    def start(self, model: nn.Module, stop: Stop) -> None:
        """First and last layers solved in closed form on the images of the first steps (`kmeans_start`)."""
        with whole(model.parameters(), written=True):
            if self.world.rank == 0:
                # the ranks stop together, before the first step
                with contextlib.suppress(StopWanted), stop.interrupts():
                    self._solve(model)

    def _solve(self, model: nn.Module) -> None:
        assert isinstance(model, DvaeTrainer)
        device, config = self.world.device, self.config
        num_crops = config.look_steps * config.optim.batch_size
        words = (
            f"start: {config.model.vocab_size:,} words from the colours of {num_crops:,} crops, by k-means, in 5 parts"
        )
        print(f"{words}; then {self.num_steps:,} steps", file=sys.stderr, flush=True)
        found = self._crops(self.index, config.seed, config.look_steps, what="start 1/5, batches read")
        generator = torch.Generator(device).manual_seed(config.seed)
        solve_both_ends(model.encoder, model.decoder, [batch.images.to(device) for batch in found], generator)

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        loader = make_loader(
            self.config.data.as_pretraining,
            self.index,
            token_size=None,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            first_step=first_step,
            num_steps=self.num_steps,
        )
        return on_device(loader, self.world.device)

    def inputs(self, batch: Batch, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Noise is drawn for the global batch, and each rank takes its share: as many ranks, the same words."""
        config, device, B = self.config, self.world.device, len(batch.images)
        generator = step_generator(config.seed, step, device)
        noise = gumbel_noise((B * self.world.size, config.model.vocab_size, *self.grid), generator)
        annealed = (config.temperature_at(step), config.kl_weight_at(step))
        numbers = (torch.full((B,), number, device=device) for number in annealed)
        # the model gives means over this rank's images, so each rank counts as one
        one = torch.ones((), dtype=torch.int64, device=device)
        return (batch.images, noise[self.world.rank * B :][:B], *numbers), one

    def read(self, sums: dict[str, Tensor], count: float) -> Reading:
        usage = WordUsage(sums["words"].long())
        loss, error = (sums[name].item() / count for name in ("loss", "error"))
        figures = {"words_in_use": usage.num_in_use, "word_perplexity": usage.perplexity}
        line = f"loss {loss:.4f}  MAE {error:.4f}  words {usage.num_in_use}"
        return Reading({"loss": loss, "mean_abs_error": error, **figures}, line, usage.warning())

    def look(self, model: nn.Module, log: RunLog, step: int, stop: Stop) -> Reading | None:
        """Show reconstructions by the averaged weights, and measure them where there are held-out images."""
        if self.world.rank:
            return None
        assert isinstance(model, DvaeTrainer)
        with stop.interrupts():
            tokenizer, (batch,) = _tokenizer_of(model), self._calm_crops(1)
            shown = batch.images[:NUM_SHOWN].cpu()  # DALI's lie on the GPU
            decoded = tokenizer.decode(tokenizer.encode(shown), tokenizer.grid(self.config.data.image_size)).cpu()
            self.held_out = self.judge(model)
        log.picture("reconstructions", torch.cat([_side_by_side(shown), _side_by_side(decoded)]), step)
        return Reading(self.held_out, f"held out: {Quality.line(self.held_out)}") if self.held_out else None

    def judge(self, model: DvaeTrainer) -> dict[str, float]:
        """Figures of held-out images; none where there are no such images."""
        if self.val_index is None:
            return {}
        return self._figures(_tokenizer_of(model))

    def judge_bundled(self) -> dict[str, float]:
        """Of the bundled tokenizer on the same images; none where it cannot take their size."""
        bundled = load_tokenizer("", self.world.device)
        try:
            bundled.grid(self.config.data.image_size)
        except ValueError:
            return {}
        return self._figures(bundled)

    def _figures(self, tokenizer: Tokenizer) -> dict[str, float]:
        batches = self._calm_crops(self.config.look_steps)
        return measure_quality(tokenizer, (batch.images for batch in batches)).figures()

    def greet(self, log: RunLog, model: nn.Module) -> None:
        log.say(
            f"{counted(self.num_images, 'image')}, {count_weights(model):,} parameters, "
            f"{counted(self.world.size, 'rank')} on {self.world.device.type}, steps {log.first_step} to {log.num_steps}"
        )
        if log.first_step:
            log.say(f"going on from the checkpoint of step {log.first_step}")
        for line in self.lines:
            log.say(line)

    def _calm_crops(self, num_steps: int) -> list[Batch]:
        """Without jitter, of held-out images if there are any; other crops than those of training."""
        calm = self.config.data.as_pretraining.model_copy(update={"jitter": 0.0})
        return self._crops(self.val_index or self.index, (self.config.seed + 1) % 2**63, num_steps, calm)

    def _crops(
        self, index: Index, seed: int, num_steps: int, data: DataConfig | None = None, what: str = "crops read"
    ) -> list[Batch]:
        loader = make_loader(
            data or self.config.data.as_pretraining,
            index,
            token_size=None,
            batch_size=self.config.optim.batch_size,
            seed=seed,
            rank=0,
            world_size=1,
            first_step=0,
            num_steps=num_steps,
        )
        return list(reported(loader, what, num_steps))


def _tokenizer_of(model: DvaeTrainer) -> DiscreteVAE:
    return DiscreteVAE(model.encoder, lambda: model.decoder, fingerprint="")


def _side_by_side(images: Tensor) -> Tensor:
    """[n, h, w, 3] to [h, n w, 3]."""
    return torch.cat(images.unbind(), dim=1)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The randomness of one step, the same after a resume."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
