"""timm loads what is exported and computes the same (`make test-timm`, in an environment of its own)."""

import json
from typing import Any

import pytest
import torch

from fastbeit.jobs.export import export
from fastbeit.weights.models import read_model
from fastbeit.weights.timm import arguments
from helpers import dialects
from helpers.dialects import SIDE, VARIANTS, finetuned, images, ours, plain_vit, pretrained, save
from helpers.weights import randomise

timm = pytest.importorskip("timm", reason="`make test-timm` has it")
pytestmark = pytest.mark.timm
TOLERANCE: dict[str, Any] = dict(atol=1e-5, rtol=1e-5)
SIZES: dict[str, Any] = dict(img_size=SIDE, patch_size=8, embed_dim=128, depth=2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifiers_give_the_same_logits(tmp_path, variant, pooling):
    path = save({"model": finetuned(pooling, **VARIANTS[variant])}, tmp_path / "x.pth")
    export(path, "timm", tmp_path / "out")
    found = read_model(path)
    wanted = ours(found)(images())
    name, args = arguments(found.tensors, found.model, found.image_size)
    file = str(tmp_path / "out/model.safetensors")
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    by_name = timm.create_model(name, checkpoint_path=file, **args)
    by_hand = timm.create_model(name, **args)
    by_hand.load_state_dict(timm.models.load_state_dict(file), strict=True)
    for model in (by_folder, by_name, by_hand):
        torch.testing.assert_close(model.eval()(images()), wanted, **TOLERANCE)
    config = timm.data.resolve_model_data_config(by_folder)
    assert tuple(config["mean"]) == (0.5, 0.5, 0.5) and tuple(config["input_size"]) == (3, SIDE, SIDE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pre_trained_encoder_gives_the_same_features(tmp_path, variant):
    model = pretrained(**VARIANTS[variant])
    export(save({"model": model.state_dict()}, tmp_path / "x.pth"), "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    features = theirs.forward_features((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    nothing_hidden = torch.zeros(2, 16, dtype=torch.bool)
    wanted = model.norm(model.encode(model.embed(pixels, nothing_hidden, model.mask_token.flatten())))
    torch.testing.assert_close(features, wanted, **TOLERANCE)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_papers_models_are_theirs_by_name(size):
    """Names and shapes, at 224: what is exported is what their model has, no more and no less."""
    width, depth, heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    fields: dict[str, Any] = dict(width=width, depth=depth, num_heads=heads, mlp_width=4 * width, patch_size=(16, 16))
    with torch.device("meta"):
        theirs = timm.create_model(f"beit_{size}_patch16_224", num_classes=dialects.CLASSES).state_dict()
        mine = dialects.without_index(finetuned(side=224, **fields))
    assert {name: one.shape for name, one in mine.items()} == {name: one.shape for name, one in theirs.items()}


def test_their_beit_is_read(tmp_path):
    theirs = timm.create_model("beit_base_patch16_224", **SIZES, num_heads=4)
    randomise(theirs)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    found = read_model(tmp_path)
    assert found.origin.dialect == "timm" and found.model.num_heads == 4 and found.mean == (0.5, 0.5, 0.5)
    torch.testing.assert_close(ours(found)(images()), theirs.eval()(images()), **TOLERANCE)


@pytest.mark.parametrize("name", ["deit_base_patch16_224", "vit_base_patch16_224"])
def test_their_deit_and_vit_are_read(tmp_path, name):
    theirs = timm.create_model(name, **SIZES, num_heads=2)
    randomise(theirs)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    found = read_model(tmp_path)
    mean = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["mean"]
    assert found.origin.dialect == "vit" and found.mean == tuple(mean)
    torch.testing.assert_close(ours(found)(images()), theirs.eval()(images()), **TOLERANCE)


def test_our_reference_of_a_plain_vit_is_theirs():
    sizes = SIZES | dict(num_classes=dialects.CLASSES, mlp_ratio=0.75)
    theirs = timm.create_model("vit_base_patch16_224", **sizes, num_heads=2)
    weights = plain_vit()
    theirs.load_state_dict(weights)
    wanted = theirs.eval().forward_features(images())
    torch.testing.assert_close(dialects.vit_features(weights, images()), wanted, **TOLERANCE)
