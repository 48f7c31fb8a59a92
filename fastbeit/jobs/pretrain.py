"""Pre-training, top to bottom:

index -> two views -> visual tokens -> blockwise mask -> masked embedding -> encoder -> masked head -> loss -> AdamW
"""

import contextlib
import platform
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastbeit
from fastbeit.config.pretrain import Config
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.data.plans import steps_per_epoch
from fastbeit.data.sampling import drop_path_keep
from fastbeit.data.to_device import on_device
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World, start_world
from fastbeit.errors import CHECKPOINT_UNUSABLE, DATA_MISSING, DONE, PREEMPTED, ConfigError, DataError, RunError
from fastbeit.evaluate.masked import evaluate
from fastbeit.masking import UNUSED, draw_masks, plan_prediction
from fastbeit.model.beit import Beit, make_beit
from fastbeit.tokenizer.disk import BOX_NOTE, is_box
from fastbeit.tokenizer.source import TokenSource, open_token_source
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.checkpoint import find_checkpoint, load_model, load_optimizer, load_state, save_checkpoint
from fastbeit.train.log import RunLog
from fastbeit.train.meter import Meter
from fastbeit.train.optim import MAX_SKIPPED_IN_A_ROW, learning_rate, make_optimizer, set_learning_rate
from fastbeit.train.rundir import claim
from fastbeit.train.stop import Stop
from fastbeit_kernels.backend import check_backend, uses_triton


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
    world = start_world(config.engine)
    _check_batch(config, world)
    _check_kernels(config, world)
    index = open_index(Path(config.data.index))
    source = open_token_source(config, index, world.device)
    with claim(Path(config.out), config) if world.rank == 0 else contextlib.nullcontext(), Stop() as stop:
        world.barrier()
        return _train(config, index, source, world, stop, command)


