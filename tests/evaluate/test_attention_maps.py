"""Attention maps against transformers' own, and the patches that are chosen."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BeitForImageClassification, BeitModel

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig
from fastbeit.errors import USAGE, ConfigError
from fastbeit.evaluate import pictures
from fastbeit.evaluate.attention import Reference, attention_maps
from fastbeit.model.classify import Classifier
from fastbeit.weights import huggingface
from helpers.dialects import CLASSES, HALF, SIDE, SMALL, VARIANTS, pretrained
from helpers.weights import randomise

GRID = 4
DEPTH = 3
PER_BLOCK: dict[str, Any] = SMALL | {"relative_position": "per_block"}


def classifier(**fields: Any) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**PER_BLOCK | fields)
    model = Classifier(config, image_size=(SIDE, SIDE), num_classes=CLASSES, mean=HALF, std=HALF, kernels=Kernels())
    randomise(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["pre-trained", "fine-tuned"])
def test_maps_are_those_of_transformers(tmp_path, variant, kind):
    """Of each block: all rows of its probabilities, by their own code from our weights."""
    fields: dict[str, Any] = VARIANTS[variant] | {"depth": DEPTH}
    model = pretrained(**fields) if kind == "pre-trained" else classifier(**fields)
    config = ModelConfig(**(SMALL if kind == "pre-trained" else PER_BLOCK) | fields)
    huggingface.write(model.state_dict(), config, (SIDE, SIDE), HALF, HALF, None, tmp_path)
    options: dict[str, Any] = dict(attn_implementation="eager", output_attentions=True)
    if kind == "pre-trained":
        theirs = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False, **options).eval()
    else:
        theirs = BeitForImageClassification.from_pretrained(tmp_path, **options).eval()
    images = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    with torch.no_grad():
        wanted = theirs((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).attentions
    assert len(wanted) == DEPTH
    every = tuple((row, column) for row in range(GRID) for column in range(GRID))
    for block, whole in enumerate(wanted):
        found = attention_maps(model, images, every, block)
        assert found.shape == (2, GRID * GRID, SMALL["num_heads"], GRID, GRID)
        torch.testing.assert_close(found.flatten(3), whole[:, :, 1:, 1:].transpose(1, 2), atol=1e-5, rtol=0)
        # what is missing goes to the cls token
        torch.testing.assert_close(found.sum((3, 4)), 1 - whole[:, :, 1:, 0].transpose(1, 2), atol=1e-5, rtol=0)


def test_a_point_is_a_row_and_a_column_of_the_grid():
    """Images of 2 x 4 patches, where rows and columns cannot be taken for one another."""
    torch.manual_seed(0)
    model = Classifier(ModelConfig(**SMALL), image_size=(16, 32), num_classes=2, mean=HALF, std=HALF, kernels=Kernels())
    randomise(model)
    images = torch.randint(0, 256, (1, 16, 32, 3), dtype=torch.uint8)
    every = tuple((row, column) for row in range(2) for column in range(4))
    whole = attention_maps(model, images, every, 2)
    assert whole.shape == (1, 8, SMALL["num_heads"], 2, 4)
    torch.testing.assert_close(attention_maps(model, images, ((1, 2), (0, 3)), 2), whole[:, [6, 3]])
    assert not torch.allclose(whole[:, 6], whole[:, 3], atol=1e-2)


def test_points_are_spread_over_the_grid_where_none_are_chosen():
    assert Reference().resolved((14, 14), 12) == (((4, 4), (7, 7), (9, 9)), 11)
    assert Reference().resolved((2, 1), 3) == (((0, 0), (1, 0)), 2)
    assert Reference(points=((13, 0),), block=1).resolved((14, 14), 12) == (((13, 0),), 1)


WRONG = {
    "row": (Reference(points=((0, 0), (7, 3))), "--points 7,3 is no patch of a grid of 7 x 14: rows are 0 to 6"),
    "column": (Reference(points=((0, 14),)), "--points 0,14 .* columns 0 to 13"),
    "negative": (Reference(points=((-1, 0),)), "--points -1,0"),
    "no block": (Reference(block=-1), "--block -1: the model has blocks 0 to 11"),
    "past the last": (Reference(block=12), "--block 12: the model has blocks 0 to 11"),
}


@pytest.mark.parametrize("reference, message", WRONG.values(), ids=list(WRONG))
def test_what_the_model_has_not_is_said(reference, message):
    with pytest.raises(ConfigError, match=message) as caught:
        reference.resolved((7, 14), 12)
    assert caught.value.exit_code == USAGE


def test_the_picture_has_a_row_a_point_and_a_column_a_head(tmp_path, monkeypatch):
    """In each map the brightest patch has a place of its own; the image is red."""
    maps = torch.zeros(1, 2, 3, GRID, GRID)
    for point in range(2):
        for head in range(3):
            maps[0, point, head, head, point + 1] = 0.3 - 0.1 * head
            maps[0, point, head, 3, 0] = 0.05
    monkeypatch.setattr(pictures, "attention_maps", lambda *_: maps)
    images = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, SIDE, SIDE, 3)
    path = pictures.draw_attention(classifier(), images, ((0, 3), (3, 3)), 2, tmp_path / "maps.png")
    with Image.open(path) as file:
        drawn = np.asarray(file.convert("RGB")).astype(int)
    tile = 1.1 * 110  # pixels, of which 32 of 33 are no gap
    title = drawn.shape[0] - 2 * tile
    colours = np.empty((2, 4, GRID, GRID, 3), int)
    for row, column, y, x in np.ndindex(colours.shape[:4]):
        down, across = ((place + 0.5) * tile * 32 / 33 / GRID for place in (y, x))
        colours[row, column, y, x] = drawn[int(title + row * tile + down), int(column * tile + across)]
    assert (colours[:, 0] == [255, 0, 0]).all()
    bright = colours[:, 1:].sum(4) > 600
    assert torch.equal(torch.from_numpy(bright), maps[0] > 0.05)
    # black, where nothing is attended to
    assert (colours[:, 1:, :3][~bright[:, :, :3]] <= [0, 0, 4]).all()


def test_a_map_that_is_the_same_everywhere_is_bright_everywhere():
    colours = pictures._coloured(torch.full((2, 2), 1 / 9), (3, 4))
    assert colours.shape == (6, 8, 3) and (colours.int() - torch.tensor([252, 253, 191])).abs().max() <= 4
