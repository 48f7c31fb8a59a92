"""A fine-tuning that was run: its newest checkpoint, opened, and whether there are images to judge it by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.read import as_saved
from fastbeit.config.running import KernelsConfig
from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import Index
from fastbeit.errors import CHECKPOINT_UNUSABLE, RunError
from fastbeit.evaluate.finished_run import Moved, check_run, index_of, kept_weights, settings_of, trained_index
from fastbeit.model.classify import Classifier, make_classifier
from fastbeit.train.checkpoint import load_model, load_state, resolve_checkpoint


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuning's newest checkpoint, ready to be asked."""

    config: FinetuneConfig
    device: torch.device
    checkpoint: Path
    state: dict[str, Any]
    model: Classifier  # with averaged weights, where there are
    classes: Sequence[str]  # names, in the order of the head
    index: Index
    val_index: Index | None

    @property
    def data(self) -> DataConfig:
        """For evaluation: the middle of an image is decoded by Pillow or torch alone."""
        pipeline = "pillow" if self.config.data.pipeline == "pillow" else "torch"
        return self.config.data.model_copy(update={"pipeline": pipeline})

    @property
    def lack(self) -> str:
        """Why no images can judge it; empty: they can."""
        if self.val_index is None:
            return "no images were held out (data.val_index is empty)"
        bare = int(np.count_nonzero(self.val_index.labels < 0))
        if bare:
            return f"{bare:,} of its {len(self.val_index):,} held-out images have no label"
        return ""


def open_finetuning(run: Path, moved: Moved | None = None) -> Finetuned:
    """Load the newest verified checkpoint of a fine-tuning's directory.

    Raises:
        RunError: no run (2), no checkpoint or one that does not fit its settings (78), or its images are gone (66).
    """
    check_run(run)
    checkpoint = resolve_checkpoint(run)
    state = load_state(checkpoint)
    config = as_saved(FinetuneConfig, settings_of(run, state))
    classes = state.get("classes")
    if not isinstance(classes, list) or not classes:
        raise RunError(f"'{checkpoint}' does not name its classes: not of a fine-tuning", CHECKPOINT_UNUSABLE)
    # any kernels would do: nothing is trained
    plain = config.model_copy(update={"kernels": KernelsConfig(backend="reference")})
    model, moved = make_classifier(plain, len(classes)), moved or Moved()
    try:
        model.load_state_dict(kept_weights(load_model(checkpoint)))
    except RuntimeError as err:
        problem = str(err).splitlines()[0]
        raise RunError(f"'{checkpoint}' does not fit the run's model: {problem}", CHECKPOINT_UNUSABLE) from err
    has_val_index = bool(moved.val_index or config.data.val_index)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Finetuned(
        config=config,
        device=device,
        checkpoint=checkpoint,
        state=state,
        model=model.to(device),
        classes=classes,
        index=trained_index(run, moved, config.data.index, state),
        val_index=index_of(run, "val_index", moved.val_index, config.data.val_index) if has_val_index else None,
    )
