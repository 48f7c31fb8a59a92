"""The sections of a configuration, a pydantic class each; checked whole before the first file opens.

Defaults are those of BEiT-B on ImageNet-1k (arXiv 2106.08254, Table 12, and the authors' code).
"""

import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


def _pair(value: Any) -> Any:
    """Let `224` stand for `[224, 224]`."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _auto_or_count(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One message, where a union has one for each of its parts."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f"wanted auto, or a number of at least 1; got {value!r:.80}") from None


def _one_message(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        found = check(value)
    except ValidationError:
        found = None
    if found is None or (isinstance(found, tuple) and found[0] >= found[1]):
        raise ValueError(f"wanted high_byte, image, or [low, high] within 0 to 65535; got {value!r:.80}")
    return found


def _on_off(value: Any) -> Any:
    """YAML reads on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _path(text: str) -> str:
    """`~` is the home directory, as in a shell."""
    if "\0" in text:
        raise ValueError(f"no path has a NUL in it; got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"wanted a path in UTF-8; got {text!r}") from None
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no user {text.split('/')[0][1:]!r}; a folder of that name is ./{text}")
    return path


MOST = 10**9  # of anything that is counted: what is larger is a slip of the finger
Whole = Annotated[int, Field(ge=0, le=MOST)]
PathText = Annotated[str, AfterValidator(_path)]
OnOff = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[tuple[Count, Count], BeforeValidator(_pair)]
AutoCount = Annotated[Count | Literal["auto"], WrapValidator(_auto_or_count)]
Pipeline = Literal["auto", "torch", "dali", "pillow"]
Level = Annotated[int, Field(ge=0, le=0xFFFF)]
Levels = Annotated[Literal["high_byte", "image"] | tuple[Level, Level], WrapValidator(_one_message)]
LEVELS: Any = Field(
    default="high_byte",
    description="which values of 16-bit images become 0 and 255: high_byte: 0 and 65535; image: the least and the "
    "largest of each image; [low, high]: these",
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}  # keys of earlier versions, dotted: what they are called now
    folder: ClassVar[str] = ""  # in configs/, of those of a job
    earlier: ClassVar[dict[str, Any]] = {}  # new keys, dotted: what was done before, where that is not their default


def refuse(wrong: list[str]) -> None:
    """All at once: a user mends them in one go."""
    if wrong:
        raise ValueError("\n".join(wrong))


class DataConfig(Section):
    """What images there are and how each becomes two views (section 2.5; facts of the authors' transform)."""

    index: PathText = Field(
        default="",
        description="the training images: an index, or what `fastbeit index` takes (a folder, archives, tables, a "
        "list), which is indexed in the run directory when the run begins",
    )
    val_index: PathText = Field(default="", description="held-out images, likewise; empty: no validation")
    image_size: Size = Field(default=(224, 224), description="patch view, height and width in pixels")
    crop_scale: tuple[Positive, Positive] = Field(
        default=(0.08, 1.0), description="share of the image's area that a crop takes"
    )
    crop_ratio: tuple[Positive, Positive] = Field(
        default=(3 / 4, 4 / 3), description="aspect ratio of a crop, width / height"
    )
    flip: Fraction = Field(default=0.5, description="probability of a horizontal flip")
    jitter: Fraction = Field(default=0.4, description="brightness, contrast and saturation are scaled by 1 +- this")
    jitter_on: Literal["full_image", "crop"] = Field(
        default="full_image",
        description="whose mean grey contrast moves pixels towards: that of the whole image, as the authors do, or of "
        "the crop, which is faster for DALI but another recipe: 1.7 of 255 levels on average, and 1 token in 8, differ",
    )
    mean: tuple[float, float, float] = Field(default=(0.5, 0.5, 0.5), description="subtracted from pixels in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.5, 0.5, 0.5), description="pixels in [0, 1] are divided by it"
    )
    num_crops: Whole = Field(
        default=0, description="K > 0: only K different crops an image, that of epoch mod K; 0: ever new ones"
    )
    tail: Literal["drop", "wrap"] = Field(
        default="drop",
        description="images that do not fill a batch at the end of an epoch: drop them, or wrap into the next",
    )
    tokens: PathText = Field(
        default="",
        description="directory of tokens made by `fastbeit tokenize`; wants num_crops > 0. No tokenizer is loaded, but "
        "for the time of a validation: the one that made them, from tokenizer.path. Empty: tokens are made on the fly",
    )
    pipeline: Pipeline = Field(
        default="auto",
        description="who decodes and resizes; auto: what the run, or data.tokens, was begun with; at the very start "
        "torch",
    )
    levels: Levels = LEVELS
    num_workers: Whole = Field(default=4, description="decoding processes a rank; 0: decode in the training process")

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "DataConfig":
        wrong = [
            f"{name} wants its lower bound first; got [{low}, {high}]"
            for name, (low, high) in {"crop_scale": self.crop_scale, "crop_ratio": self.crop_ratio}.items()
            if low > high
        ]
        if self.crop_scale[1] > 1:
            wrong.append(f"crop_scale wants shares of the image in (0, 1]; got {list(self.crop_scale)}")
        refuse(wrong)
        return self


class MaskingConfig(Section):
    """How many patches are masked, and in what blocks (Algorithm 1)."""

    num_masked: Count | None = Field(
        default=75, description="patches masked: at most (blockwise) or exactly (random); null: as ratio says"
    )
    ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the patches that is masked, in place of num_masked; the paper's is 0.4"
    )
    min_block: Count | None = Field(
        default=16, description="smallest block, in patches; null, and with ratio: 16 of 75 of those masked"
    )
    min_aspect: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="aspect ratio of a block is log-uniform in [this, 1 / this]"
    )

    @model_validator(mode="before")
    @classmethod
    def _ratio_or_count(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("ratio") is None:
            return values
        if values.get("num_masked") is not None:
            raise ValueError(
                f"ratio {values['ratio']} and num_masked {values['num_masked']} are both set, and say the same thing; "
                "leave one out (masking.num_masked=null)"
            )
        return {"min_block": None, **values, "num_masked": None}

    @model_validator(mode="after")
    def _one_is_set(self) -> "MaskingConfig":
        if self.num_masked is None and self.ratio is None:
            raise ValueError("neither num_masked nor ratio is set; the paper's is ratio=0.4")
        return self

    def num_masked_of(self, num_patches: int) -> int:
        """Patches masked of so many."""
        return self.num_masked or max(1, round((self.ratio or 0) * num_patches))

    def min_block_of(self, num_patches: int) -> int:
        """Patches of the smallest block."""
        return self.min_block or max(1, round(16 / 75 * self.num_masked_of(num_patches)))


class TokenizerConfig(Section):
    """Where visual tokens come from (section 2.1)."""

    path: PathText = Field(
        default="",
        description="directory with dvae.safetensors and dvae.json, made by `fastbeit tokenizer`; empty: the small "
        "bundled tokenizer",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the encoder; auto: fp16 on cuda, but fp32 if that changes over 1 % of tokens; fp32 on the cpu",
    )


class ModelConfig(Section):
    """The ViT that is pre-trained (section 2.2; Table 12; Appendix A)."""

    width: Count = Field(default=768, description="features of a token")
    depth: Count = Field(default=12, description="blocks")
    num_heads: Count = Field(default=12, description="attention heads")
    mlp_width: Count = Field(default=3072, description="hidden features of the MLP")
    patch_size: Size = Field(default=(16, 16), description="patch, height and width in pixels")
    relative_position: Literal["shared", "per_block", "none"] = Field(
        default="shared", description="relative-position bias: one table for all blocks, one each, or none"
    )
    absolute_position: bool = Field(default=False, description="learned position embedding added to each token")
    layer_scale: float = Field(default=0.1, ge=0, description="initial LayerScale: 0.1 for B, 1e-5 for L; 0: none")
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="drop rate of the last block's branches"
    )

    @property
    def drop_rates(self) -> list[float]:
        """Drop rate of each block, rising linearly from 0."""
        return [self.drop_path * i / max(1, self.depth - 1) for i in range(self.depth)]

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % self.num_heads:
            fit = -(-self.width // self.num_heads) * self.num_heads
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; try {fit}")
        return self


def grid_of(data: DataConfig, model: ModelConfig) -> tuple[int, int]:
    """Patches down and across."""
    (height, width), (patch_height, patch_width) = data.image_size, model.patch_size
    return height // patch_height, width // patch_width


def sizes_that_do_not_fit(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    axes: dict[tuple[int, int], list[str]] = {}
    for size, patch, axis in zip(data.image_size, model.patch_size, ("height", "width"), strict=True):
        axes.setdefault((size, patch), []).append(axis)
    for (size, patch), names in axes.items():
        if size % patch:
            yield (
                f"data.image_size: {' and '.join(names)} {size} is not a multiple of model.patch_size {patch}; "
                f"try {max(patch, size // patch * patch)}"
            )


Optimizer = Literal["adamw", "apex_adam", "apex_lamb", "ds_cpu_adam", "muon"]
OPTIMIZER: Any = Field(
    default="adamw",
    description="adamw: PyTorch's fused one; muon: of the matrices of the blocks, AdamW for the rest; apex_adam, "
    "apex_lamb: NVIDIA apex's; ds_cpu_adam: DeepSpeed's AdamW of weights in the host's memory",
)


class OptimConfig(Section):
    """Optimizer, cosine schedule and clipping (Table 12)."""

    name: Optimizer = OPTIMIZER
    batch_size: Count = Field(default=2048, description="images a step, over all ranks and micro-batches")
    accumulate: AutoCount = Field(
        default="auto",
        description="micro-batches a step, to fit memory; auto: as few as the free memory of the card has room for, "
        "and 1 on the cpu",
    )
    epochs: Whole = Field(default=800, description="passes over the images; ignored when steps > 0")
    steps: Whole = Field(default=0, description="optimizer steps; 0: epochs decide")
    lr: float = Field(default=1.5e-3, ge=0, description="peak learning rate")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate at the end")
    warmup_epochs: Whole = Field(
        default=10, description="epochs of linear warmup from 0; ignored when warmup_steps > 0"
    )
    warmup_steps: Whole = Field(default=0, description="steps of linear warmup from 0; 0: warmup_epochs decides")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="decay rates of Adam's two moments")
    eps: Positive = Field(default=1e-8, description="Adam's epsilon")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled weight decay, constant")
    clip_grad: float = Field(
        default=3.0, ge=0, description="largest norm of the gradient: 3 for B, 1 for L; 0: no clipping"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="of averaged weights, which are evaluated and kept in place of the last; null: none"
    )

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> "OptimConfig":
        wrong = []
        if self.accumulate != "auto" and self.batch_size % self.accumulate:
            wrong.append(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not (self.steps or self.epochs):
            wrong.append("nothing to train: both steps and epochs are 0; set optim.epochs or optim.steps")
        refuse(wrong)
        return self
