"""Train a dVAE of one's own, top to bottom: crops -> words, drawn -> pixels -> loss -> AdamW -> averaged weights."""

import contextlib
import copy
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import Batch, make_loader
from fastbeit.engine.adamw import clip_and_step, read_moments, write_moments
from fastbeit.errors import CHECKPOINT_UNUSABLE, DONE, PREEMPTED, DataError, RunError
from fastbeit.tokenizer.disk import save_tokenizer
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.quality import Quality, WordUsage, measure_quality
from fastbeit.tokenizer.training.kmeans_start import solve_both_ends
from fastbeit.tokenizer.training.objective import DvaeTrainer
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.checkpoint import find_checkpoint, load_model, load_optimizer, load_state, save_checkpoint
from fastbeit.train.ema import follow
from fastbeit.train.log import RunLog
from fastbeit.train.optim import MAX_SKIPPED_IN_A_ROW, learning_rate, make_optimizer, set_learning_rate
from fastbeit.train.rundir import claim
from fastbeit.train.stop import Stop

NUM_SHOWN = 8  # images on TensorBoard, above their reconstructions


def train_tokenizer(
    config: TokenizerTrainConfig, index_path: Path, val_index_path: Path | None, out: Path, command: list[str]
) -> int:
    """Train until `config.steps`, or go on with a training that was interrupted, and write the tokenizer to `out`.

    Args:
        index_path: index of the images, made by `build_index`.
        val_index_path: index of held-out images that the tokenizer is judged by; None: not judged.
        command: what the user typed; said again when the training stops early, and kept on the tokenizer's card.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad data, or `out` holds something else; the message says what to do.
    """
    with claim(out, config), Stop() as stop:
        val_index = open_index(val_index_path) if val_index_path else None
        return _train(config, open_index(index_path), val_index, out, stop, command)


