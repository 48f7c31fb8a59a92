"""The pictures of a report: what the model makes of masked images, and the curves of its training (matplotlib)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from fastbeit import masking
from fastbeit.evaluate.finished_run import Figures, Trained
from fastbeit.evaluate.masked import batches_of, held_out_seed
from fastbeit.files import aside, put_in_place
from fastbeit.tokenizer.source import visual_tokens
from fastbeit_kernels.masked_embed import patchify

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display

NUM_IMAGES = 6
GRAY = 128
TRAINING_COLOUR, HELD_OUT_COLOUR = "#4878a8", "#d07030"
# a picture for people shows most of the photo, upright, in its own colours
CALM = {"crop_scale": (0.7, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


@dataclass(frozen=True)
class Look:
    """Some unseen images, and what the model says of them."""

    images: Tensor  # [n, height, width, 3] uint8
    masked: Tensor  # [n, N] bool: hidden from the model
    predicted: Tensor  # [n, N] bool: shown as the model predicts them
    outputs: Tensor  # [n, N, V or P] the model's, for all patches
    tokens: Tensor | None  # [n, N] int64, true; None where pixels are predicted


@torch.no_grad()
def look_at(run: Trained) -> Look:
    """The first unseen images in calm crops, masked as in validation."""
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update=CALM)})
    tokenizer, seed, device = run.tokenizer, held_out_seed(config), run.world.device
    token_size = tokenizer.view_size(config.grid) if tokenizer else None
    batch = next(batches_of(config, run.unseen, run.world, min(NUM_IMAGES, len(run.unseen)), token_size, seed))
    samples = batch.epoch.to(device), batch.sample.to(device)
    masked = masking.draw(replace(masking.rule_of(config), seed=seed), *samples).masked
    tokens = visual_tokens(tokenizer, batch, device)
    outputs = run.model.logits(batch.images.to(device), masked)
    # where nothing is hidden, all that there is to show is what the model makes of what it sees
    predicted = torch.ones_like(masked) if config.mask == "none" else masked
    return Look(batch.images.to(device), masked, predicted, outputs, tokens)


@torch.no_grad()
def make_panels(run: Trained, look: Look) -> dict[str, Tensor]:
    """The columns of the picture: title to images [n, height, width, 3] uint8."""
    seen = hide(look.images, look.masked, run.config.model.patch_size)
    if run.tokenizer is None or look.tokens is None:
        return {"original": look.images, "what the model sees": seen, "its prediction": _paint(run, look)}
    guessed = torch.where(look.predicted, look.outputs.argmax(2), look.tokens)
    return {
        "original": look.images,
        "true tokens, decoded": run.tokenizer.decode(look.tokens, run.config.grid),
        "what the model sees": seen,
        "its prediction, decoded": run.tokenizer.decode(guessed, run.config.grid),
        "how unsure it is": entropy_map(look, run.config.grid),
    }


def entropy_map(look: Look, grid: tuple[int, int]) -> Tensor:
    """Entropy of the prediction, [n, *look.images.shape[1:]] uint8: dark for none, bright for ln V.

    Patches that it does not predict are gray.
    """
    log_p = look.outputs.float().log_softmax(2)
    share = -(log_p.exp() * log_p).sum(2) / math.log(look.outputs.shape[2])  # [n, N] of the largest entropy
    colours = torch.from_numpy(matplotlib.colormaps["magma"](share.cpu().numpy(), bytes=True)[..., :3])
    colours[~look.predicted.cpu()] = GRAY
    height, width = look.images.shape[1] // grid[0], look.images.shape[2] // grid[1]
    return colours.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)


def hide(images: Tensor, masked: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[n, height, width, 3] uint8 with the masked patches [n, N] gray."""
    height, width = patch_size
    grid = masked.unflatten(1, (images.shape[1] // height, -1))
    pixels = grid.repeat_interleave(height, 1).repeat_interleave(width, 2)
    return images.masked_fill(pixels[..., None], GRAY)


def _paint(run: Trained, look: Look) -> Tensor:
    """The images with their predicted patches replaced by the model's pixels."""
    (height, width), data = run.config.model.patch_size, run.config.data
    mean, std = (torch.tensor(value, device=look.outputs.device)[:, None] for value in (data.mean, data.std))
    pixels = (look.outputs.unflatten(2, (3, -1)) * std + mean).clamp(0, 1).mul(255).round().flatten(2)
    patches = torch.where(look.predicted[..., None], pixels, patchify(look.images, (height, width)).float())
    # [n, down, across, 3, height, width]
    blocks = patches.unflatten(1, run.config.grid).unflatten(3, (3, height, width))
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(look.images.shape).byte()


def draw_predictions(run: Trained, path: Path) -> Path:
    """A row an unseen image; the columns are those of `make_panels`."""
    panels = make_panels(run, look_at(run))
    num_rows = len(panels["original"])
    figure, axes = plt.subplots(
        num_rows, len(panels), figsize=(2.2 * len(panels), 2.2 * num_rows), squeeze=False, layout="constrained"
    )
    for column, (title, images) in enumerate(panels.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row, image in enumerate(images.cpu().numpy()):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_axis_off()
    return _save(figure, path)


def draw_curves(lines: list[dict[str, Any]], figures: Figures, path: Path) -> Path:
    """Loss, masked accuracy and learning rate by step, from the lines of log.jsonl."""
    training = [line for line in lines if "event" not in line]
    held_out = [line for line in lines if line.get("event") == "validation"]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    _plot(
        loss, "loss a masked patch" + ("" if figures.baseline is None else ", nats"), training, "loss", held_out, "loss"
    )
    _plot(accuracy, "masked accuracy", training, "masked_accuracy", held_out, "accuracy")
    _plot(rate, "learning rate", training, "lr", [], "")
    if figures.baseline is not None:
        loss.axhline(figures.baseline, ls="--", lw=1, color="#666", label="baseline: sees no image")
    loss.legend(fontsize=8)
    return _save(figure, path)


def _plot(axis: Any, title: str, training: list[dict], key: str, held_out: list[dict], held_out_key: str) -> None:
    axis.plot(
        [line["step"] for line in training], [line[key] for line in training], color=TRAINING_COLOUR, label="training"
    )
    if held_out:
        places, values = [line["step"] for line in held_out], [line[held_out_key] for line in held_out]
        axis.plot(places, values, "o-", ms=4, color=HELD_OUT_COLOUR, label="held out")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(aside(path), dpi=110, format="png")
        put_in_place(path)
    finally:
        plt.close(figure)
        aside(path).unlink(missing_ok=True)
    return path
