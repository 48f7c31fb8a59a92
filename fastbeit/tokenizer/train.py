"""Train a dVAE of one's own: evidence lower bound with Gumbel-softmax words (arXiv 2102.12092, section 2.1, A.2, A.3).

    loss = -log p(pixels | words) + kl_weight / 192 * KL(q(word | image) || uniform) - usage_weight / 192 * H(E q)

A mean per channel of a pixel; 192 is how many of those an 8 x 8 token stands for. Two things differ from the paper,
which trained on 250 M images: words are drawn straight-through, so that the decoder never sees a blend of words, and
the entropy H of the words that a batch uses is rewarded: a small run would otherwise leave most of them unused.
"""

import contextlib
import math
import shlex
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastbeit.checkpoint import find_checkpoint, load_model, load_optimizer, load_state, save_checkpoint
from fastbeit.config import Count, DataConfig, OptimConfig, Positive, Section, Size
from fastbeit.data.index import Index, open_index
from fastbeit.data.pipeline import BadSamples, Batch, make_loader
from fastbeit.errors import CHECKPOINT_UNUSABLE, DONE, PREEMPTED, RunError
from fastbeit.optim import clip_and_step, learning_rate, make_optimizer, read_moments, set_learning_rate, write_moments
from fastbeit.rundir import RunLog, Stop, claim
from fastbeit.tokenizer.dvae import Architecture, Decoder, Encoder, one_hot, to_images, to_mapped
from fastbeit.tokenizer.start import solve_both_ends
from fastbeit.tokenizer.usage import WordUsage
from fastbeit.tokenizer.weights import save_tokenizer

START_PATCHES = 100  # patches a word that the start is computed from


class TokenizerTrainConfig(Section):
    """One training of a dVAE; small enough for one GPU, where the paper's has n_hid 256 and 3 M steps of 512."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run comes from it")
    image_size: Size = Field(default=(112, 112), description="height and width of a crop, multiples of 8 pixels")
    crop_scale: tuple[Positive, Positive] = Field(
        default=(0.08, 1.0), description="share of the image that a crop takes"
    )
    jitter: float = Field(default=0.4, ge=0, le=1, description="as in pre-training: what the words have to describe")
    num_workers: int = Field(default=4, ge=0, description="decoding processes; 0: decode in the training process")
    n_hid: int = Field(default=64, ge=4, multiple_of=4, description="channels at full resolution")
    n_init: Count = Field(default=128, description="channels of a word's embedding")
    n_blk_per_group: Count = Field(default=2, description="residual blocks a resolution")
    vocab_size: int = Field(default=1024, ge=2, description="visual words")
    batch_size: Count = Field(default=64, description="images a step")
    steps: Count = Field(default=20_000, description="optimizer steps")
    lr: Positive = Field(default=1e-3, description="peak learning rate, after 5 % of the steps; ends at 1/80 of it")
    temperature: tuple[Positive, Positive] = Field(
        default=(1.0, 1 / 16), description="of the relaxation: start and end"
    )
    kl_weight: float = Field(default=6.6, ge=0, description="of the KL term, reached after a third of the steps")
    usage_weight: float = Field(
        default=50.0, ge=0, description="of the entropy of the words in use; 0: as in the paper"
    )
    log_every: Count = Field(default=20, description="steps between log lines")
    save_every: Count = Field(default=500, description="steps between checkpoints")

    @property
    def architecture(self) -> Architecture:
        return Architecture.model_validate(self.model_dump(include=set(Architecture.model_fields)))

    @property
    def start_steps(self) -> int:
        """Steps whose images the start is computed from."""
        tokens = math.prod(self.image_size) // self.architecture.stride**2
        return math.ceil(START_PATCHES * self.vocab_size / (tokens * self.batch_size))

    @property
    def data(self) -> DataConfig:
        fields = self.model_dump(include={"image_size", "crop_scale", "jitter", "num_workers"})
        return DataConfig(**fields, tail="wrap")

    @property
    def optim(self) -> OptimConfig:
        """AdamW as in A.2."""
        warmup = max(2, self.steps // 20)
        return OptimConfig(steps=self.steps, lr=self.lr, min_lr=self.lr / 80, warmup_steps=warmup, weight_decay=1e-4)

    @model_validator(mode="after")
    def _tokens_fit(self) -> "TokenizerTrainConfig":
        stride = self.architecture.stride
        for side in self.image_size:
            if side % stride:
                near = max(1, round(side / stride)) * stride
                raise ValueError(f"image_size wants multiples of {stride}; got {side}; try {near}")
        if self.crop_scale[0] > self.crop_scale[1] or self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale wants a range within (0, 1]; got {list(self.crop_scale)}")
        if self.temperature[0] < self.temperature[1]:
            raise ValueError(f"temperature wants start >= end; got {list(self.temperature)}")
        return self


def logit_laplace(stats: Tensor, pixels: Tensor) -> Tensor:
    """-log p(pixels): A.3, the mean over mapped pixels [B, 3, h, w]; stats [B, 6, h, w] are a decoder's output."""
    location, log_scale = stats.chunk(2, dim=1)
    error = (torch.logit(pixels) - location).abs()
    return (error * (-log_scale).exp() + log_scale + math.log(2) + (pixels * (1 - pixels)).log()).mean()