def _train(
    config: TokenizerTrainConfig, index: Index, val_index: Index | None, out: Path, stop: Stop, command: list[str]
) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # resume order:
    # 1. the newest checkpoint that verifies, made from the same images
    # 2. weights and their average, or a start computed from the first batches
    # 3. moments
    # 4. the step: order, crops, drawn words, temperature and learning rate are functions of it
    found, problems = find_checkpoint(out / "checkpoints")
    first_step, seconds_before = _resumed(found, index) if found else (0, 0.0)
    torch.manual_seed(config.seed)
    trainer = DvaeTrainer(config).to(device)
    trainer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch does not declare it
    optimizer = make_optimizer(trainer, config.optim)
    if found:
        weights = load_model(found)
        average = copy.deepcopy(trainer)
        average.load_state_dict({name.removeprefix("average."): weights.pop(name) for name in _averaged(weights)})
        trainer.load_state_dict(weights)
        write_moments(trainer, optimizer, load_optimizer(found))
    else:
        images = [batch.images.to(device) for batch in _batches(config, index, config.seed, 0, config.look_steps)]
        solve_both_ends(trainer.encoder, trainer.decoder, images, torch.Generator(device).manual_seed(config.seed))
        average = copy.deepcopy(trainer)
    average.requires_grad_(False)

    bad_samples = BadSamples(out / "bad_samples.jsonl", len(index))
    meter = Meter(config, device)
    held_out: dict[str, float] = {}
    began = time.monotonic() - seconds_before
    done = first_step

    def save() -> None:
        weights = trainer.state_dict() | {f"average.{k}": v for k, v in average.state_dict().items()}
        state = {"index": index.fingerprint, "seconds": time.monotonic() - began, "held_out": held_out}
        save_checkpoint(out / "checkpoints", done, weights, read_moments(trainer, optimizer), state, 1)

    loader = _batches(config, index, config.seed, first_step, config.steps)
    with (
        contextlib.closing(loader) as batches,
        RunLog(out, first_step, config.steps) as log,
        _saved_without_data(lambda: done > first_step and save()),
    ):
        for problem in problems:
            log.say(f"checkpoint passed over: {problem}")
        for step, batch in enumerate(batches, first_step):
            lr = learning_rate(step, config.steps, config.optim.warmup_steps, config.optim)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            images = batch.images.to(device, non_blocking=True)
            loss, error, words = trainer(images, step, step_generator(config.seed, step, device))
            loss.backward()
            grad_norm = clip_and_step(optimizer, config.optim.clip_grad)
            follow(average, trainer, step, config.ema_decay)
            meter.add(loss, error, words, grad_norm)

            done = step + 1
            bad_samples.add(batch.bad)
            log.advance()
            stopping = stop.wanted and done < config.steps
            # once in a while: say how it goes
            if done % config.log_every == 0 or done in (first_step + 1, config.steps) or stopping:
                figures, warning = meter.read()
                log.write({"step": done, "lr": lr, **figures})
                _show(log, done, figures)
                if warning:
                    log.say(warning)
                if figures["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
                    raise RunError(
                        f"the gradient was not finite in the last {figures['skipped_in_a_row']} steps up to step "
                        f"{done}; no update was made from them. Lower lr, in another directory"
                    )
            # once in a while: look at images, held-out ones if there are any, and save
            if (done % config.save_every == 0 or done == config.steps) and not stopping:
                held_out = _look(log, done, average, config, index, val_index)
            if done % config.save_every == 0 or done == config.steps or stopping:
                save()
            if stopping:
                log.say(f"stopped at step {done} of {config.steps}, saved; to go on: {shlex.join(command)}")
                return PREEMPTED

    state = load_state(out / "checkpoints" / f"step-{config.steps:06d}")
    origin = {
        "command": shlex.join(command),
        "index": index.fingerprint,
        "num_images": len(index),
        "steps": config.steps,
        "hours": round(state["seconds"] / 3600, 2),
        "held_out": state["held_out"],
    }
    save_tokenizer(out, average.encoder, average.decoder, origin)
    print(f"tokenizer: {out}{' (was finished before)' if first_step == config.steps else ''}")
    return DONE


@contextlib.contextmanager
def _saved_without_data(save: Callable[[], object]) -> Iterator[None]:
    """A disk that vanishes, or too many bad images, cost no step that was taken."""
    try:
        yield
    except DataError:
        save()
        raise


class Meter:
    """Sums since the last `read`, kept on the device until then."""

    def __init__(self, config: TokenizerTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, error, steps
        self.histogram = torch.zeros(self.config.vocab_size, dtype=torch.int64, device=self.device)
        self.began = time.perf_counter()

    def add(self, loss: Tensor, error: Tensor, words: Tensor, grad_norm: Tensor) -> None:
        self.grad_norm = grad_norm
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~torch.isfinite(grad_norm)
        self.sums += torch.stack([loss.detach().double(), error.double(), torch.ones_like(error).double()])
        self.histogram += torch.bincount(words.flatten(), minlength=len(self.histogram))

    def read(self) -> tuple[dict[str, float], str | None]:
        """The figures since the last call, and a warning where the codebook collapses."""
        loss, error, num_steps = self.sums.tolist()
        usage = WordUsage(self.histogram.cpu())
        seconds = time.perf_counter() - self.began
        figures = {
            "loss": loss / num_steps,
            "mean_abs_error": error / num_steps,
            "words_in_use": usage.num_in_use,
            "word_perplexity": usage.perplexity,
            "grad_norm": self.grad_norm.item(),
            "skipped_in_a_row": int(self.skipped_in_a_row),
            "images_per_s": num_steps * self.config.batch_size / seconds,
        }
        self._clear()
        return figures, usage.warning()


def _look(
    log: RunLog, step: int, average: DvaeTrainer, config: TokenizerTrainConfig, index: Index, val_index: Index | None
) -> dict[str, float]:
    """Show reconstructions by the averaged weights, and measure them where there are held-out images."""
    tokenizer = DiscreteVAE(average.encoder, lambda: average.decoder, fingerprint="")
    data = config.data.model_copy(update={"jitter": 0.0})
    seed = (config.seed + 1) % 2**63  # other crops than those of training
    batches = list(_batches(config, val_index or index, seed, 0, config.look_steps if val_index else 1, data))
    shown = batches[0].images[:NUM_SHOWN]
    decoded = tokenizer.decode(tokenizer.encode(shown), tokenizer.grid(config.image_size)).cpu()
    log.picture("reconstructions", torch.cat([_side_by_side(shown), _side_by_side(decoded)]), step)
    if val_index is None:
        return {}
    figures = measure_quality(tokenizer, (batch.images for batch in batches)).figures()
    log.write({"step": step, "event": "held_out", **figures})
    log.say(f"step {step}  held out: {Quality.line(figures)}")
    return figures


def _side_by_side(images: Tensor) -> Tensor:
    """[n, h, w, 3] to [h, n w, 3]."""
    return torch.cat(images.unbind(), dim=1)


def _show(log: RunLog, step: int, figures: dict[str, float]) -> None:
    text = (
        f"loss {figures['loss']:.4f}  MAE {figures['mean_abs_error']:.4f}  words {figures['words_in_use']}  "
        f"{figures['images_per_s']:.1f} img/s"
    )
    log.bar.set_postfix_str(text)
    if log.bar.disable:
        log.say(f"step {step}/{log.num_steps}  {text}")


def _batches(
    config: TokenizerTrainConfig, index: Index, seed: int, first_step: int, num_steps: int, data: Any = None
) -> Generator[Batch, None, None]:
    return make_loader(
        data or config.data,
        index,
        token_size=None,
        batch_size=config.batch_size,
        seed=seed,
        rank=0,
        world_size=1,
        first_step=first_step,
        num_steps=num_steps,
    )


def _averaged(weights: dict[str, Tensor]) -> list[str]:
    return [name for name in weights if name.startswith("average.")]


def _resumed(checkpoint: Path, index: Index) -> tuple[int, float]:
    """Step and seconds that a checkpoint stands for."""
    state = load_state(checkpoint)
    if state["index"] != index.fingerprint:
        raise RunError(
            f"'{checkpoint}' was made with another index (fingerprint {state['index']}, now {index.fingerprint}); "
            "go back to that one, or choose another directory",
            CHECKPOINT_UNUSABLE,
        )
    return state["step"], state["seconds"]


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The randomness of one step, the same after a resume."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
