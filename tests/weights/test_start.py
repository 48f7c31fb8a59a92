"""A training's start from weights: what is made to fit, what starts anew, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.errors import ConfigError, WeightsError
from fastbeit.model.classify import Classifier
from fastbeit.weights import huggingface
from fastbeit.weights.start import Start, start_from
from helpers.dialects import CLASSES, HALF, SIDE, SMALL, finetuned, plain_vit, pretrained, without_index


def configured(fields: dict[str, Any]) -> ModelConfig:
    chosen: dict[str, Any] = SMALL | {"relative_position": "per_block"} | fields
    return ModelConfig(**chosen)


def classifier(side: int = SIDE, pooling: Any = "mean", num_classes: int = CLASSES, **fields: Any) -> Classifier:
    torch.manual_seed(1)
    config = configured(fields)
    return Classifier(
        config,
        image_size=(side, side),
        num_classes=num_classes,
        mean=HALF,
        std=HALF,
        kernels=Kernels(),
        pooling=pooling,
    )


def start(path: Path, model: Classifier, size: Size = (SIDE, SIDE), mean: Any = HALF, **fields: Any) -> Start:
    return start_from(path, model, configured(fields), size, mean=mean, std=HALF)


def written(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file({name: one.clone().contiguous() for name, one in weights.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_pre_training_computes_the_same_features_in_a_classifier(tmp_path):
    """The shared table is copied to each block, and nothing of the encoder is lost: equal to the bit."""
    beit, model = pretrained(), classifier()
    begun = start(written(tmp_path, beit.state_dict()), model)
    begun.load(model)
    images = torch.randint(256, (3, SIDE, SIDE, 3), dtype=torch.uint8)
    masked, nothing = torch.zeros(3, 16, dtype=torch.bool), torch.zeros(beit.cls_token.shape[2])
    with torch.no_grad():
        wanted = beit.encode(beit.embed(images, masked, nothing))
        tokens = model.patch_embed.proj(model.patch_embed.pixels(images))
        found = model.encode(torch.cat((model.cls_token.expand(3, 1, -1), tokens), dim=1))
    # the patches are embedded by another operator, whose sums round otherwise
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    said = "\n".join(begun.lines)
    assert "copied to 2 blocks" in said
    for name in ("mask_token", "lm_head", "norm"):
        assert f"{name} of the file left out" in said
    assert "anew, for the file has none that fits: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in said


def test_all_of_a_fine_tuning_is_taken_where_it_fits(tmp_path):
    weights, model = without_index(finetuned()), classifier()
    begun = start(written(tmp_path, weights), model)
    begun.load(model)
    found = model.state_dict()
    assert all(torch.equal(found[name], one) for name, one in weights.items())
    assert f"with the head, by number: the file does not name its {CLASSES} classes" in "\n".join(begun.lines)


def test_a_head_of_other_classes_starts_anew(tmp_path):
    model = classifier(num_classes=3)
    fresh = model.head.weight.clone()
    begun = start(written(tmp_path, without_index(finetuned())), model)
    begun.load(model)
    assert torch.equal(model.head.weight, fresh)
    assert f"head of the file left out: it has {CLASSES} outputs, and 3 are wanted" in "\n".join(begun.lines)


def test_a_head_of_as_many_classes_with_other_names_starts_anew(tmp_path):
    """`fastbeit.weights.own` knows names; of a file that names none the head is taken."""
    names = [str(i) for i in range(CLASSES)]
    model, folder = classifier(), tmp_path / "hf"
    folder.mkdir()
    weights = without_index(finetuned())
    huggingface.write(weights, configured({}), (SIDE, SIDE), HALF, HALF, names, folder)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {str(i): str(i) for i in range(CLASSES)}
    kinds = {}
    for kind, classes in {"same": names, "other": names[::-1]}.items():
        begun = start_from(folder, model, configured({}), (SIDE, SIDE), mean=HALF, std=HALF, classes=classes)
        kinds[kind] = "head.weight" in begun.tensors, "other names, or another order" in "\n".join(begun.lines)
    assert kinds == {"same": (True, False), "other": (False, True)}


def test_the_norm_of_the_cls_token_is_taken_with_it(tmp_path):
    beit, model = pretrained(), classifier(pooling="cls")
    start(written(tmp_path, beit.state_dict()), model).load(model)
    assert model.norm is not None and torch.equal(model.norm.weight, beit.norm.weight)


def test_tables_are_resized_for_larger_images(tmp_path):
    beit, model = pretrained(), classifier(side=48)
    begun = start(written(tmp_path, beit.state_dict()), model, (48, 48))
    begun.load(model)
    table = model.state_dict()["blocks.1.attn.relative_position_bias_table"]
    assert len(table) == 11 * 11 + 3
    assert beit.rel_pos_bias is not None
    old: Any = beit.rel_pos_bias.relative_position_bias_table
    assert torch.equal(table[-3:], old[-3:])
    # in the middle lie the same offsets
    torch.testing.assert_close(table[5 * 11 + 5], old[3 * 7 + 3], rtol=1e-5, atol=1e-5)
    assert "positions of 4x4 patches, resized to 6x6" in "\n".join(begun.lines)


def test_positions_of_a_vit_are_resized_too(tmp_path):
    plain: dict[str, Any] = {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0}
    model = classifier(side=48, **plain)
    begun = start(written(tmp_path, plain_vit()), model, (48, 48), **plain)
    begun.load(model)
    assert model.pos_embed is not None and model.pos_embed.shape[1] == 37
    assert "positions of 4x4 patches, resized to 6x6" in "\n".join(begun.lines)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"width": 64}, "model.width 128, here 64; set model.width=128"),
        ({"depth": 3}, "model.depth 2, here 3; set model.depth=2"),
        ({"patch_size": (16, 16)}, "model.patch_size [8,8], here [16,16]; set model.patch_size=[8,8]"),
        ({"layer_scale": 0.0}, "model.layer_scale 0.1, here 0; set model.layer_scale=0.1"),
        ({"absolute_position": True}, "model.absolute_position false, here true; set model.absolute_position=false"),
        (
            {"relative_position": "none"},
            "model.relative_position shared, here none; set model.relative_position=shared",
        ),
        ({"width": 64, "depth": 1}, "set model.width=128 model.depth=2"),
    ],
    ids=lambda one: "+".join(one) if isinstance(one, dict) else "",
)
def test_another_encoder_is_refused_with_the_settings_that_it_wants(tmp_path, fields, wanted):
    path = written(tmp_path, pretrained().state_dict())
    with pytest.raises(ConfigError, match=r"is of another encoder") as err:
        start(path, classifier(**fields), **fields)
    assert wanted in str(err.value)


def test_a_file_that_lacks_a_part_of_the_encoder_is_refused(tmp_path):
    weights = pretrained().state_dict()
    del weights["blocks.1.mlp.fc1.bias"]
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        start(written(tmp_path, weights), classifier())


def test_pixels_that_were_normalised_otherwise_are_said(tmp_path):
    from fastbeit.weights.dialect import IMAGENET_MEAN, IMAGENET_STD

    weights = {name.replace("head", "fc"): one for name, one in plain_vit(num_classes=0).items()}
    plain: dict[str, Any] = {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0}
    torch.save({"teacher": weights}, tmp_path / "dino.pth")
    begun = start(tmp_path / "dino.pth", classifier(**plain), **plain)
    (line,) = [line for line in begun.lines if "WARNING" in line]
    assert f"data.mean={list(IMAGENET_MEAN)} data.std={list(IMAGENET_STD)}" in line
