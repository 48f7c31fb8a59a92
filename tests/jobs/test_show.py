import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.cli import main
from fastbeit.config.read import load_config
from fastbeit.data.decode import decode
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader
from fastbeit.data.plans import Plans
from fastbeit.jobs import show
from fastbeit.masking import MaskRule, draw_masks
from helpers import caches, tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    return {**tiny.make_parts(folder), "config": str(tiny.write_config(folder / "tiny.yaml"))}


def settings(parts, **overrides):
    overrides = {"data__pipeline": "torch", **overrides}
    found = {**{key: value for key, value in parts.items() if key != "config"}, **overrides}
    return parts["config"], [f"{key.replace('__', '.')}={value}" for key, value in found.items()]


def shown(parts, tmp_path, *, num_images: int = 3, **overrides):
    """The sheet's pixels, what was seen, and the config."""
    path, keys = settings(parts, **overrides)
    output = tmp_path / "a" / "sheet.png"
    assert main(["data", "show", path, *keys, "-o", str(output), "--images", str(num_images)]) == 0
    config = load_config(path, keys)
    token_size = None if config.data.tokens or config.objective == "pixels" else (32, 32)
    seen = show.see(config, open_index(Path(config.data.index)), token_size, num_images)
    return np.asarray(Image.open(output)), seen, config


def training_batches(config, num_steps, token_size=(32, 32)):
    return list(
        make_loader(
            config.data,
            open_index(Path(config.data.index)),
            token_size=token_size,
            batch_size=config.optim.batch_size,
            seed=config.seed,
            rank=0,
            world_size=1,
            first_step=0,
            num_steps=num_steps,
        )
    )


def tile(sheet, layout, row, column, like):
    left, top = layout.corner(row, column)
    return sheet[top : top + like.shape[0], left : left + like.shape[1]]


def squares(view, factor):
    return np.kron(view, np.ones((factor, factor, 1), np.uint8))


# ---- the pixels


def test_a_sheet_shows_the_first_images_of_the_first_batch(parts, tmp_path):
    sheet, seen, config = shown(parts, tmp_path, seed=3)
    layout = show.layout_of(seen)
    assert layout.num_columns == 4 and sheet.shape[1] == layout.width
    (batch,) = training_batches(config, 1)
    assert batch.token_images is not None
    masks = draw_masks(MaskRule("blockwise", config.masking, config.grid, 3), batch.epoch, batch.sample)
    for row in range(3):
        patch_view, token_view = batch.images[row].numpy(), batch.token_images[row].numpy()
        assert np.array_equal(tile(sheet, layout, row, 1, squares(patch_view, 7)), squares(patch_view, 7))
        assert np.array_equal(tile(sheet, layout, row, 2, squares(token_view, 7)), squares(token_view, 7))
        hidden = masks.masked_idx[row, : masks.num_masked[row]].tolist()
        assert hidden
        masked_view = patch_view.astype(int)
        for patch in hidden:
            top, left = patch // 4 * 8, patch % 4 * 8
            masked_view[top : top + 8, left : left + 8] = 128
        assert np.array_equal(tile(sheet, layout, row, 3, squares(patch_view, 7)), squares(masked_view, 7))


def test_the_box_of_the_crop_stands_in_the_original(parts, tmp_path):
    sheet, seen, config = shown(parts, tmp_path)
    index, layout = open_index(Path(config.data.index)), show.layout_of(seen)
    (batch,) = training_batches(config, 1)
    plans = Plans(config.data, index, 8, 0, 0, 1).draw(0).plans
    for row, i in enumerate(batch.sample[:3].tolist()):
        # 80 x 64 pixels are shown 2.8 times as large
        original = tile(sheet, layout, row, 0, np.empty((179, 224)))
        top, left, height, width = (plans["crop_box"][row] * 2.8).tolist()
        red = (original == show.BOX_COLOUR).all(axis=2)
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        found = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        assert np.abs(np.subtract(found, (top, left, top + height, left + width))).max() <= 1.5
        wanted = Image.fromarray(decode(index.read_bytes(i), (64, 80))).resize((224, 179), Image.Resampling.BOX)
        assert np.array_equal(original[~red], np.asarray(wanted)[~red])


def test_more_images_than_a_batch_come_from_the_next_steps(parts, tmp_path):
    _, seen, config = shown(parts, tmp_path, num_images=5, optim__batch_size=2)
    batches = training_batches(config, 3)
    assert np.array_equal(seen.sample, torch.cat([batch.sample for batch in batches])[:5])
    assert np.array_equal(seen.images, torch.cat([batch.images for batch in batches])[:5])
    # wrapped into the next epoch
    _, seen, config = shown(parts, tmp_path, num_images=14)
    assert seen.epoch.tolist() == [0] * 12 + [1] * 2
    # what an epoch drops is not shown either
    _, seen, config = shown(parts, tmp_path, num_images=11, data__tail="drop", optim__batch_size=5)
    assert seen.epoch.tolist() == [0] * 10 + [1]


