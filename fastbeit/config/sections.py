"""What a run is made of: one model a room, read from YAML and `key=value`, checked whole before the first file opens.

Defaults are those of BEiT-B on ImageNet-1k (arXiv 2106.08254, Table 12, and the authors' code).
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastbeit.errors import ConfigError

MAX_GRID = 32  # patches a side that `fastbeit_kernels.block_masks` holds in registers
MAX_YAML_BYTES = 1 << 20  # a config is a page; what is larger is a mistake or an attack on the parser


def _pair(value: Any) -> Any:
    """Let `224` stand for `[224, 224]`."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_pair)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """What images there are and how each becomes two views (section 2.5; facts of the authors' transform)."""

    index: str = Field(default="", description="index of the training images, made by `fastbeit index`")
    val_index: str = Field(default="", description="index of held-out images; empty: no validation")
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
        description="contrast moves pixels towards the mean grey of the whole image, as the authors have it, or of the "
        "crop: faster for DALI, and another recipe; views differ by 1.7 levels of 255 on average, and 1 token in 8",
    )
    mean: tuple[float, float, float] = Field(default=(0.5, 0.5, 0.5), description="subtracted from pixels in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.5, 0.5, 0.5), description="pixels in [0, 1] are divided by it"
    )
    views: int = Field(
        default=0, ge=0, description="K > 0: only K different crops an image, view = epoch mod K; 0: ever new ones"
    )
    tail: Literal["drop", "wrap"] = Field(
        default="drop",
        description="images that do not fill a batch at the end of an epoch: drop them, or wrap into the next",
    )
    tokens: str = Field(
        default="",
        description="directory of tokens made by `fastbeit tokenize`; wants views > 0. No tokenizer is loaded, but for "
        "the time of a validation: the one that made them, from tokenizer.path. Empty: tokens are made on the fly",
    )
    pipeline: Literal["torch", "dali", "pillow"] = Field(default="torch", description="who decodes and resizes")
    num_workers: int = Field(
        default=4, ge=0, description="decoding processes a rank; 0: decode in the training process"
    )

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "DataConfig":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} wants its lower bound first; got [{low}, {high}]")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale wants shares of the image in (0, 1]; got {list(self.crop_scale)}")
        return self


class MaskingConfig(Section):
    """How many patches are masked, and in what blocks (Algorithm 1)."""

    num_masked: Count = Field(default=75, description="patches masked: at most (blockwise) or exactly (random)")
    min_block: Count = Field(default=16, description="smallest block, in patches")
    min_aspect: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="aspect ratio of a block is log-uniform in [this, 1 / this]"
    )


