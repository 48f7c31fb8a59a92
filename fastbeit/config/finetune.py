"""One fine-tuning: the sections it is made of, and whether they fit together.

Defaults are those of BEiT-B on ImageNet-1k at 224 x 224 (arXiv 2106.08254, Table 13, and the authors' code)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fastbeit.config.pretrain import Config
from fastbeit.config.running import EngineConfig, KernelsConfig, LogConfig, optimizers_that_do_not_fit
from fastbeit.config.sections import (
    Count,
    DataConfig,
    Fraction,
    ModelConfig,
    OptimConfig,
    PathText,
    Section,
    Whole,
    grid_of,
    refuse,
    sizes_that_do_not_fit,
)


class AugmentConfig(Section):
    """What fine-tuning does to a view beyond the crop and flip of `DataConfig` (the authors' recipe)."""

    num_ops: int = Field(default=2, ge=0, description="RandAugment operations a view; 0: colour jitter as data.jitter")
    magnitude: float = Field(default=9.0, ge=0, le=10, description="mean magnitude of an operation, of at most 10")
    magnitude_std: float = Field(default=0.5, ge=0, description="standard deviation of the magnitude")
    erase: Fraction = Field(default=0.25, description="probability that a box of a view is filled with noise")
    repeats: Count = Field(
        default=1,
        description="copies of an image in a batch, each augmented anew (Repeated Augmentation, 1901.09335); an epoch "
        "stays as long and shows so many times fewer images. The paper: 3 for B, 1 for L",
    )
    mixup: float = Field(default=0.8, ge=0, description="Mixup's alpha; 0: no Mixup")
    cutmix: float = Field(default=1.0, ge=0, description="CutMix's alpha; 0: no CutMix")
    mix_prob: Fraction = Field(default=1.0, description="probability that the images of a step are mixed")
    cutmix_share: Fraction = Field(default=0.5, description="how often it is CutMix, where both are on")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="label smoothing: share of the target that all classes have in common"
    )


class ClassifierConfig(ModelConfig):
    """The ViT that is fine-tuned; where it starts from pre-trained weights, their sizes."""

    relative_position: Literal["shared", "per_block", "none"] = Field(
        default="per_block", description="as in pre-training; a shared table of pre-training is copied to each block"
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="an image's feature: the mean over its patches, or the cls token"
    )


class FinetuneOptimConfig(OptimConfig):
    """A rate of its own for each block (Table 13)."""

    batch_size: Count = Field(default=1024, description="images a step, over all ranks and micro-batches")
    epochs: Whole = Field(default=100, description="passes over the images; ignored when steps > 0")
    lr: float = Field(default=4e-3, ge=0, description="peak learning rate, of the head")
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate at the end")
    warmup_epochs: Whole = Field(
        default=20, description="epochs of linear warmup from 0; ignored when warmup_steps > 0"
    )
    clip_grad: float = Field(default=0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.65, description="each block learns so many times as fast as the one above it"
    )


class FinetuneLogConfig(LogConfig):
    """The same, and how often held-out images are classified."""

    val_every: Whole = Field(
        default=0, description="steps between validations, each of a checkpoint; 0: after each epoch"
    )


class FinetuneConfig(Section):
    """One fine-tuning; without `init` it trains from scratch."""

    folder: ClassVar[str] = "finetune"

    objective: ClassVar[Literal["classes"]] = "classes"
    mask: ClassVar[Literal["none"]] = "none"

    out: PathText = Field(
        default="", description="run directory: config, log, checkpoints; the same again continues the run"
    )
    init: PathText = Field(
        default="",
        description="pre-trained weights: a run, a checkpoint, or a file of another program; empty: from scratch",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run comes from it")
    profile: bool = Field(default=False, description="write a torch.profiler trace of a few steps to out/profile.json")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ClassifierConfig = ClassifierConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    engine: EngineConfig = EngineConfig()
    kernels: KernelsConfig = KernelsConfig()
    log: FinetuneLogConfig = FinetuneLogConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return grid_of(self.data, self.model)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_slots(self) -> int:
        """Tokens of an image that the last block goes on with after its attention: all."""
        return self.num_patches + 1

    @property
    def num_predictions(self) -> int:
        """Rows that an image has in the head."""
        return 1

    @model_validator(mode="after")
    def _parts_fit(self) -> "FinetuneConfig":
        wrong = [
            *sizes_that_do_not_fit(self.data, self.model),
            *optimizers_that_do_not_fit(self.optim, self.engine),
        ]
        if self.augment.repeats > self.optim.batch_size:
            wrong.append(
                f"augment.repeats {self.augment.repeats} is more than the {self.optim.batch_size} images of a batch"
            )
        if self.data.num_crops:
            wrong.append(f"data.num_crops={self.data.num_crops}: fine-tuning draws ever new crops; leave it at 0")
        if self.data.tokens:
            wrong.append(f"data.tokens '{self.data.tokens}' holds visual tokens, and fine-tuning wants none")
        refuse(wrong)
        return self


VitConfig = Config | FinetuneConfig  # of a training of the encoder
