"""The loop, of every training: resume, step, log, save, look, stop. It knows nothing of BEiT.

A job tells it what a step is, as a `Task`.
"""

import contextlib
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastbeit
from fastbeit.config.running import EngineConfig, LogConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.data.batch import Batch
from fastbeit.engine.fitting import Rehearsal, fitting_accumulate, out_of_memory_in_one_line
from fastbeit.engine.protocol import compiled_before, compute_dtype, make_engine
from fastbeit.engine.ranks import World
from fastbeit.engine.zero import building
from fastbeit.errors import DONE, PREEMPTED, ConfigError, RunError
from fastbeit.files import aside, put_in_place
from fastbeit.plural import counted
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.checkpoint import Saver
from fastbeit.train.ema import Average
from fastbeit.train.feed import Feed
from fastbeit.train.log import RunLog
from fastbeit.train.meter import Meter
from fastbeit.train.optim import learning_rate, make_optimizer, set_learning_rate
from fastbeit.train.rundir import keep_config, keep_deepspeed_config
from fastbeit.train.settings import in_words
from fastbeit.train.stop import Stop, StopWanted

MAX_SKIPPED_IN_A_ROW = 5  # updates with a gradient that is not finite, after which a training is stopped
MAX_EMPTY_IN_A_ROW = 5  # steps that predicted nothing, likewise


@dataclass(frozen=True)
class Reading:
    """What the sums of some steps say."""

    figures: dict[str, float]  # for the log
    line: str  # the figures in one line of text
    warning: str | None = None


@dataclass(frozen=True)
class Look:
    """An evaluation that runs every so many steps, whose time is not theirs: held-out loss, reconstructions."""

    name: str  # of the event in the log
    every: int  # steps; 0: at the end alone
    # given the model that is kept, the log, the step and the stop that ends it early, by `StopWanted` on all ranks that
    # look; None: this rank does not
    see: Callable[[nn.Module, RunLog, int, Stop], Reading | None]


