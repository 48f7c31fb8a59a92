"""What a frozen encoder gives, beside transformers' model of the same weights; every kind of file and pooling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BeitForImageClassification, BeitModel

from fastbeit.errors import USAGE, ConfigError, RunError
from fastbeit.evaluate.features import check_blocks, features_of
from fastbeit.evaluate.frozen import Frozen, ModelSource, open_frozen
from fastbeit.jobs.export import export
from helpers import dialects
from helpers.dialects import CLASS_NAMES, DEPTH, HALF, SIDE, VARIANTS, finetuned, finetuned_run, pretrained_run, save

CPU = torch.device("cpu")
TOKENS = (SIDE // dialects.PATCH) ** 2


def pixels(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor) -> Tensor:
    return (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def their_blocks(folder: Path, images: Tensor) -> list[Tensor]:
    """[B, S, D] after each block, by transformers."""
    model = BeitModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return list(model(normalised(images), output_hidden_states=True).hidden_states[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_those_of_transformers(tmp_path, variant):
    run = pretrained_run(tmp_path / "run", **VARIANTS[variant])
    export(run, "hf", tmp_path / "hf")
    theirs, images = their_blocks(tmp_path / "hf", pixels()), pixels()
    model = open_frozen(ModelSource(run), CPU).model
    kinds = {
        "cls": lambda x: x[:, 0],
        "mean": lambda x: x[:, 1:].mean(1),
        "concat": lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1),
        "patches": lambda x: x[:, 1:].reshape(len(x), 4, 4, -1),
    }
    for kind, of in kinds.items():
        found = features_of(model, images, [*range(DEPTH)], kind)  # pyright: ignore[reportArgumentType]
        for block in range(DEPTH):
            torch.testing.assert_close(found[block], of(theirs[block]), atol=1e-5, rtol=1e-5)
    # the first block alone is the same, and nothing after it is run
    model.blocks[1] = torch.nn.Identity()
    torch.testing.assert_close(features_of(model, images, [0], "cls")[0], theirs[0][:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fine_tuned_model_has_features_and_classes(tmp_path, pooling):
    run = finetuned_run(tmp_path / "run", finetuned(pooling), CLASS_NAMES, pooling)
    export(run, "hf", tmp_path / "hf")
    frozen = open_frozen(ModelSource(run), CPU)
    found = features_of(frozen.model, pixels(), [1], "mean")[1]
    torch.testing.assert_close(found, their_blocks(tmp_path / "hf", pixels())[1][:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    theirs = BeitForImageClassification.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    wanted = theirs(normalised(pixels())).logits
    torch.testing.assert_close(frozen.classifier().logits(pixels()), wanted, atol=1e-5, rtol=1e-5)
    assert frozen.classes == CLASS_NAMES and frozen.class_name(2) == CLASS_NAMES[2]


def opened(weights: dict[str, Tensor], path: Path, **said) -> Frozen:
    return open_frozen(ModelSource(save({"model": weights}, path), **said), CPU)


def test_files_of_others_are_models_too(tmp_path):
    """DeiT's and the like: their files do not say how images were normalised, and whoever asks has to."""
    weights = dialects.plain_vit()
    with pytest.raises(RunError, match="does not say what its images were normalised with; .*--mean") as caught:
        opened(weights, tmp_path / "vit.pth")
    assert caught.value.exit_code == USAGE
    frozen = opened(weights, tmp_path / "vit.pth", mean=HALF, std=HALF)
    cls = dialects.vit_features(weights, normalised(pixels()))[:, 0]
    wanted = torch.nn.functional.linear(cls, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(frozen.classifier().logits(pixels()), wanted, atol=1e-4, rtol=1e-4)
    assert frozen.classes is None and frozen.class_name(2) == "2"


def test_a_pre_trained_model_has_no_classes(tmp_path):
    with pytest.raises(RunError, match="has no head over classes: .*Fine-tune it") as caught:
        open_frozen(ModelSource(pretrained_run(tmp_path / "run")), CPU).classifier()
    assert caught.value.exit_code == USAGE


def test_blocks_that_there_are_not():
    assert check_blocks(None, 12) == [11] and check_blocks([8, 2, 8], 12) == [2, 8]
    for wrong in ([12], [-1], [0, 99]):
        with pytest.raises(ConfigError, match="is wanted of a model of 12, which are 0 to 11"):
            check_blocks(wrong, 12)
    with pytest.raises(ConfigError, match="no block is wanted"):
        check_blocks([], 12)


def test_a_patch_stands_in_its_place(tmp_path):
    """Of a grid that is not square: what changes in one patch of the image shows most in that place."""
    model = open_frozen(ModelSource(pretrained_run(tmp_path / "run")), CPU).model
    first = pixels(1)
    second = first.clone()
    second[:, 8:16, 24:32] = 0
    change = [features_of(model, one, [0], "patches")[0] for one in (first, second)]
    moved = (change[0] - change[1]).norm(dim=3)[0]
    assert np.unravel_index(int(moved.argmax()), (4, 4)) == (1, 3)
