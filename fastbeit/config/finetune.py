"""How images are augmented for fine-tuning."""

from pydantic import Field

from fastbeit.config.sections import Fraction, Section


class AugmentConfig(Section):
    """What fine-tuning does to a view beyond the crop and flip of `DataConfig` (the authors' recipe)."""

    num_ops: int = Field(default=2, ge=0, description="RandAugment operations a view; 0: colour jitter as data.jitter")
    magnitude: float = Field(default=9.0, ge=0, le=10, description="mean magnitude of an operation, of at most 10")
    magnitude_std: float = Field(default=0.5, ge=0, description="standard deviation of the magnitude")
    erase: Fraction = Field(default=0.25, description="probability that a box of a view is filled with noise")
