"""What training sees, as a picture: a contact sheet of the first images of a run (Pillow).

A row an image: the original with the box of its crop, the patch view, the token view as the tokenizer sees it, and the
patch view under its mask. Images, crops and masks are those of a run of the same config, from its first step on.
"""

import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Levels, Size
from fastbeit.data.decode import decode
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.given import indexed_for_now
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import make_loader
from fastbeit.data.plans import Plans
from fastbeit.data.sampling import JITTER_OPS
from fastbeit.engine.ranks import World, device_of
from fastbeit.errors import ConfigError, writing
from fastbeit.evaluate.pictures import hide
from fastbeit.files import write_whole
from fastbeit.plural import counted
from fastbeit.tokenizer.source import open_token_source
from fastbeit.train.pipeline import settle_pipeline

TILE = 224  # pixels; smaller views are enlarged to at most this, each pixel to a square
GAP, LINE, FONT_SIZE = 8, 16, 12
BOX_COLOUR, PAPER, INK = (255, 64, 32), (255, 255, 255), (32, 32, 32)


@dataclass(frozen=True)
class Seen:
    """What training sees of some images."""

    sample: np.ndarray  # [n] int64, rows of the index
    epoch: np.ndarray  # [n] int64
    plans: np.ndarray  # [n] records of PLAN
    images: np.ndarray  # [n, H, W, 3] uint8, the patch view
    token_images: np.ndarray | None  # [n, h, w, 3] uint8; None where training makes none
    masked: np.ndarray  # [n, down, across] bool
    bad: list[tuple[int, str]]  # as in `Batch`


