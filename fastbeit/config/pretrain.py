"""One pre-training run: the sections it is made of, and whether they fit together.

Defaults are those of BEiT-B on ImageNet-1k (arXiv 2106.08254, Table 12, and the authors' code)."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastbeit.config.running import (
    EngineConfig,
    KernelsConfig,
    PretrainLogConfig,
    ProbeConfig,
    optimizers_that_do_not_fit,
)
from fastbeit.config.sections import (
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    PathText,
    Section,
    TokenizerConfig,
    grid_of,
    refuse,
    sizes_that_do_not_fit,
)

MAX_GRID = 32  # patches a side that `fastbeit_kernels.block_masks` holds in registers


class Config(Section):
    """One pre-training run."""

    renamed: ClassVar[dict[str, str]] = {"data.views": "data.num_crops", "log.val_views": "log.val_crops"}
    earlier: ClassVar[dict[str, Any]] = {"data.pipeline": "torch"}

    out: PathText = Field(
        default="", description="run directory: config, log, checkpoints; the same again continues the run"
    )
    init: PathText = Field(
        default="",
        description="weights that a fresh run starts from: a run, a checkpoint, or any file that `fastbeit convert` "
        "reads; empty: the authors' initialisation. A run that goes on does not read it",
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
    log: PretrainLogConfig = PretrainLogConfig()
    probe: ProbeConfig = ProbeConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return grid_of(self.data, self.model)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_slots(self) -> int:
        """Patches of an image that are predicted, or may be."""
        return self.num_patches if self.predict == "all" else self.num_masked

    @property
    def num_predictions(self) -> int:
        """Rows that an image has in the head."""
        return self.num_slots

    @property
    def num_masked(self) -> int:
        """Patches of an image that are masked, or may be."""
        return self.masking.num_masked_of(self.num_patches)

    @property
    def probe_block(self) -> int:
        """Whose output the probe looks at."""
        return max(0, 3 * self.model.depth // 4 - 1) if self.probe.block is None else self.probe.block

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        refuse(
            [
                *sizes_that_do_not_fit(self.data, self.model),
                *self._masks_that_do_not_fit(),
                *self._aims_that_do_not_fit(),
                *optimizers_that_do_not_fit(self.optim, self.engine),
            ]
        )
        return self

    def _masks_that_do_not_fit(self) -> Iterator[str]:
        if self.mask == "none" or not self.num_patches:
            return
        grid, min_block = f"{self.grid[0]}x{self.grid[1]}", self.masking.min_block_of(self.num_patches)
        if self.num_masked > self.num_patches:
            yield (
                f"masking.num_masked {self.num_masked} is more than the {self.num_patches} patches of a "
                f"{grid} grid; BEiT masks 40 %: try {max(1, round(0.4 * self.num_patches))}, or masking.ratio=0.4"
            )
        if max(self.grid) > MAX_GRID:
            yield (
                f"a grid of {grid} patches: masks are drawn for at most {MAX_GRID} a side; "
                "take larger patches or smaller images"
            )
        if self.mask == "blockwise" and min_block > self.num_masked:
            yield (
                f"masking.min_block {min_block} is more than masking.num_masked {self.num_masked}: most masks would "
                "be empty; lower min_block"
            )

    def _aims_that_do_not_fit(self) -> Iterator[str]:
        if self.data.tokens and self.objective != "tokens":
            yield (
                f"data.tokens '{self.data.tokens}' holds visual tokens, and objective={self.objective} predicts none; "
                "leave data.tokens empty"
            )
        if self.probe_block >= self.model.depth:
            yield f"probe.block {self.probe_block} of {self.model.depth} blocks, which are 0 to {self.model.depth - 1}"
        if self.mask == "none" and self.predict == "masked":
            yield "mask=none leaves nothing to predict with predict=masked; set predict=all"
