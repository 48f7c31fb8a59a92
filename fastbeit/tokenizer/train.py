"""Train a dVAE of one's own: evidence lower bound with Gumbel-softmax words (arXiv 2102.12092, section 2.1, A.2, A.3).

    loss = -log p(pixels | words) + kl_weight / 192 * KL(q(word | image) || uniform) - usage_weight / 192 * H(E q)

A mean per channel of a pixel; 192 is how many of those an 8 x 8 token stands for. Two things differ from the paper, which
trained on 250 M images: the words are drawn straight-through, so the decoder never sees a blend of words, and the
entropy H of the words that a batch uses is rewarded, for a small run would otherwise leave most of them unused.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastbeit.checkpoint import find_checkpoint, load_model, load_optimizer, load_state, save_checkpoint
from fastbeit.config import Count, DataConfig, OptimConfig, Positive, Section, Size
from fastbeit.data.index import open_index
from fastbeit.data.pipeline import BadSamples, Batch, make_loader
from fastbeit.errors import CHECKPOINT_UNUSABLE, DONE, PREEMPTED, RunError
from fastbeit.optim import clip_and_step, learning_rate, make_optimizer, set_learning_rate
from fastbeit.rundir import RunLog, Stop, claim
from fastbeit.tokenizer.dvae import Architecture, Decoder, Encoder, Tokenizer, one_hot, to_images, to_mapped
from fastbeit.tokenizer.start import solve_both_ends
from fastbeit.tokenizer.weights import save_tokenizer

MIN_USE = 0.5  # share of the words in use below which a warning is due
START_PATCHES = 100  # patches a word that the start is computed from


class TokenizerTrainConfig(Section):
    """One training of a dVAE; small enough for one GPU, where the paper's has n_hid 256 and 3 M steps of 512."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run comes from it")
    image_size: Size = Field(default=(112, 112), description="height and width of a crop, multiples of 8 pixels")
    crop_scale: tuple[Positive, Positive] = Field(default=(0.08, 1.0), description="share of the image that a crop takes")
    jitter: float = Field(default=0.4, ge=0, le=1, description="as in pre-training: what the words have to describe")
    num_workers: int = Field(default=4, ge=0, description="decoding processes; 0: decode in the training process")
    n_hid: int = Field(default=64, ge=4, multiple_of=4, description="channels at full resolution")
    n_init: Count = Field(default=128, description="channels of a word's embedding")
    n_blk_per_group: Count = Field(default=2, description="residual blocks a resolution")
    vocab_size: int = Field(default=1024, ge=2, description="visual words")
    batch_size: Count = Field(default=64, description="images a step")
    steps: Count = Field(default=20_000, description="optimizer steps")
    lr: Positive = Field(default=1e-3, description="peak learning rate, after 5 % of the steps; ends at 1/80 of it")
    temperature: tuple[Positive, Positive] = Field(default=(1.0, 1 / 16), description="of the relaxation: start and end")
    kl_weight: float = Field(default=6.6, ge=0, description="of the KL term, reached after a third of the steps")
    usage_weight: float = Field(default=50.0, ge=0, description="of the entropy of the words in use; 0: as in the paper")
    log_every: Count = Field(default=20, description="steps between log lines")
    save_every: Count = Field(default=500, description="steps between checkpoints")

    @property
    def architecture(self) -> Architecture:
        return Architecture.model_validate(self.model_dump(include=set(Architecture.model_fields)))

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
        if self.temperature[0] < self.temperature[1]:
            raise ValueError(f"temperature wants start >= end; got {list(self.temperature)}")
        return self


@dataclass(frozen=True)
class WordUsage:
    """Which words images use: a dead word is a class that no patch has."""

    histogram: Tensor  # [V] int64

    @property
    def in_use(self) -> int:
        return int((self.histogram > 0).sum())

    @property
    def perplexity(self) -> float:
        """Words in use if all were used alike: exp of the entropy."""
        return math.exp(torch.special.entr(self.histogram / self.histogram.sum().clamp(min=1)).sum().item())

    def warning(self) -> str | None:
        num_words = len(self.histogram)
        if self.in_use >= MIN_USE * num_words:
            return None
        return (
            f"WARNING: only {self.in_use} of {num_words} words are in use: the codebook is collapsing, and tokens that hardly "
            "differ are easy to predict and teach little. Raise usage_weight, lower lr, or take a smaller vocab_size"
        )


def word_usage(tokenizer: Tokenizer, images: Iterable[Tensor]) -> WordUsage:
    """Words in uint8 batches [B, h, w, 3]."""
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for batch in images:
        histogram += torch.bincount(tokenizer.encode(batch).flatten(), minlength=len(histogram)).cpu()
    return WordUsage(histogram)


def logit_laplace(stats: Tensor, pixels: Tensor) -> Tensor:
    """-log p(pixels): mean over mapped pixels [B, 3, h, w] of the density of A.3; stats [B, 6, h, w] from the decoder."""
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
        # convolutions of few channels run nearly twice as fast on a CPU so
        self.to(memory_format=torch.channels_last)

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
        command: what the user typed; said again when the training stops early, and kept in the tokenizer's card.

    Returns:
        The exit code: done, or stopped and saved.

    Raises:
        RunError: bad data, or `out` holds something else; the message says what to do.
    """
    with claim(out, config), Stop() as stop:
        return _train(config, index_path, out, stop, command)


def _train(config: TokenizerTrainConfig, index_path: Path, out: Path, stop: Stop, command: list[str]) -> int:
    index = open_index(index_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def batches(first_step: int, num_steps: int, num_workers: int) -> Iterable[Batch]:
        return make_loader(
            config.data.model_copy(update={"num_workers": num_workers}),
            index,
            token_size=None,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=0,
            world_size=1,
            first_step=first_step,
            num_steps=num_steps,
        )

    # resume order: 1. the newest checkpoint that verifies  2. weights  3. moments  4. the step: all else follows from it
    found, problems = find_checkpoint(out / "checkpoints")
    first_step = _resumed_step(found, index.fingerprint) if found else 0
    torch.manual_seed(config.seed)
    trainer = DvaeTrainer(config).to(device)
    optimizer = make_optimizer(trainer, config.optim)
    if found:
        trainer.load_state_dict(load_model(found))
        _load_moments(trainer, optimizer, load_optimizer(found))
    else:
        tokens = math.prod(config.image_size) // config.architecture.stride**2
        num_steps = math.ceil(START_PATCHES * config.vocab_size / (tokens * config.batch_size))
        images = [batch.images.to(device) for batch in batches(0, num_steps, num_workers=0)]
        solve_both_ends(trainer.encoder, trainer.decoder, images, torch.Generator(device).manual_seed(config.seed))