def _train(config: Config, index: Index, source: TokenSource, world: World, stop: Stop, command: list[str]) -> int:
    out, optim, device = Path(config.out), config.optim, world.device
    val_index = open_index(Path(config.data.val_index)) if config.data.val_index else None
    epoch_steps = steps_per_epoch(len(index), optim.batch_size, config.data.tail)
    num_steps = optim.steps or optim.epochs * epoch_steps
    num_warmup = min(optim.warmup_steps or optim.warmup_epochs * epoch_steps, num_steps)

    # resume order:
    # 1. the newest checkpoint that verifies, made from the same images and tokenizer
    # 2. weights, before the engine takes its share of them
    # 3. moments, which the engine spreads over its ranks
    # 4. the step: order, crops, masks, drop path and learning rate are functions of it
    origin = {"index": index.fingerprint, "tokenizer": source.fingerprint}
    found, problems = find_checkpoint(out / "checkpoints")
    first_step = _resumed_step(found, origin) if found else 0
    torch.manual_seed(config.seed)
    model = make_beit(config, vocab_size=source.vocab_size)
    if found:
        model.load_state_dict(load_model(found))
    model.to(device)
    optimizer = make_optimizer(model, optim)
    engine = make_engine(config, model, optimizer, world)
    if found:
        engine.load_optimizer_state(load_optimizer(found))

    meter = Meter(world, optim.batch_size)
    bad_samples = BadSamples(out / "bad_samples.jsonl", len(index))
    loader = make_loader(
        config.data,
        index,
        token_size=source.token_size,
        batch_size=optim.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        first_step=first_step,
        num_steps=num_steps,
    )

    def save(step: int) -> Path:
        moments = engine.optimizer_state()
        state = {**origin, "config": config.model_dump(mode="json"), "versions": _versions()}
        if world.rank == 0:
            save_checkpoint(out / "checkpoints", step, model.state_dict(), moments, state, config.log.keep)
        world.barrier()
        return out / "checkpoints" / f"step-{step:06d}"

    num_val_crops = config.log.val_views * len(val_index) if val_index else 0
    drop_rates = [config.model.drop_path * i / max(1, config.model.depth - 1) for i in range(config.model.depth)]
    done, lost = first_step, None
    with (
        contextlib.closing(on_device(loader, device)) as batches,
        RunLog(out if world.rank == 0 else None, first_step, num_steps) as log,
        _profiler(config, out, world) as profiler,
    ):
        _greet(log, config, world, model, source, len(index), problems)
        waiting_since = time.perf_counter()
        for step in range(first_step, num_steps):
            batch = lost or _next(batches)
            meter.waited(time.perf_counter() - waiting_since)
            num_bad, is_lost = (0, True) if isinstance(batch, DataError) else (len(batch.bad), False)
            stopping, saving, num_bad, num_lost = world.sum([stop.wanted, stop.save_wanted, num_bad, is_lost])
            if num_lost or isinstance(batch, DataError):
                # all ranks hear of it in the same step: they can save, and end, together
                found = save(done) if done > first_step else found
                raise _without_data(world, batch, found)

            # ---- one step -------------------------------------------------------------------------------------------
            images = batch.images
            tokens = source.visual_tokens(batch)
            samples = batch.epoch.to(device, non_blocking=True), batch.sample.to(device, non_blocking=True)
            rule = config.mask, config.masking, config.grid, config.seed
            masks = draw_masks(*rule, *samples, config.kernels.backend)
            plan = plan_prediction(masks, config.num_patches, config.predict, tokens)
            keep = drop_path_keep(config.seed, step, batch.sample.numpy(), drop_rates)
            keep = torch.from_numpy(keep).to(device)  # [L, 2, B]
            count = world.add((plan.labels != UNUSED).sum())
            lr = learning_rate(step, num_steps, num_warmup, optim)
            set_learning_rate(optimizer, lr)
            for rows in _micro_batches(len(images), optim.accumulate):
                inputs = images[rows], plan.masked[rows], plan.predict_idx[rows], plan.labels[rows], keep[..., rows]
                meter.add(*engine.accumulate(inputs, count.clamp_min(1), is_last=rows.stop == len(images)))
            meter.end_step(count, grad_norm=engine.step())
            # ---------------------------------------------------------------------------------------------------------

            done = step + 1
            log.advance()
            if profiler:
                profiler.step()
            if num_bad:
                bad_images = world.gather(batch.bad)
                if world.rank == 0:
                    lost = _too_many(bad_samples, bad_images)

            # once in a while: say how it goes
            if done % config.log.every == 0 or done in (first_step + 1, num_steps) or stopping:
                figures = meter.read()
                place = {"step": done, "epoch": step / epoch_steps, "lr": lr}
                log.write({**place, **figures, "bad_samples": len(bad_samples)})
                log.show(done, figures)
                _stop_if_lost(figures, done, lr, found)

            # once in a while: look at held-out images
            if val_index and (done == num_steps or (config.log.val_every and done % config.log.val_every == 0)):
                held_out = evaluate(config, model, source.tokenizer(), val_index, world, num_val_crops)
                log.write({"step": done, "event": "validation", "loss": held_out.loss, "accuracy": held_out.accuracy})
                log.say(f"step {done}  held-out loss {held_out.loss:.4f}  masked accuracy {held_out.accuracy:.4f}")

            # once in a while: save
            if stopping or saving or done == num_steps or (config.log.save_every and done % config.log.save_every == 0):
                stop.save_wanted = False
                found = save(done)
            if stopping and done < num_steps:
                log.say(f"stopped at step {done} of {num_steps}, saved; to go on: {shlex.join(command)}")
                break
            waiting_since = time.perf_counter()

    world.leave()
    if world.rank == 0:
        print(f"checkpoint: {found}")
    return DONE if done == num_steps else PREEMPTED


def _check_paths(config: Config) -> None:
    """What a run cannot do without is said before anything is started."""
    for key, value in {"out": config.out, "data.index": config.data.index}.items():
        if not value:
            raise ConfigError(f"{key} is not set; add {key}=PATH")
    paths = {"data.index": config.data.index, "data.val_index": config.data.val_index}
    if config.objective == "tokens":
        paths["tokenizer.path"] = config.tokenizer.path
    for key, value in paths.items():
        if value and not Path(value).exists():
            hint = "fastbeit tokenizer train --data INDEX -o" if "tokenizer" in key else "fastbeit index SOURCE -o"
            raise RunError(f"{key}: '{value}' does not exist; make it with `{hint} {value}`", DATA_MISSING)


