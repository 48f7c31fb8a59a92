"""A model that is asked, and not trained: whatever `weights` reads, as a module, and how an image is shown to it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbeit.config.running import KernelsConfig
from fastbeit.config.sections import DataConfig
from fastbeit.errors import USAGE, RunError
from fastbeit.model.classify import Classifier
from fastbeit.model.vit import VisionTransformer
from fastbeit.weights.dialect import Channels
from fastbeit.weights.models import ModelWeights, read_model
from fastbeit.weights.own import Origin


@dataclass(frozen=True)
class Frozen:
    model: VisionTransformer  # a `Classifier` where there is a head over classes
    data: DataConfig  # size, normalisation and levels of its images
    device: torch.device
    origin: Origin
    classes: list[str] | None  # names of the head's rows

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    def classifier(self) -> Classifier:
        """
        Raises:
            RunError: it has no head (2).
        """
        if isinstance(self.model, Classifier):
            return self.model
        raise RunError(
            f"'{self.origin.file}' has no head over classes: it was pre-trained, and knows none. Fine-tune it with "
            "labelled images, or look at its features (fastbeit features, fastbeit probe)",
            USAGE,
        )

    def class_name(self, row: int) -> str:
        return self.classes[row] if self.classes else str(row)


class ModelSource(NamedTuple):
    """Where a model is, and what its file may not say."""

    path: Path  # a run, a checkpoint, a conversion, or a file of another dialect
    mean: Channels | None = None  # that pixels in [0, 1] are normalised with; None: as the file says
    std: Channels | None = None
    num_workers: int = 0  # processes that decode its images


def open_frozen(source: ModelSource, device: torch.device) -> Frozen:
    """
    Raises:
        RunError: the file does not say what its images were normalised with (2); and as `read_model`.
    """
    found = read_model(source.path)
    mean, std = source.mean or found.mean, source.std or found.std
    if mean is None or std is None:
        raise RunError(
            f"'{source.path}' does not say what its images were normalised with; say it, for example "
            "timm's ViT: --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5, or DeiT: --mean 0.485 0.456 0.406 --std 0.229 0.224 "
            "0.225 (in Python mean=, std=)",
            USAGE,
        )
    if not (all(map(math.isfinite, mean)) and all(0 < one < math.inf for one in std)):
        raise RunError(f"wanted finite means and deviations above 0; got mean {list(mean)}, std {list(std)}", USAGE)
    data = DataConfig(
        image_size=found.image_size,
        mean=mean,
        std=std,
        levels=found.levels,
        num_workers=source.num_workers,
        pipeline="torch",
    )
    model = _module(found, data).eval().requires_grad_(False).to(device)
    return Frozen(model, data, device, found.origin, found.classes)


def _module(found: ModelWeights, data: DataConfig) -> VisionTransformer:
    tensors = found.tensors
    # PyTorch's own: they are not tried first, and no gradient is wanted
    kernels = KernelsConfig(backend="reference").by_op
    pixels: dict[str, Any] = dict(image_size=data.image_size, mean=data.mean, std=data.std, kernels=kernels)
    has_norm = "fc_norm.weight" in tensors or "norm.weight" in tensors
    if "head.weight" in tensors and has_norm:
        # of two norms, that after the mean pooling is the one that is used
        pooling = "mean" if "fc_norm.weight" in tensors else "cls"
        model = Classifier(found.model, num_classes=len(tensors["head.weight"]), pooling=pooling, **pixels)
    else:
        model = VisionTransformer(found.model, **pixels)
    kept: dict[str, Tensor] = {name: tensors[name] for name in model.state_dict()}
    model.load_state_dict(kept)
    return model
