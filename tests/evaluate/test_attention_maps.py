"""Attention maps against transformers' own, and the patches that are chosen."""

from typing import Any

import pytest
import torch
from transformers import BeitForImageClassification, BeitModel

from fastbeit.config.sections import Kernels, ModelConfig
from fastbeit.errors import USAGE, ConfigError
from fastbeit.evaluate.attention import Reference, attention_maps
from fastbeit.model.classify import Classifier
from fastbeit.weights import huggingface
from helpers.dialects import CLASSES, HALF, SIDE, SMALL, VARIANTS, pretrained
from helpers.weights import randomise

GRID = 4
POINTS = (0, 0), (1, 3), (3, 1)
DEPTH = 3


def classifier(**fields: Any) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**SMALL | {"relative_position": "per_block"} | fields)
    model = Classifier(config, image_size=(SIDE, SIDE), num_classes=CLASSES, mean=HALF, std=HALF, kernels=Kernels())
    randomise(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["pre-trained", "fine-tuned"])
def test_maps_are_those_of_transformers(tmp_path, variant, kind):
    """Of each block: all rows of its probabilities, by their own code from our weights."""
    fields = VARIANTS[variant] | {"depth": DEPTH}
    model = pretrained(**fields) if kind == "pre-trained" else classifier(**fields)
    config = ModelConfig(**SMALL | ({"relative_position": "per_block"} if kind == "fine-tuned" else {}) | fields)
    huggingface.write(model.state_dict(), config, (SIDE, SIDE), HALF, HALF, tmp_path)
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
    for block, whole in enumerate(wanted, start=1):
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
    assert Reference().resolved((14, 14), 12) == (((4, 4), (7, 7), (9, 9)), 12)
    assert Reference().resolved((2, 1), 3) == (((0, 0), (1, 0)), 3)
    assert Reference(points=((13, 0),), block=1).resolved((14, 14), 12) == (((13, 0),), 1)


WRONG = {
    "row": (Reference(points=((0, 0), (7, 3))), "--points 7,3 is no patch of a grid of 7 x 14: rows are 0 to 6"),
    "column": (Reference(points=((0, 14),)), "--points 0,14 .* columns 0 to 13"),
    "negative": (Reference(points=((-1, 0),)), "--points -1,0"),
    "no block": (Reference(block=0), "--block 0: the model has blocks 1 to 12"),
    "past the last": (Reference(block=13), "--block 13: the model has blocks 1 to 12"),
}


@pytest.mark.parametrize("reference, message", WRONG.values(), ids=list(WRONG))
def test_what_the_model_has_not_is_said(reference, message):
    with pytest.raises(ConfigError, match=message) as caught:
        reference.resolved((7, 14), 12)
    assert caught.value.exit_code == USAGE
