"""How images are augmented for fine-tuning."""

from typing import Annotated

from pydantic import Field

from fastbeit.config.sections import Count, Fraction, Section


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
