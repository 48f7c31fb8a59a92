"""The pictures of a report: what the model makes of masked images, and the curves of its training (matplotlib)."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from fastbeit.evaluate import batches_of, held_out_seed, visual_tokens
from fastbeit.masking import draw_masks, plan_prediction
from fastbeit.model.vit import patchify
from fastbeit.trained import LOCAL, Figures, Trained

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display

NUM_IMAGES = 6
GRAY = 128
# a picture for people shows most of the photo, upright, in its own colours
CALM = {"crop_scale": (0.7, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


@torch.no_grad()
def draw_predictions(run: Trained, path: Path) -> Path:
    """A row an unseen image: original, masked input, prediction, token reconstruction."""
    panels = prediction_panels(run)
    num_rows = len(next(iter(panels.values())))
    figure, axes = plt.subplots(
        num_rows, len(panels), figsize=(2.2 * len(panels), 2.2 * num_rows), squeeze=False, layout="constrained"
    )
    for column, (title, images) in enumerate(panels.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row, image in enumerate(images):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_axis_off()
    return _save(figure, path)


@torch.no_grad()
def prediction_panels(run: Trained) -> dict[str, np.ndarray]:
    """Title to images [n, height, width, 3] uint8."""
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update=CALM)})
    tokenizer, seed = run.tokenizer, held_out_seed(config)
    token_size = tokenizer.view_size(config.grid) if tokenizer else None
    num_images = min(NUM_IMAGES, len(run.unseen))
    batch = next(batches_of(config, run.unseen, LOCAL, num_images, token_size, seed))
    masks = draw_masks(config.mask, config.masking, config.grid, seed, batch.epoch.numpy(), batch.sample.numpy())
    tokens = visual_tokens(tokenizer, batch, LOCAL.device)
    masked = plan_prediction(masks, config.num_patches, "masked", tokens).masked
    outputs = run.model.logits(batch.images, masked)  # [n, N, V or P]
    panels = {
        "original": batch.images.numpy(),
        "what the model sees": hide(batch.images, masked, config.model.patch_size).numpy(),
    }
    if tokenizer is None or tokens is None:
        panels["prediction"] = _paint(run, batch.images, masked, outputs)
        return panels
    guessed = torch.where(masked, outputs.argmax(2), tokens)
    panels["its prediction, decoded"] = tokenizer.decode(guessed, config.grid).numpy()
    panels["true tokens, decoded"] = tokenizer.decode(tokens, config.grid).numpy()
    return panels


def hide(images: Tensor, masked: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[n, height, width, 3] uint8 with the masked patches [n, N] gray."""
    height, width = patch_size
    grid = masked.unflatten(1, (images.shape[1] // height, -1))
    pixels = grid.repeat_interleave(height, 1).repeat_interleave(width, 2)
    return images.masked_fill(pixels[..., None], GRAY)


def _paint(run: Trained, images: Tensor, masked: Tensor, outputs: Tensor) -> np.ndarray:
    """Images with their masked patches replaced by predicted pixels [n, N, P]."""
    (height, width), data = run.config.model.patch_size, run.config.data
    mean, std = (torch.tensor(value)[:, None] for value in (data.mean, data.std))
    pixels = (outputs.unflatten(2, (3, -1)) * std + mean).clamp(0, 1).mul(255).flatten(2)
    patches = torch.where(masked[..., None], pixels, patchify(images, (height, width)).float())
    blocks = patches.unflatten(1, run.config.grid).unflatten(
        3, (3, height, width)
    )  # [n, down, across, 3, height, width]
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(images.shape).byte().numpy()


def draw_curves(lines: list[dict[str, Any]], figures: Figures, path: Path) -> Path:
    """Loss, masked accuracy and learning rate by step, from the lines of log.jsonl."""
    steps = [line for line in lines if "event" not in line]
    held_out = [line for line in lines if line.get("event") == "validation"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes,
        ("loss", "masked_accuracy", "lr"),
        ("loss a masked patch", "masked accuracy", "learning rate"),
        strict=True,
    ):
        axis.plot([line["step"] for line in steps], [line[key] for line in steps], label="training", color="#4878a8")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis, key in zip(axes, ("loss", "accuracy"), strict=False):
        places = [line["step"] for line in held_out]
        axis.plot(places, [line[key] for line in held_out], "o-", ms=4, label="held out", color="#d07030")
    if figures.baseline is not None:
        axes[0].axhline(figures.baseline, ls="--", lw=1, color="#666", label="unigram baseline")
    axes[0].legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
