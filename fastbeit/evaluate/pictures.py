"""The pictures of a report: what the model makes of masked images, and the curves of its training (matplotlib)."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit import masking
from fastbeit.config.sections import Size
from fastbeit.evaluate.attention import attention_maps
from fastbeit.evaluate.finished_run import Figures, Trained
from fastbeit.evaluate.masked import batches_of, held_out_seed
from fastbeit.evaluate.mistakes import Mistake
from fastbeit.files import aside, put_in_place
from fastbeit.model.vit import VisionTransformer
from fastbeit.tokenizer.source import visual_tokens
from fastbeit_kernels.masked_embed import patchify

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display
from matplotlib.patches import Rectangle  # noqa: E402

NUM_IMAGES = 6
NUM_ATTENTION_IMAGES = 3
NUM_MISTAKE_COLUMNS = 5
MAX_NAME = 20  # letters of a class's name that fit above its image
GRAY = 128
TRAINING_COLOUR, HELD_OUT_COLOUR = "#4878a8", "#d07030"
TILE_INCHES, TITLE_INCHES = 1.1, 0.25  # of attention maps
MARK_COLOUR = "#40e0d0"  # none of magma's
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


def draw_predictions(run: Trained, look: Look, path: Path) -> Path:
    """A row an unseen image; the columns are those of `make_panels`."""
    panels = make_panels(run, look)
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


def draw_attention(model: VisionTransformer, images: Tensor, points: tuple[Size, ...], block: int, path: Path) -> Path:
    """The first of some images [n, height, width, 3] uint8: a row a point, which is marked, and a column a head.

    Each map goes from 0 to its own largest share, so that one that is the same everywhere is bright everywhere.
    """
    images = images[:NUM_ATTENTION_IMAGES]
    maps = attention_maps(model, images, points, block).flatten(0, 1)  # [rows, H, down, across]
    (height, width), patch, gap = images.shape[1:3], model.patch_embed.patch_size, max(1, images.shape[2] // 20)
    tiles = torch.cat([images.cpu().repeat_interleave(len(points), 0)[:, None], _coloured(maps, patch)], 1)
    num_rows, num_columns = tiles.shape[:2]
    sheet = F.pad(tiles, (0, 0, 0, gap, 0, gap), value=255).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    # one image of all: axes for each would take seconds
    inches = TILE_INCHES * num_columns, TILE_INCHES * num_rows * (height + gap) / (width + gap)
    figure = plt.figure(figsize=(inches[0], inches[1] + TITLE_INCHES))
    axis = figure.add_axes((0, 0, 1, inches[1] / (inches[1] + TITLE_INCHES)))
    axis.imshow(sheet.numpy(), aspect="auto")
    axis.set_axis_off()
    for column in range(num_columns):
        left = column * (width + gap)
        title = f"head {column}" if column else "from here"
        axis.text(left + width / 2, -gap, title, fontsize=9, ha="center", va="bottom")
        for row, (y, x) in enumerate(points * len(images)):
            # pixels are centred at whole numbers
            corner = left + x * patch[1] - 0.5, row * (height + gap) + y * patch[0] - 0.5
            axis.add_patch(Rectangle(corner, patch[1], patch[0], fill=False, lw=1.2, color=MARK_COLOUR))
    return _save(figure, path)


def _coloured(maps: Tensor, patch: Size) -> Tensor:
    """[..., height, width, 3] uint8 of shares [..., down, across]."""
    shares = (maps / maps.amax((-2, -1), keepdim=True)).cpu().numpy()
    colours = torch.from_numpy(matplotlib.colormaps["magma"](shares, bytes=True)[..., :3])
    return colours.repeat_interleave(patch[0], -3).repeat_interleave(patch[1], -2)


def draw_mistakes(mistakes: Sequence[Mistake], classes: Sequence[str], path: Path) -> Path:
    """The images, the most confident first; above each what it was taken for, how surely, and what it is."""
    num_columns = min(NUM_MISTAKE_COLUMNS, len(mistakes))
    num_rows = math.ceil(len(mistakes) / num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(2.2 * num_columns, 2.6 * num_rows), squeeze=False)
    # the titles' two lines take 0.42 inches; a layout that is computed takes seconds
    top = 1 - 0.42 / (2.6 * num_rows)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=top, wspace=0.06, hspace=0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, mistake in zip(axes.flat, mistakes, strict=False):
        axis.imshow(mistake.image.numpy())
        guess, label = (_shortened(classes[number]) for number in (mistake.guess, mistake.label))
        axis.set_title(f"says {guess}, {mistake.probability:.0%}\nis {label}", fontsize=9, parse_math=False)
    return _save(figure, path)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def draw_finetuning_curves(lines: list[dict[str, Any]], baseline: float | None, path: Path) -> Path:
    """Loss, accuracy and learning rate by step, from the lines of log.jsonl.

    Args:
        baseline: share of held-out images of the class that is the most frequent one in training.
    """
    training = [line for line in lines if "event" not in line]
    held_out = [line for line in lines if line.get("event") == "validation"]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    _plot(loss, "loss, nats", training, "loss", held_out, "loss")
    _plot(accuracy, "accuracy (top-1)", training, "accuracy", held_out, "top1")
    _plot(rate, "learning rate", training, "lr", [], "")
    if baseline is not None:
        accuracy.axhline(baseline, ls="--", lw=1, color="#666", label="most frequent class")
    accuracy.legend(fontsize=8)
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
        with warnings.catch_warnings():
            # names of classes may be in any script: a box in place of a letter is no reason to say more
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure.savefig(aside(path), dpi=110, format="png")
        put_in_place(path)
    finally:
        plt.close(figure)
        aside(path).unlink(missing_ok=True)
    return path