def _check_batch(config: Config, world: World) -> None:
    parts = world.size * config.optim.accumulate
    if config.optim.batch_size % parts:
        fit = max(1, round(config.optim.batch_size / parts)) * parts
        raise ConfigError(
            f"optim.batch_size {config.optim.batch_size} does not divide into {world.size} ranks x "
            f"{config.optim.accumulate} micro-batches; try {fit}"
        )


def _check_kernels(config: Config, world: World) -> None:
    try:
        check_backend(config.kernels.backend, world.device)
    except (ValueError, ModuleNotFoundError) as err:
        raise ConfigError(f"kernels.backend={config.kernels.backend}: {err}") from None


def _resumed_step(checkpoint: Path, origin: dict[str, Any]) -> int:
    state = load_state(checkpoint)
    for name, fingerprint in origin.items():
        if state[name] != fingerprint:
            raise RunError(
                f"'{checkpoint}' was made with another {name} (fingerprint {state[name]}, now {fingerprint}); "
                f"go back to that {name}, or choose another out",
                CHECKPOINT_UNUSABLE,
            )
    return state["step"]


def _next(batches: Iterator[Batch]) -> Batch | DataError:
    try:
        return next(batches)
    except DataError as err:
        return err


def _too_many(bad_samples: BadSamples, bad: list[tuple[int, str]]) -> DataError | None:
    try:
        bad_samples.add(bad)
    except DataError as err:
        return err


def _without_data(world: World, batch: Batch | DataError, found: Path | None) -> DataError:
    """What all ranks end with when one of them has no data."""
    errors = world.gather([(str(batch), batch.exit_code)] if isinstance(batch, DataError) else [])
    message, exit_code = errors[0]
    return DataError(f"{message}; last checkpoint: {found or 'none'}", exit_code)


def _micro_batches(num_images: int, accumulate: int) -> list[slice]:
    size = num_images // accumulate
    return [slice(start, start + size) for start in range(0, num_images, size)]


@contextlib.contextmanager
def _profiler(config: Config, out: Path, world: World):
    """Traces steps 3 to 5 of this start, when asked to; gives the profiler to step, or None."""
    if not config.profile or world.rank:
        yield None
        return
    with torch.profiler.profile(
        # there is but one cycle; otherwise PyTorch 2.11 warns, and crashes where a warning is an error
        acc_events=True,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(out / "profile.json")),
    ) as profiler:
        yield profiler


def _greet(
    log: RunLog,
    config: Config,
    world: World,
    model: Beit,
    source: TokenSource,
    num_images: int,
    problems: list[str],
) -> None:
    for problem in problems:
        log.say(f"checkpoint passed over: {problem}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kernels = "triton" if uses_triton(config.kernels.backend, world.device) else "reference"
    log.say(
        f"{num_images:,} images, {parameters:,} parameters, {world.size} rank(s) on {world.device.type}, "
        f"{kernels} kernels, "
        f"steps {log.first_step} to {log.num_steps}, out {config.out}"
    )
    log.say(f"visual tokens: {source}")
    if source.agreement is not None:
        log.write({"step": log.first_step, "event": "tokenizer", "agreement_with_fp32": source.agreement})
    if source.fingerprint and is_box(source.fingerprint):
        log.say(BOX_NOTE)
    if config.data.views:
        log.say(
            f"data.views={config.data.views}: only so many crops an image; the official recipe draws new ones (views=0)"
        )


def _stop_if_lost(figures: dict[str, float], step: int, lr: float, found: Path | None) -> None:
    if figures["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"loss or gradient was not finite in the last {figures['skipped_in_a_row']} steps up to step {step} "
            f"(learning rate {lr:.2e}); no update was made from them. Lower optim.lr or optim.clip_grad, or warm up "
            f"longer, in another out; last checkpoint: {found or 'none'}"
        )


def _versions() -> dict[str, str]:
    return {"fastbeit": fastbeit.__version__, "torch": torch.__version__, "python": platform.python_version()}
