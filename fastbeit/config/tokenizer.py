"""Size, schedule and data of one training of a dVAE (arXiv 2102.12092, A.2)."""

import math
from typing import Any, ClassVar

from pydantic import Field, model_validator

from fastbeit.config.running import EngineConfig, LogConfig, optimizers_that_do_not_fit
from fastbeit.config.sections import (
    LEVELS,
    MOST,
    OPTIMIZER,
    Count,
    DataConfig,
    Levels,
    OptimConfig,
    Optimizer,
    Pipeline,
    Positive,
    Section,
    Size,
    Whole,
    refuse,
)

MAX_GROUPS = 16  # a token of 32,768 pixels
PATCHES_A_WORD = 100  # enough to place it, and to see whether it is in use


class Architecture(Section):
    """Size of an encoder and its decoder; the defaults are those of OpenAI's release (A.2)."""

    n_hid: int = Field(
        default=256, ge=4, le=MOST, multiple_of=4, description="channels at full resolution; each group doubles them"
    )
    n_init: Count = Field(default=128, description="channels of a word's embedding in the decoder")
    vocab_size: Count = Field(default=8192, description="visual words")
    group_count: int = Field(default=4, ge=1, le=MAX_GROUPS, description="resolutions, each half of the one before")
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


class TrainedArchitecture(Architecture):
    """Small enough for one GPU, where the paper's has 256 channels."""

    n_hid: int = Field(
        default=64, ge=4, le=MOST, multiple_of=4, description="channels at full resolution; each group doubles them"
    )
    vocab_size: int = Field(default=1024, ge=2, le=MOST, description="visual words")
    group_count: int = Field(default=4, ge=2, le=MAX_GROUPS, description="resolutions, each half of the one before")


class CropsConfig(Section):
    """What the words have to describe: crops as in pre-training."""

    image_size: Size = Field(default=(112, 112), description="height and width of a crop, multiples of 8 pixels")
    crop_scale: tuple[Positive, Positive] = Field(
        default=(0.08, 1.0), description="share of the image that a crop takes"
    )
    jitter: float = Field(default=0.4, ge=0, le=1, description="as in pre-training")
    pipeline: Pipeline = Field(default="auto", description="as in pre-training")
    levels: Levels = LEVELS
    num_workers: Whole = Field(default=4, description="decoding processes a rank; 0: decode in the training process")

    @property
    def as_pretraining(self) -> DataConfig:
        return DataConfig(**self.model_dump(), tail="wrap")


class ObjectiveConfig(Section):
    """The evidence lower bound and its annealing (A.2)."""

    temperature: tuple[Positive, Positive] = Field(
        default=(1.0, 1 / 16), description="of the relaxation: start and end"
    )
    kl_weight: float = Field(
        default=6.6, ge=0, description="of the KL term; rises from 0 during the first third of the steps"
    )
    usage_weight: float = Field(
        default=50.0, ge=0, description="of the entropy of the words in use; 0: as in the paper"
    )
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="of the averaged weights that are kept in the end; 0: the last ones"
    )


class ScheduleConfig(Section):
    """AdamW as in A.2; the paper takes 3 M steps of 512 images."""

    name: Optimizer = OPTIMIZER
    batch_size: Count = Field(default=64, description="images a step, over all ranks")
    steps: Count = Field(default=20_000, description="optimizer steps")
    lr: Positive = Field(default=1e-3, description="peak learning rate, after 5 % of the steps; ends at 1/80 of it")

    @property
    def whole(self) -> OptimConfig:
        """With what is not set, as in A.2."""
        warmup = max(2, self.steps // 20)
        fields = self.model_dump()
        # the entropy of the words in use is that of all images of a step: no micro-batches
        return OptimConfig(**fields, accumulate=1, min_lr=self.lr / 80, warmup_steps=warmup, weight_decay=1e-4)


class TokenizerTrainConfig(Section):
    """One training of a dVAE."""

    renamed: ClassVar[dict[str, str]] = (
        {name: f"data.{name}" for name in ("image_size", "crop_scale", "jitter", "num_workers")}
        | {name: f"model.{name}" for name in ("n_hid", "n_init", "n_blk_per_group", "vocab_size")}
        | {name: f"objective.{name}" for name in ("temperature", "kl_weight", "usage_weight", "ema_decay")}
        | {name: f"optim.{name}" for name in ("batch_size", "steps", "lr")}
        | {"precision": "engine.precision", "log_every": "log.every", "save_every": "log.save_every"}
    )
    earlier: ClassVar[dict[str, Any]] = {"data.pipeline": "torch"}

    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run comes from it")
    profile: bool = Field(default=False, description="write a torch.profiler trace of a few steps to DIR/profile.json")
    data: CropsConfig = CropsConfig()
    model: TrainedArchitecture = TrainedArchitecture()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig(every=20, save_every=500, keep=1)

    def temperature_at(self, step: int) -> float:
        """From the first to the last, along half a cosine in the logarithm (A.2)."""
        begin, end = self.objective.temperature
        return end * (begin / end) ** (0.5 * (1 + math.cos(math.pi * step / self.optim.steps)))

    def kl_weight_at(self, step: int) -> float:
        """Rises for a third of the steps."""
        return self.objective.kl_weight * min(1.0, 3 * step / self.optim.steps)

    @property
    def look_steps(self) -> int:
        """Steps whose images the start is computed from, and as many of held-out images that it is judged by."""
        tokens = math.prod(self.data.image_size) // self.model.stride**2
        return math.ceil(PATCHES_A_WORD * self.model.vocab_size / (tokens * self.optim.batch_size))

    @model_validator(mode="after")
    def _tokens_fit(self) -> "TokenizerTrainConfig":
        stride, data, wrong = self.model.stride, self.data, []
        for side in data.image_size:
            if side % stride:
                near = max(1, round(side / stride)) * stride
                wrong.append(f"data.image_size wants multiples of {stride}; got {side}; try {near}")
        if data.crop_scale[0] > data.crop_scale[1] or data.crop_scale[1] > 1:
            wrong.append(f"data.crop_scale wants a range within (0, 1]; got {list(data.crop_scale)}")
        temperature = self.objective.temperature
        if temperature[0] < temperature[1]:
            wrong.append(f"objective.temperature wants start >= end; got {list(temperature)}")
        wrong += optimizers_that_do_not_fit(self.optim.whole, self.engine)
        if self.optim.name == "muon":
            wrong.append(
                "optim.name=muon is for the matrices of a transformer's blocks, and a tokenizer has none; set "
                "optim.name=adamw"
            )
        if self.engine.compile == "on":
            wrong.append("engine.compile=on is for pre-training; leave it out")
        if self.engine.checkpoint_blocks:
            wrong.append("engine.checkpoint_blocks=true is for pre-training; leave it out")
        refuse(wrong)
        return self
