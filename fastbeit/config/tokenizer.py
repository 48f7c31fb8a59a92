"""Size, schedule and data of one training of a dVAE (arXiv 2102.12092, A.2)."""

import math
from typing import Literal

from pydantic import Field, model_validator

from fastbeit.config.sections import Count, DataConfig, OptimConfig, Positive, Section, Size

PATCHES_A_WORD = 100  # enough to place it, and to see whether it is in use


class Architecture(Section):
    """Size of an encoder and its decoder; the defaults are those of OpenAI's release (A.2)."""

    n_hid: int = Field(
        default=256, ge=4, multiple_of=4, description="channels at full resolution; each group doubles them"
    )
    n_init: Count = Field(default=128, description="channels of a word's embedding in the decoder")
    vocab_size: Count = Field(default=8192, description="visual words")
    group_count: Count = Field(default=4, description="resolutions, each half of the one before")
    n_blk_per_group: Count = Field(default=2, description="residual blocks a resolution")

    @property
    def stride(self) -> int:
        """Pixels a token, down and across."""
        return 2 ** (self.group_count - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each group, from the finest resolution to the coarsest."""
        return [self.n_hid * 2**group for group in range(self.group_count)]

    @property
    def post_gain(self) -> float:
        """Scale of each residual branch, in place of normalisation layers (A.2)."""
        return 1 / (self.group_count * self.n_blk_per_group) ** 2


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
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="of the averaged weights that are kept in the end; 0: the last ones"
    )
    temperature: tuple[Positive, Positive] = Field(
        default=(1.0, 1 / 16), description="of the relaxation: start and end"
    )
    kl_weight: float = Field(default=6.6, ge=0, description="of the KL term, reached after a third of the steps")
    usage_weight: float = Field(
        default=50.0, ge=0, description="of the entropy of the words in use; 0: as in the paper"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of activations; weights and loss stay fp32; auto: bf16 on cuda, fp32 on the cpu"
    )
    log_every: Count = Field(default=20, description="steps between log lines")
    save_every: Count = Field(default=500, description="steps between checkpoints, each with a look at held-out images")

    @property
    def architecture(self) -> Architecture:
        return Architecture.model_validate(self.model_dump(include=set(Architecture.model_fields)))

    def temperature_at(self, step: int) -> float:
        """From the first to the last, along half a cosine in the logarithm (A.2)."""
        begin, end = self.temperature
        return end * (begin / end) ** (0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def kl_weight_at(self, step: int) -> float:
        """Rises for a third of the steps."""
        return self.kl_weight * min(1.0, 3 * step / self.steps)

    @property
    def look_steps(self) -> int:
        """Steps whose images the start is computed from, and as many of held-out images that it is judged by."""
        tokens = math.prod(self.image_size) // self.architecture.stride**2
        return math.ceil(PATCHES_A_WORD * self.vocab_size / (tokens * self.batch_size))

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