def draw_words(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One-hot words [B, V, h, w] drawn from softmax(logits); the gradient is that of the Gumbel-softmax relaxation."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = ((logits + noise) / temperature).softmax(1)
    return one_hot(soft.argmax(1), logits.shape[1]) + (soft - soft.detach())


class DvaeTrainer(nn.Module):
    """Encoder and decoder with the loss between them."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config.architecture), Decoder(config.architecture)

    def forward(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: uint8 [B, h, w, 3].

        Returns:
            loss, mean absolute error of the pixels in [0, 1] (of drawn words), words [B, h, w] (the likeliest).
        """
        config, progress = self.config, step / self.config.steps
        begin, end = config.temperature
        temperature = end * (begin / end) ** (0.5 * (1 + math.cos(math.pi * progress)))
        pixels = to_mapped(images)
        log_q = self.encoder(pixels).log_softmax(1)
        stats = self.decoder(draw_words(log_q, temperature, _noise(config.seed, step, pixels.device)))
        divergence = (log_q.exp() * log_q).sum(1).mean() + math.log(config.vocab_size)
        usage = torch.special.entr(log_q.exp().mean((0, 2, 3))).sum()
        weighted = config.kl_weight * min(1.0, 3 * progress) * divergence - config.usage_weight * usage
        loss = logit_laplace(stats, pixels) + weighted / (3 * config.architecture.stride**2)
        error = (to_images(stats.detach()).float() - images.float()).abs().mean() / 255
        return loss, error, log_q.argmax(1)


def train_tokenizer(config: TokenizerTrainConfig, index_path: Path, out: Path, command: list[str]) -> int:
    """Train until `config.steps`, or go on with a training that was interrupted, and write the tokenizer to `out`.

    Args:
        index_path: index of the images, made by `build_index`.
        command: what the user typed; said again when the training stops early, and kept on the tokenizer's card.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad data, or `out` holds something else; the message says what to do.
    """
    with claim(out, config), Stop() as stop:
        return _train(config, open_index(index_path), out, stop, command)


def _train(config: TokenizerTrainConfig, index: Index, out: Path, stop: Stop, command: list[str]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # resume order:
    # 1. the newest checkpoint that verifies, made from the same images
    # 2. weights, or a start computed from the first batches
    # 3. moments
    # 4. the step: order, crops, noise, temperature and learning rate are functions of it
    found, problems = find_checkpoint(out / "checkpoints")
    first_step = _resumed_step(found, index) if found else 0
    torch.manual_seed(config.seed)
    trainer = DvaeTrainer(config).to(device)
    optimizer = make_optimizer(trainer, config.optim)
    if found:
        trainer.load_state_dict(load_model(found))
        write_moments(trainer, optimizer, load_optimizer(found))
    else:
        images = [batch.images.to(device) for batch in _batches(config, index, 0, config.start_steps)]
        solve_both_ends(trainer.encoder, trainer.decoder, images, torch.Generator(device).manual_seed(config.seed))

    bad_samples = BadSamples(out / "bad_samples.jsonl", len(index))
    meter = Meter(config, device)
    loader = _batches(config, index, first_step, config.steps)
    with contextlib.closing(loader) as batches, RunLog(out, first_step, config.steps) as log:
        for problem in problems:
            log.say(f"checkpoint passed over: {problem}")
        for step, batch in enumerate(batches, first_step):
            lr = learning_rate(step, config.steps, config.optim.warmup_steps, config.optim)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            loss, error, words = trainer(batch.images.to(device, non_blocking=True), step)
            loss.backward()
            clip_and_step(optimizer, config.optim.clip_grad)
            meter.add(loss, error, words)
            bad_samples.add(batch.bad)

            done = step + 1
            log.advance()
            stopping = stop.wanted and done < config.steps
            # once in a while: say how it goes
            if done % config.log_every == 0 or done in (first_step + 1, config.steps) or stopping:
                figures, warning = meter.read()
                log.write({"step": done, "lr": lr, **figures})
                _show(log, done, figures)
                if warning:
                    log.say(warning)
            # once in a while: save
            if done % config.save_every == 0 or done == config.steps or stopping:
                state = {"index": index.fingerprint}
                save_checkpoint(
                    out / "checkpoints", done, trainer.state_dict(), read_moments(trainer, optimizer), state, 1
                )
            if stopping:
                log.say(f"stopped at step {done} of {config.steps}, saved; to go on: {shlex.join(command)}")
                return PREEMPTED

    origin = {
        "command": shlex.join(command),
        "index": index.fingerprint,
        "num_images": len(index),
        "steps": config.steps,
    }
    save_tokenizer(out, trainer.encoder, trainer.decoder, origin)
    print(f"tokenizer: {out}{' (was finished before)' if first_step == config.steps else ''}")
    return DONE


class Meter:
    """Sums since the last `read`, kept on the device until then."""

    def __init__(self, config: TokenizerTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, error, steps
        self.histogram = torch.zeros(self.config.vocab_size, dtype=torch.int64, device=self.device)
        self.began = time.perf_counter()

    def add(self, loss: Tensor, error: Tensor, words: Tensor) -> None:
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
            "images_per_s": num_steps * self.config.batch_size / seconds,
        }
        self._clear()
        return figures, usage.warning()


def _show(log: RunLog, step: int, figures: dict[str, float]) -> None:
    text = (
        f"loss {figures['loss']:.4f}  MAE {figures['mean_abs_error']:.4f}  words {figures['words_in_use']}  "
        f"{figures['images_per_s']:.1f} img/s"
    )
    log.bar.set_postfix_str(text)
    if log.bar.disable:
        log.say(f"step {step}/{log.num_steps}  {text}")


def _batches(
    config: TokenizerTrainConfig, index: Index, first_step: int, num_steps: int
) -> Generator[Batch, None, None]:
    return make_loader(
        config.data,
        index,
        token_size=None,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=0,
        world_size=1,
        first_step=first_step,
        num_steps=num_steps,
    )


def _resumed_step(checkpoint: Path, index: Index) -> int:
    state = load_state(checkpoint)
    if state["index"] != index.fingerprint:
        raise RunError(
            f"'{checkpoint}' was made with another index (fingerprint {state['index']}, now {index.fingerprint}); "
            "go back to that one, or choose another directory",
            CHECKPOINT_UNUSABLE,
        )
    return state["step"]


def _noise(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The randomness of one step, the same after a resume."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