def test_what_has_no_token_view_shows_none_and_says_why(parts, tmp_path, capsys):
    folder = tmp_path / "tokens"
    assert caches.make(parts, folder) == 0
    words = f"of 32 words, from data.tokens '{folder}'"
    cached = parts | {"data.tokens": folder, "data.num_crops": caches.VIEWS}
    for these, reason in ((cached, words), (parts | {"objective": "pixels"}, "none, pixels are regressed")):
        capsys.readouterr()
        sheet, seen, config = shown(these, tmp_path)
        assert f"no token view is made: visual tokens {reason}" in capsys.readouterr().out
        assert seen.token_images is None and show.layout_of(seen).num_columns == 3
        (batch,) = training_batches(config, 1, token_size=None)
        assert np.array_equal(
            tile(sheet, show.layout_of(seen), 2, 1, np.empty((224, 224))), squares(batch.images[2].numpy(), 7)
        )


def test_without_a_mask_nothing_is_grey(parts, tmp_path):
    sheet, seen, _ = shown(parts, tmp_path, mask="none", predict="all")
    layout = show.layout_of(seen)
    like = np.empty((224, 224))
    assert np.array_equal(tile(sheet, layout, 0, 1, like), tile(sheet, layout, 0, 3, like))


def test_a_view_that_fills_the_tile_is_shown_pixel_by_pixel():
    large, small = np.zeros((300, 200, 3), np.uint8), np.zeros((112, 96, 3), np.uint8)
    assert show.enlarged(large).shape == large.shape and show.enlarged(small).shape == (224, 192, 3)


# ---- the words


def test_a_caption_says_what_was_done_to_an_image(parts):
    path, overrides = settings(parts, data__jitter_on="crop")
    config, index = load_config(path, overrides), open_index(Path(parts["data.index"]))
    seen = show.see(config, index, None, 2)
    i, plan = int(seen.sample[1]), seen.plans[1]
    first, second = show.caption(config, index, seen, 1)
    assert first == f"sample {i}, epoch 0: 80 x 64  {i:02}.jpg"
    top, left, height, width = plan["crop_box"]
    names = ("brightness", "contrast", "saturation")
    factors = ", ".join(f"{names[op]} {plan['factors'][op]:.2f}" for op in plan["order"])
    flipped = "flipped" if plan["flip"] else "not flipped"
    masked = int(seen.masked[1].sum())
    assert second == (
        f"box {width} x {height} at left {left}, top {top}; {flipped}; {factors} (of the crop); "
        f"{masked} of 16 patches masked"
    )
    still = load_config(path, [*overrides, "data.jitter=0", "data.flip=0"])
    assert "not flipped; no jitter" in show.caption(still, index, show.see(still, index, None, 2), 1)[1]


def test_names_of_any_bytes_and_length_can_be_written(tmp_path, parts):
    folder = tmp_path / "photos"
    folder.mkdir()
    data = (tiny.make_photos(tmp_path / "made", 1) / "00.jpg").read_bytes()
    for name in (b"\xff\n.jpg", "\u5199\u771f.jpg".encode(), b"x" * 250):
        (folder / os.fsdecode(name)).write_bytes(data)
    build_index(folder, tmp_path / "images.idx", progress=False)
    _, seen, _ = shown({**parts, "data.index": str(tmp_path / "images.idx")}, tmp_path)
    assert sorted(seen.sample) == [0, 1, 2]


def test_a_bad_image_is_replaced_as_in_training_and_named(parts, tmp_path, capsys):
    photos = tiny.make_photos(tmp_path / "photos", 4)
    build_index(photos, tmp_path / "images.idx", progress=False)
    (photos / "02.jpg").write_bytes(b"x" * (photos / "02.jpg").stat().st_size)
    _, seen, _ = shown({**parts, "data.index": str(tmp_path / "images.idx")}, tmp_path, num_images=4)
    assert sorted(seen.sample) == [0, 1, 3, 3]
    said = capsys.readouterr().out.splitlines()
    assert "the first 4 images of training, seed 0" in said[0]
    assert len(said) == 3 and said[1] == "pipeline: torch (as data.pipeline says)"
    assert "replaced" in said[2] and "02.jpg" in said[2]


# ---- mistakes


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["data.imagesize=3"], 2, "unknown key 'data.imagesize'"),
        (["--data.imagesize=3"], 2, "unknown key 'data.imagesize'"),
        (["data.index="], 2, "data.index is not set"),
        (["data.index=nowhere.idx"], 66, "no index 'nowhere.idx'"),
        (["data.tail=drop", "optim.batch_size=50"], 2, "batch_size 50 is more than the 12 images"),
        (["--images", "0"], 2, "at least one image"),
        (["-o", "sheet.jpg"], 2, "a name in .png; got 8 for 'sheet.jpg'"),
        (["-o", "file/sheet.png"], 74, "'file/sheet.png' cannot be written"),
    ],
    ids=str,
)
def test_a_mistake_ends_in_one_line_and_an_exit_code(parts, args, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    path, overrides = settings(parts)
    assert main(["data", "show", path, *overrides, *args]) == code
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
