"""What is timed: two sizes of BEiT, and who computes a step of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, load_config

SIZES = {"B": None, "L": Path(__file__).parents[2] / "configs" / "beit_large_in1k.yaml"}  # None: the defaults
TOY = (
    "data.image_size=32",
    "masking.num_masked=6",
    "masking.min_block=2",
    "model.width=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.mlp_width=64",
    "model.patch_size=8",
)


@dataclass(frozen=True)
class Variant:
    """Implementations of the operators, and whether blocks are compiled."""

    name: str
    kernels: str  # kernels.backend
    compiled: bool
    attention: str  # kernels.attention

    def __str__(self) -> str:
        own = "sdpa" if self.kernels == "reference" else self.kernels
        attention = "" if self.attention == own else f", attention by {self.attention}"
        return f"{self.kernels} kernels{attention}, {'torch.compile' if self.compiled else 'eager'}"


# in the order of what is least likely to fail
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("reference", "reference", False, "sdpa"),
        Variant("triton", "triton", False, "triton"),
        Variant("triton-compiled", "triton", True, "triton"),
        Variant("reference-compiled", "reference", True, "sdpa"),
        Variant("sdpa-compiled", "triton", True, "sdpa"),
    )
}
# what the trainer takes on CUDA; the same with PyTorch's attention; plain PyTorch
DEFAULT = "triton-compiled", "sdpa-compiled", "reference"


@dataclass(frozen=True)
class Case:
    """One row: a size, a variant, and how many take how large a step of it."""

    size: str
    variant: Variant
    batch: int  # images a rank and step
    num_ranks: int = 1
    engine: str = "single"
    device: str = "cuda"  # on the CPU a toy model
    settings: tuple[str, ...] = field(default=())  # key=value of the trainer's configuration

    def __str__(self) -> str:
        ranks = f", {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{self.size}, {self.variant}, batch of {self.batch}{ranks}"

    @property
    def config(self) -> Config:
        """The trainer's, of this row.

        Raises:
            ConfigError: a setting does not exist or does not fit.
        """
        settings = [
            f"optim.batch_size={self.batch * self.num_ranks}",
            f"engine.name={self.engine}",
            f"engine.device={self.device}",
            f"engine.compile={'on' if self.variant.compiled else 'off'}",
            f"kernels.backend={self.variant.kernels}",
            f"kernels.attention={self.variant.attention}",
            *(TOY if self.device == "cpu" else ()),
            *self.settings,
        ]
        return config_of(self.size, settings)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of its case."""
        variant = self.variant
        return dict(
            case=str(self),
            size=self.size if self.device != "cpu" else f"toy {self.size}",
            variant=variant.name,
            kernels=variant.kernels,
            compile=variant.compiled,
            batch=self.batch,
            ranks=self.num_ranks,
            engine=self.engine,
        )


def config_of(size: str, settings: list[str]) -> Config:
    path = SIZES[size]
    return configure(Config, settings) if path is None else load_config(path, settings)