class TokenizerConfig(Section):
    """Where visual tokens come from (section 2.1)."""

    path: str = Field(
        default="",
        description="directory with dvae.safetensors and dvae.json, made by `fastbeit tokenizer`; empty: the small "
        "tokenizer in the box",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the encoder; auto: fp16 on cuda, fp32 where that changes over 1 % of tokens and on the cpu",
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

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % self.num_heads:
            fit = -(-self.width // self.num_heads) * self.num_heads
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; try {fit}")
        return self


class OptimConfig(Section):
    """AdamW, cosine schedule and clipping (Table 12)."""

    batch_size: Count = Field(default=2048, description="images a step, over all ranks and micro-batches")
    accumulate: Count = Field(default=1, description="micro-batches a step, to fit memory")
    epochs: int = Field(default=800, ge=0, description="passes over the images; ignored when steps > 0")
    steps: int = Field(default=0, ge=0, description="optimizer steps; 0: epochs decide")
    lr: float = Field(default=1.5e-3, ge=0, description="peak learning rate")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate at the end")
    warmup_epochs: int = Field(
        default=10, ge=0, description="epochs of linear warmup from 0; ignored when warmup_steps > 0"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warmup from 0; 0: warmup_epochs decides")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="AdamW's decay rates")
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's decoupled weight decay, constant")
    clip_grad: float = Field(
        default=3.0, ge=0, description="largest norm of the gradient: 3 for B, 1 for L; 0: no clipping"
    )

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> "OptimConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not (self.steps or self.epochs):
            raise ValueError("nothing to train: both steps and epochs are 0; set optim.epochs or optim.steps")
        return self


class EngineConfig(Section):
    """Who runs the step, on how many ranks, in what precision (design D9, D10)."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = Field(
        default="auto", description="auto: single on one rank, ddp on several"
    )
    zero_stage: Literal[1] = Field(default=1, description="DeepSpeed ZeRO stage; 2 and 3 are not wired yet")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of activations; weights and loss stay fp32; auto: bf16 on cuda, fp32 on the cpu"
    )
    compile: bool = Field(default=False, description="torch.compile the model")


class KernelsConfig(Section):
    """Who computes the fused operators: masked embedding, loss, masks (design D5)."""

    backend: Literal["auto", "triton", "reference"] = Field(
        default="auto", description="triton: its kernels; reference: plain PyTorch; auto: triton on cuda"
    )


class LogConfig(Section):
    """What a run says and keeps."""

    every: Count = Field(default=10, description="steps between log lines")
    val_every: int = Field(default=0, ge=0, description="steps between validations; 0: only at the end")
    val_views: Count = Field(default=1, description="crops an image that validation looks at")
    save_every: int = Field(default=1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(default=3, description="checkpoints kept, newest first")


class Config(Section):
    """One pre-training run."""

    out: str = Field(
        default="", description="run directory: config, log, checkpoints; the same again continues the run"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run comes from it")
    objective: Literal["tokens", "pixels"] = Field(
        default="tokens", description="predict visual tokens, or regress normalised patch pixels (Table 4)"
    )
    mask: Literal["blockwise", "random", "none"] = Field(
        default="blockwise", description="which patches are hidden (Table 4)"
    )
    predict: Literal["masked", "all"] = Field(default="masked", description="patches that the loss looks at (Table 4)")
    profile: bool = Field(default=False, description="write a torch.profiler trace of a few steps to out/profile.json")
    data: DataConfig = DataConfig()
    masking: MaskingConfig = MaskingConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    kernels: KernelsConfig = KernelsConfig()
    log: LogConfig = LogConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        (height, width), (patch_height, patch_width) = self.data.image_size, self.model.patch_size
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        for size, patch, axis in zip(self.data.image_size, self.model.patch_size, ("height", "width"), strict=True):
            if size % patch:
                raise ValueError(
                    f"data.image_size: {axis} {size} is not a multiple of model.patch_size {patch}; "
                    f"try {max(patch, size // patch * patch)}"
                )
        if self.mask != "none" and self.masking.num_masked > self.num_patches:
            raise ValueError(
                f"masking.num_masked {self.masking.num_masked} is more than the {self.num_patches} patches of a "
                f"{self.grid[0]}x{self.grid[1]} grid; BEiT masks 40 %: try {max(1, round(0.4 * self.num_patches))}"
            )
        if self.mask != "none" and max(self.grid) > MAX_GRID:
            raise ValueError(
                f"a grid of {self.grid[0]}x{self.grid[1]} patches: masks are drawn for at most {MAX_GRID} a side; "
                "take larger patches or smaller images"
            )
        if self.mask == "blockwise" and self.masking.min_block > self.masking.num_masked:
            raise ValueError(
                f"masking.min_block {self.masking.min_block} is more than masking.num_masked "
                f"{self.masking.num_masked}: most masks would be empty; lower min_block"
            )
        if self.data.tokens and self.objective != "tokens":
            raise ValueError(
                f"data.tokens '{self.data.tokens}' holds visual tokens, and objective={self.objective} predicts none; "
                "leave data.tokens empty"
            )
        if self.mask == "none" and self.predict == "masked":
            raise ValueError("mask=none leaves nothing to predict with predict=masked; set predict=all")
        return self


S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """Read a YAML file of at most 1 MB with the keys of `Config`, and lay overrides over it; see `configure`."""
    return configure(Config, overrides, _read_yaml(Path(path)))


def configure(model: type[S], overrides: list[str], values: dict[str, Any] | None = None) -> S:
    """Lay `key=value` overrides over nested values and check the whole.

    Args:
        overrides: each `key.subkey=value`, the value in YAML: `optim.lr=1e-3`, `data.image_size=[224, 224]`.

    Raises:
        ConfigError: one line for each thing wrong, with the nearest known name for an unknown key.
    """
    values = {} if values is None else values
    for item in overrides:
        key, found, text = item.partition("=")
        if not found:
            raise ConfigError(f"wanted key=value, for example seed=1; got '{item}'")
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: '{parent}' is a value, not a section")
        section[leaf] = _parse_yaml(text, f"value of {key}") if text else ""
    try:
        return model.model_validate(values)
    except ValidationError as err:
        raise ConfigError("\n".join(_explain(problem, model) for problem in err.errors())) from None


def save_config(config: Section, path: Path) -> None:
    """Write the resolved configuration, so that the run can be read and repeated from it alone."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _explain(problem: Any, model: type[Section]) -> str:
    """One line for one pydantic error."""
    path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], model)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{'.'.join([*path[:-1], near[0]])}'?" if near else f"known here: {', '.join(known)}"
        return f"unknown key '{'.'.join(path)}'; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return ": ".join(filter(None, [".".join(path), message]))
    return f"{'.'.join(path)}: {message[0].lower()}{message[1:]}; got {problem['input']!r}"


def _fields_at(path: list[str], model: Any) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys (the last would win in silence) and without aliases (they can explode)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                f"line {self.peek_event().start_mark.line + 1}: YAML aliases (*name) are not read; write it out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key_node.value}' stands twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(err).split())}") from None
    # YAML 1.1 reads 1e-3, without a dot, as text
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no config file '{path}'; the ones that come with fastbeit are in configs/")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"'{path}' has {path.stat().st_size} bytes; a config has at most {MAX_YAML_BYTES}")
    values = _parse_yaml(path.read_text(), f"'{path}'")
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' wants sections and keys as in configs/; got {type(values).__name__}")
    return values