@dataclass(frozen=True)
class Layout:
    """Where things stand on the sheet, in pixels."""

    tile: Size  # height and width that each column of a row has
    num_columns: int

    @property
    def row_height(self) -> int:
        return self.tile[0] + 2 * LINE + 2 * GAP

    @property
    def width(self) -> int:
        return GAP + self.num_columns * (self.tile[1] + GAP)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a tile."""
        return GAP + column * (self.tile[1] + GAP), 2 * (LINE + GAP) + row * self.row_height


def show(config: Config, output: Path, num_images: int) -> str:
    """Write the sheet of a config's first images as a PNG file; says what is on it.

    Raises:
        RunError: bad config, index or tokenizer, as in pre-training, or the sheet cannot be written (74).
    """
    if not config.data.index:
        raise ConfigError("data.index is not set; add data.index=PATH")
    # held-out images are not shown
    images = config.data.model_copy(update={"val_index": ""})
    with indexed_for_now(images) as data:
        return _show(config.model_copy(update={"data": data}), output, num_images)


def _show(config: Config, output: Path, num_images: int) -> str:
    if num_images < 1 or output.suffix.lower() != ".png":
        raise ConfigError(f"a sheet wants at least one image and a name in .png; got {num_images} for '{output}'")
    warnings = masking.try_rule(masking.rule_of(config))
    index = open_index(Path(config.data.index), config.data.levels)
    world = World(rank=0, size=1, device=device_of(config.engine))
    run, tokens = (Path(path) if path else None for path in (config.out, config.data.tokens))
    config, pipeline = settle_pipeline(config, world, run, tokens)
    source = open_token_source(config, index, torch.device("cpu"))
    seen = see(config, index, source.token_size, num_images)
    head = f"the first {counted(len(seen.sample), 'image')} of training, seed {config.seed}"
    if seen.token_images is None:
        head += f"; no token view is made: visual tokens {source}"
    sheet = draw_sheet(config, index, seen, head)
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG")
    with writing(f"'{output}'"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, drawn.getvalue())
    replaced = [f"replaced, a bad image: {reason}" for _, reason in seen.bad]
    return "\n".join([f"{output}: {head}", str(pipeline), *replaced, *warnings])


def see(config: Config, index: Index, token_size: Size | None, num_images: int) -> Seen:
    """The first images of step 0, and of the steps after it where a batch has fewer; all on the CPU."""
    batch_size = config.optim.batch_size
    # raises for the settings that training raises for
    steps_per_epoch(len(index), batch_size, config.data.tail)
    # what stands first in a batch does not depend on its size: a few images are made, not a batch of thousands
    batch_size = min(batch_size, num_images)
    data = config.data.model_copy(update={"num_workers": 0})
    loader = make_loader(
        data,
        index,
        token_size=token_size,
        batch_size=batch_size,
        seed=config.seed,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=-(-num_images // batch_size),
    )
    with contextlib.closing(loader) as batches:
        found = list(batches)
    sample, epoch = (torch.cat([getattr(batch, name) for batch in found])[:num_images] for name in ("sample", "epoch"))
    masked = masking.draw(replace(masking.rule_of(config), backend="reference"), epoch, sample).masked
    return Seen(
        sample=sample.numpy(),
        epoch=epoch.numpy(),
        plans=Plans(data, index, batch_size, config.seed, 0, 1).augment(sample.numpy(), epoch.numpy()),
        images=_joined([batch.images for batch in found])[:num_images],
        token_images=_joined([batch.token_images for batch in found])[:num_images] if token_size else None,
        masked=masked.unflatten(1, config.grid).numpy(),
        bad=[bad for batch in found for bad in batch.bad],
    )


def _joined(parts: list[Tensor | None]) -> np.ndarray:
    return torch.cat([part.cpu() for part in parts if part is not None]).numpy()


def draw_sheet(config: Config, index: Index, seen: Seen, head: str) -> Image.Image:
    """The sheet, with a line of words at its head."""
    layout = layout_of(seen)
    rows = len(seen.sample)
    sheet = Image.new("RGB", (layout.width, layout.corner(rows, 0)[1]), PAPER)
    write = _writer(sheet)
    titles = ["original, box of the crop", _title("patch view", seen.images), "patch view, masked"]
    if seen.token_images is not None:
        titles.insert(2, _title("token view", seen.token_images))
    write(GAP, GAP // 2, head, layout.width - 2 * GAP)
    for column, title in enumerate(titles):
        write(layout.corner(0, column)[0], GAP + LINE, title, layout.tile[1])
    for row in range(rows):
        for column, tile in enumerate(_tiles(index, seen, row, layout, config.data.levels)):
            sheet.paste(tile, layout.corner(row, column))
        left, top = layout.corner(row, 0)
        for number, line in enumerate(caption(config, index, seen, row)):
            write(left, top + layout.tile[0] + 2 + number * LINE, line, layout.width - 2 * GAP)
    return sheet


def layout_of(seen: Seen) -> Layout:
    views = [seen.images] if seen.token_images is None else [seen.images, seen.token_images]
    heights, widths = zip(*(enlarged(view[0]).shape[:2] for view in views), strict=True)
    return Layout((max(heights), max(widths)), 2 + len(views))


def enlarged(view: np.ndarray) -> np.ndarray:
    """A view [h, w, 3] with each pixel a square of as many as fit into a tile."""
    factor = max(1, TILE // max(view.shape[:2]))
    return view.repeat(factor, axis=0).repeat(factor, axis=1)


def caption(config: Config, index: Index, seen: Seen, row: int) -> tuple[str, str]:
    """Which image it is; how it was cropped, flipped, jittered and masked."""
    i, plan, masked = int(seen.sample[row]), seen.plans[row], seen.masked[row]
    top, left, height, width = (int(value) for value in plan["crop_box"])
    factors = ", ".join(f"{JITTER_OPS[op]} {plan['factors'][op]:.2f}" for op in plan["order"])
    jitter = f"{factors} (of the {config.data.jitter_on.replace('_', ' ')})" if config.data.jitter else "no jitter"
    name = index.name(i).removeprefix(f"{index.root}/")
    return (
        f"sample {i}, epoch {seen.epoch[row]}: {index.widths[i]} x {index.heights[i]}  {name}",
        f"box {width} x {height} at left {left}, top {top}; {'flipped' if plan['flip'] else 'not flipped'}; {jitter}; "
        f"{masked.sum()} of {masked.size} patches masked",
    )


def _title(name: str, views: np.ndarray) -> str:
    factor = enlarged(views[0]).shape[0] // views.shape[1]
    return f"{name}, {views.shape[2]} x {views.shape[1]}" + (f" (x {factor})" if factor > 1 else "")


def _tiles(index: Index, seen: Seen, row: int, layout: Layout, levels: Levels) -> list[Image.Image]:
    """What stands in a row, from left to right."""
    image, masked = torch.from_numpy(seen.images[row : row + 1]), torch.from_numpy(seen.masked[row : row + 1])
    patch_size = image.shape[1] // masked.shape[1], image.shape[2] // masked.shape[2]
    views = [seen.images[row], hide(image, masked.flatten(1), patch_size)[0].numpy()]
    if seen.token_images is not None:
        views.insert(1, seen.token_images[row])
    original = _original(index, int(seen.sample[row]), seen.plans[row]["crop_box"], layout.tile, levels)
    return [original, *(Image.fromarray(enlarged(view)) for view in views)]


def _original(index: Index, i: int, crop_box: np.ndarray, tile: Size, levels: Levels) -> Image.Image:
    """The whole image, made to fit a tile, with the box drawn."""
    height, width = int(index.heights[i]), int(index.widths[i])
    image = Image.fromarray(decode(index.read_bytes(i), (height, width), levels))
    scale = min(tile[0] / height, tile[1] / width)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    top, left, box_height, box_width = (float(value) * scale for value in crop_box)
    corners = left, top, max(left, left + box_width - 1), max(top, top + box_height - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=BOX_COLOUR, width=2)
    return image


def _writer(sheet: Image.Image):
    """Writes a line of text, cut where it is longer than `width` pixels."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)

    def write(left: int, top: int, text: str, width: int) -> None:
        # names of files can hold any bytes but 0, and the font has few letters: escapes, as Python writes them
        text = ascii(text)[1:-1]
        if draw.textlength(text, font) > width:
            while text and draw.textlength(text + "...", font) > width:
                text = text[:-1]
            text += "..."
        draw.text((left, top), text, INK, font)

    return write