class Task(Protocol):
    """What a job tells the loop."""

    optim: OptimConfig
    num_images: int
    num_steps: int
    num_warmup: int
    epoch_steps: int
    origin: dict[str, Any]  # what a checkpoint must agree with: where its data and its labels come from
    kept: dict[str, Any]  # what its checkpoints say besides, of how they were computed
    sums: tuple[str, ...]  # names of what the model returns
    ema_decay: float | None  # of the averaged weights; None: none are kept
    layer_decay: float  # each block learns so many times as fast as the one above it
    # the figure of a look, of which more is better, whose best checkpoint is kept; None: the newest are, alone. Each
    # look is then one at a checkpoint
    best: str | None
    judged_by: str | None  # fingerprint of the images that it is judged by
    looks: list[Look]
    flops_per_image: int  # of a forward and backward, for TFLOP/s and MFU; 0: not known
    rehearsal: Rehearsal | None  # for optim.accumulate=auto; None: the job takes no micro-batches

    def make_model(self) -> nn.Module:
        """With the weights to start from, on any device. Its forward takes what `inputs` gives, and returns sums over
        a micro-batch, the loss first."""
        ...

    def start(self, model: nn.Module, stop: Stop) -> None:
        """What a fresh training computes before its first step: on all ranks, which get the weights of rank 0."""
        ...

    def batches(self, first_step: int) -> Generator[Batch, None, None]: ...

    def inputs(self, batch: Batch, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Tensors with the image as dim 0, and this rank's share of the number that the summed loss is divided by."""
        ...

    def read(self, sums: dict[str, Tensor], count: float) -> Reading:
        """What sums over all ranks say; `count` is the sum of what `inputs` gave."""
        ...

    def greet(self, log: RunLog, model: nn.Module) -> None: ...


class TaskConfig(Protocol):
    """The sections of a configuration that the loop needs."""

    @property
    def seed(self) -> int: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def profile(self) -> bool: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    exit_code: int
    checkpoint: Path | None  # the last one
    # gives the model, the averaged one where there is one; all ranks must enter it
    kept: Callable[[], AbstractContextManager[nn.Module]]
    seconds: float  # over all parts of the training
    num_steps_taken: int  # in this part


@out_of_memory_in_one_line("no room for the start; end what else uses the card, or take a smaller model")
def train(task: Task, config: TaskConfig, world: World, out: Path, stop: Stop, command: list[str]) -> Outcome:
    """Train until `task.num_steps`, or go on with a training that was interrupted.

    Raises:
        RunError: no data, too many bad images, held-out images that are gone, a loss that is not finite: on all ranks
            in the same step. No usable checkpoint, a disk that is full: on the ranks that notice it; a launcher ends
            the others.
    """
    optim, began = task.optim, time.monotonic()
    check_batch(optim, world)

    # resume order:
    # 1. the newest checkpoint that verifies, made from what this training is made from
    # 2. weights, before the engine takes its share of them; or a start
    # 3. their average
    # 4. micro-batches, before the engine that counts them, and the moments, which the engine spreads over its ranks
    # 5. the step: order, crops, masks, noise, drop path and learning rate are functions of it
    saver = Saver(out / "checkpoints", task.origin, config, task.num_steps, world)
    torch.manual_seed(config.seed)
    with building(config.engine, world):
        model = task.make_model()
    saver.load_weights(model)
    model.to(world.device)
    if saver.last_checkpoint is None:
        task.start(model, stop)
        world.share(model)
    average = Average(model, task.ema_decay)
    saver.load_average(average)
    optimizer = make_optimizer(model, optim, task.layer_decay)
    fit = fitting_accumulate(optim, config.engine, task.rehearsal, model, world, saver.fit)
    engine = make_engine(config.engine, optim, model, optimizer, world, fit.accumulate)
    saver.load_moments(engine)
    first_step = step = saver.first_step
    began -= saver.seconds_before
    activations = str(compute_dtype(config.engine, world.device)).removeprefix("torch.")
    ran = {"ranks": world.size, "device": world.device.type, "activations": activations}
    ran["micro_batches"] = fit.accumulate
    schedule = [task.num_steps, task.num_warmup]

    def save() -> None:
        known = {"ran": ran, "versions": _versions(), "seconds": time.monotonic() - began, "fit": fit.kept, **task.kept}
        known["schedule"] = schedule
        saver.save(step, engine, model, average, known)

    def say() -> None:
        lr = learning_rate(step - 1, task.num_steps, task.num_warmup, optim)
        _say(log, task, meter, {"step": step, "epoch": step / task.epoch_steps, "lr": lr}, len(bad_samples))
        _stop_if_lost(meter, step, lr, saver.last_checkpoint)

    lost: RunError | None = None  # what ended a look

    def look_on(look: Look) -> None:
        nonlocal lost
        try:
            with meter.paused(), average.kept(task.make_model) as kept:
                figures = _see(log, look, kept, step, stop)
            if task.best in figures:
                saver.judge(step, task.best, figures[task.best], task.judged_by)
        except RunError as err:
            # told to all ranks with the next batch: no step that was taken is lost
            lost = err

    def next_batch() -> Batch | None:
        try:
            return feed.next(lost or log.error or bad_samples.error)
        except RunError as err:
            # on all ranks in this step: no step that was taken is lost
            if step > saver.last_step:
                save()
            raise RunError(f"{err}; last checkpoint: {saver.last_checkpoint or 'none'}", err.exit_code) from None

    meter = Meter(world, optim.batch_size, task.flops_per_image)
    if world.rank == 0:
        # every check has passed: from here on there are traces of this start
        keep_config(out, config)
        keep_deepspeed_config(out, engine.configuration)
    bad_samples = BadSamples(out / "bad_samples.jsonl", task.num_images, writes=world.rank == 0, anew=step == 0)
    with (
        out_of_memory_in_one_line(fit.remedy),
        contextlib.closing(task.batches(step)) as batches,
        RunLog(out if world.rank == 0 else None, step, task.num_steps, config) as log,
        _profiler(config, out, world) as profiler,
    ):
        feed = Feed(batches, world, stop, bad_samples, meter)
        for problem in saver.problems:
            log.say(f"checkpoint passed over: {problem}")
        for problem in filter(None, (log.problem, bad_samples.problem)):
            log.say(problem)
        if changes := saver.changes(ran | _versions()):
            log.say(f"other than in the part up to step {step}: {in_words(changes)}")
            log.write({"step": step, "event": "resume", "changes": changes})
        if step and saver.schedule not in (None, schedule):
            log.say(_another_schedule(step, saver.schedule, schedule, optim))
        task.greet(log, model)
        if engine.configuration:
            log.say(f"DeepSpeed's configuration: {json.dumps(engine.configuration)}")
        if fit.line:
            log.say(fit.line)
            log.write({"step": step, "event": "fit", **fit.figures})
        for look in task.looks:
            # a kill between a checkpoint and the look at it has left none
            if step and _is_seen(look, step, task) and world.sum([log.lacks(step, look.name)])[0]:
                look_on(look)
        while step < task.num_steps and (batch := next_batch()):
            # ---- one step -------------------------------------------------------------------------------------------
            tensors, count = task.inputs(batch, step)
            count = world.add(count)
            set_learning_rate(optimizer, learning_rate(step, task.num_steps, task.num_warmup, optim))
            for part, is_last in micro_batches(tensors, fit.accumulate):
                meter.add(engine.accumulate(part, count.clamp_min(1), is_last))
            meter.end_step(count, engine.step(), engine.overflowed)
            average.follow(step)
            step += 1
            if step == first_step + 1:
                log.say(f"first step: {meter.seconds():.1f} s, compilation and first data in it{compiled_before()}")
            # ---------------------------------------------------------------------------------------------------------

            log.advance()
            if profiler:
                profiler.step()
            # once in a while: say how it goes
            if step % config.log.every == 0 or step in (first_step + 1, task.num_steps):
                say()
            # once in a while: save, before anybody looks, which takes long
            is_judged = task.best and any(_is_seen(look, step, task) for look in task.looks)
            if feed.save_wanted or step == task.num_steps or is_due(step, config.log.save_every) or is_judged:
                stop.save_wanted = False
                save()
            # once in a while: look
            for look in task.looks:
                if _is_seen(look, step, task):
                    look_on(look)
        # the last look may have been cut short, too: it is made up for when the training is started again
        is_done = step == task.num_steps and not (task.looks and world.sum([stop.wanted])[0])
        if not is_done:
            if meter.num_steps:
                say()
            if step > saver.last_step:
                save()
            how = f"at step {step} of {task.num_steps}, saved" if step else "before the first step"
            log.say(f"stopped {how}; to go on: {shlex.join(command)}")

    if error := lost or log.error or bad_samples.error:
        raise error
    code = DONE if is_done else PREEMPTED
    kept = partial(average.kept, task.make_model)
    return Outcome(code, saver.last_checkpoint, kept, time.monotonic() - began, step - first_step)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_seen(look: Look, step: int, task: Task) -> bool:
    return step == task.num_steps or is_due(step, look.every)


def _another_schedule(step: int, old: list[int], new: list[int], optim: OptimConfig) -> str:
    """What a run of more or fewer steps than it was begun with does to its learning rate."""
    was, now = (learning_rate(at, steps, warmup, optim) for at, (steps, warmup) in ((step - 1, old), (step, new)))
    return (
        f"schedule: of {counted(new[0], 'step')} from here on, up to step {step} of {old[0]:,}: the learning rate goes "
        f"from {was:.2e} to {now:.2e}" + (", and falls again" if now > was else "")
    )


def check_batch(optim: OptimConfig, world: World) -> None:
    accumulate = 1 if optim.accumulate == "auto" else optim.accumulate
    parts = world.size * accumulate
    if optim.batch_size % parts:
        fit = max(1, round(optim.batch_size / parts)) * parts
        raise ConfigError(
            f"optim.batch_size {optim.batch_size} is not a multiple of {world.size} ranks x "
            f"{accumulate} micro-batches; try {fit}"
        )


def micro_batches(tensors: tuple[Tensor, ...], accumulate: int) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Contiguous shares of a step's images, and whether each is the last."""
    num_images = len(tensors[0])
    size = math.ceil(num_images / accumulate)
    for start in range(0, num_images, size):
        yield tuple(tensor[start : start + size] for tensor in tensors), start + size >= num_images


def _say(log: RunLog, task: Task, meter: Meter, place: dict[str, float], num_bad: int) -> None:
    sums, count, common = meter.read()
    reading = task.read(dict(zip(task.sums, sums, strict=True)), count)
    log.write({**place, **reading.figures, **common, "bad_samples": num_bad})
    waits = f"{common['images_per_s']:.1f} img/s  waiting for data {common['data_wait_share']:.0%}"
    if "mfu" in common:
        waits += f"  MFU {common['mfu']:.1%}"
    log.show(int(place["step"]), f"{reading.line}  {waits}")
    if reading.warning:
        log.say(reading.warning)
    if meter.num_empty:
        log.say(
            f"WARNING: {counted(meter.num_empty, 'step')} since the last line had nothing to predict: no label in any "
            "image"
        )


def _see(log: RunLog, look: Look, model: nn.Module, step: int, stop: Stop) -> dict[str, float]:
    """What a look found; nothing, where it was ended early or is not this rank's."""
    began = time.perf_counter()
    # as it is written: batches of other shapes would be compiled for
    with torch.compiler.set_stance("force_eager"):
        try:
            reading = look.see(model, log, step, stop)
        except StopWanted:
            return {}
    if not reading:
        return {}
    log.write({"step": step, "event": look.name, **reading.figures, "seconds": time.perf_counter() - began})
    log.say(f"step {step}  {reading.line}")
    return reading.figures


def _stop_if_lost(meter: Meter, step: int, lr: float, last_checkpoint: Path | None) -> None:
    if meter.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"loss or gradient was not finite in the last {meter.skipped_in_a_row} steps up to step {step} "
            f"(learning rate {lr:.2e}); no update was made from them. Lower optim.lr or optim.clip_grad, or warm up "
            f"longer, in another out; last checkpoint: {last_checkpoint or 'none'}"
        )
    if meter.empty_in_a_row >= MAX_EMPTY_IN_A_ROW:
        raise RunError(
            f"there was nothing to predict in the last {meter.empty_in_a_row} steps up to step {step}: no label in any "
            "image, so nothing is learnt. Look at masks and labels with `fastbeit data show`; last checkpoint: "
            f"{last_checkpoint or 'none'}"
        )


@contextlib.contextmanager
def _profiler(config: TaskConfig, out: Path, world: World):
    """Traces steps 3 to 5 of this start, when asked to; gives the profiler to step, or None."""
    if not config.profile or world.rank:
        yield None
        return
    with torch.profiler.profile(
        # there is but one cycle; otherwise PyTorch 2.11 warns, and crashes where a warning is an error
        acc_events=True,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: _keep_trace(profiler, out / "profile.json"),
    ) as profiler:
        yield profiler


def _keep_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """An extra, which does not end a training."""
    try:
        profiler.export_chrome_trace(str(aside(path)))
        put_in_place(path)
    except (OSError, RuntimeError) as err:
        print(f"no profile: '{path}': {err}", file=sys.stderr)


def _versions() -> dict[str, str]:
    return {"fastbeit": fastbeit.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
