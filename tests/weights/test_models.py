"""Weights of every dialect, read: the same outputs, every name accounted for, what is wrong refused by name."""

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastbeit.cli import main
from fastbeit.config.sections import ModelConfig
from fastbeit.errors import CHECKPOINT_UNUSABLE, DATA_MISSING, USAGE, RunError, WeightsError
from fastbeit.train.checkpoint import save_checkpoint
from fastbeit.weights import own
from fastbeit.weights.dialect import Hints
from fastbeit.weights.inference import check, infer, with_indices
from fastbeit.weights.models import ModelWeights, read_model
from fastbeit.weights.pickles import Record
from fastbeit.weights.torchfile import open_torch
from helpers import dialects
from helpers.dialects import (
    CLASS_NAMES,
    SMALL,
    VARIANTS,
    finetuned,
    finetuned_run,
    images,
    ours,
    plain_vit,
    pretrained,
    save,
    trainers_file,
)

IMAGENET = (0.485, 0.456, 0.406)


def safetensors(weights: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def accounted_for(found: ModelWeights, names: Any) -> None:
    """Every name is used or left out, and none both."""
    origin = found.origin
    assert origin.used.keys() | origin.left_out.keys() == set(names)
    assert not origin.used.keys() & origin.left_out.keys() and all(origin.left_out.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_released_pre_training_of_the_authors(tmp_path, variant, format):
    weights = pretrained(**VARIANTS[variant]).state_dict()
    found = read_model(save({"model": weights}, tmp_path / "beit.pth", format))
    same(found.tensors, weights)
    assert (found.origin.dialect, found.origin.wrapper, found.image_size) == ("unilm", "model", (32, 32))
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    accounted_for(found, weights)
    fields = SMALL | VARIANTS[variant]
    assert {key: found.model.model_dump()[key] for key in fields} == fields
    assert {key for key in found.origin.left_out if not key.endswith("relative_position_index")} == set()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fine_tuning_of_the_authors(tmp_path, pooling):
    weights = finetuned(pooling)
    found = read_model(save({"module": weights}, tmp_path / "beit.pth"))
    same(found.tensors, weights)
    assert found.model.relative_position == "per_block" and found.origin.dialect == "unilm"


@pytest.mark.parametrize("width, depth, heads", [(768, 12, 12), (1024, 24, 16)])
@pytest.mark.parametrize("side", [224, 384, 512])
def test_the_papers_models_follow_from_their_shapes(width, depth, heads, side):
    block = {
        "gamma_1": (width,), "gamma_2": (width,), "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.relative_position_bias_table": ((side // 8 - 1) ** 2 + 3, heads),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "norm2.weight": (width,),
        "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    shapes = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()} | {
        "cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (1000, width), "head.bias": (1000,),
    }  # fmt: skip
    model, image_size = infer(shapes, Hints())
    check(shapes, model, image_size)
    wanted = ModelConfig(width=width, depth=depth, num_heads=heads, mlp_width=4 * width, relative_position="per_block")
    assert model == wanted.model_copy(update={"layer_scale": model.layer_scale}) and image_size == (side, side)
    assert model.layer_scale == (0.1 if width == 768 else 1e-5)  # where training began, in the paper


def test_half_precision_is_read_as_float32(tmp_path):
    weights = dialects.without_index(finetuned())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = read_model(
            safetensors({name: one.to(dtype) for name, one in weights.items()}, tmp_path / "x.safetensors")
        )
        same(dialects.without_index(found.tensors), {name: one.to(dtype).float() for name, one in weights.items()})


def test_a_trainers_file_is_read_without_running_it(tmp_path):
    """Settings in an argparse.Namespace, learning rates of NumPy, moments, another copy of the weights."""
    weights = pretrained().state_dict()
    path = trainers_file(weights, tmp_path / "checkpoint-3.pth", model_ema=pretrained(seed=1).state_dict())
    found = read_model(path)
    same(found.tensors, weights)
    accounted_for(found, [*weights, "optimizer", "epoch", "scaler", "args", "model_ema"])
    assert found.origin.left_out["model_ema"] == "other weights; those under 'model' are taken"
    assert found.origin.left_out["args"] == "of the training: no weights"


def test_of_two_wrappers_the_first_of_the_authors_is_taken(tmp_path):
    first, second = pretrained(0).state_dict(), pretrained(1).state_dict()
    found = read_model(save({"module": second, "model": first}, tmp_path / "x.pth"))
    same(found.tensors, first)
    assert found.origin.left_out["module"].startswith("other weights")


class Harm:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


@pytest.mark.parametrize("place", ["model", "args", "beside"])
def test_a_file_that_would_run_something_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = {"model": dict(pretrained().state_dict())}
    if place == "model":
        content["model"]["x"] = Harm()
    elif place == "args":
        content["args"] = Namespace(x=Harm())
    else:
        content["x"] = Harm()
    path = save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"wants __builtin__.eval: refused, nothing was run"):
        read_model(path)
    assert not (tmp_path / "ran").exists()


def test_a_namespace_is_a_record_of_what_it_holds(tmp_path):
    value = open_torch(save({"args": Namespace(lr=0.5, name="x")}, tmp_path / "x.pth")).value
    assert isinstance(value["args"], Record) and value["args"].state == {"lr": 0.5, "name": "x"}


def test_an_encoder_inside_of_a_segmentation(tmp_path):
    weights = dialects.without_index(finetuned())
    encoder = {name: one for name, one in weights.items() if not name.startswith(("fc_norm.", "head."))}
    file = {f"backbone.{name}": one for name, one in encoder.items()}
    file |= {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1), "auxiliary_head.conv_seg.bias": torch.zeros(3)}
    file |= {"backbone.fpn1.0.weight": torch.zeros(2, 2)}
    found = read_model(save({"state_dict": file, "meta": {"epoch": 1}}, tmp_path / "x.pth"))
    same(dialects.without_index(found.tensors), encoder)
    accounted_for(found, [*file, "meta"])
    assert len(found.origin.left_out) == 4


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes(tmp_path, prefix):
    weights = finetuned()
    found = read_model(save({f"{prefix}{name}": one for name, one in weights.items()}, tmp_path / "x.pth"))
    same(found.tensors, weights)


def test_timms_file(tmp_path):
    weights = dialects.without_index(finetuned())
    config = {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors(weights, tmp_path / "model.safetensors")
    found = read_model(tmp_path)
    same(dialects.without_index(found.tensors), weights)
    assert (found.origin.dialect, found.mean) == ("timm", (0.1, 0.2, 0.3))


def test_a_bias_of_the_keys_may_be_dropped(tmp_path):
    """It adds q . b to all scores of a query, and a softmax does not see what all its arguments share."""
    weights = plain_vit()
    found = read_model(save({"model": weights}, tmp_path / "deit.pth"))
    assert found.origin.dialect == "vit" and found.mean is None and found.model.num_heads == 2
    accounted_for(found, weights)
    assert "which the softmax cancels" in found.origin.notes[0]
    wanted = vit_logits(weights)
    torch.testing.assert_close(ours(found)(images()), wanted, atol=1e-5, rtol=1e-5)
    # any other one gives the same; those of queries and values do not
    for rows, is_same in ((slice(128, 256), True), (slice(0, 128), False), (slice(256, 384), False)):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed["blocks.0.attn.qkv.bias"][rows] += torch.randn(128)
        assert torch.allclose(vit_logits(changed), wanted, atol=1e-5) == is_same


def vit_logits(weights: dict[str, Tensor]) -> Tensor:
    cls = dialects.vit_features(weights, images())[:, 0]
    return cls @ weights["head.weight"].T + weights["head.bias"]


def _prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def dino(encoder: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
    return {
        "student": _prefixed(other, "module.backbone.") | _prefixed(head, "module."),
        "teacher": _prefixed(encoder, "backbone.") | head,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 1,
        "args": Namespace(arch="vit_base"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def mocov3(encoder: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    head = {"head.0.weight": torch.zeros(4, 128), "head.1.num_batches_tracked": torch.tensor(3)}
    state = _prefixed(encoder | head, "module.base_encoder.") | _prefixed(other | head, "module.momentum_encoder.")
    return {"epoch": 1, "arch": "vit_base", "state_dict": state | {"module.predictor.0.weight": torch.zeros(4, 4)}}


def mae(encoder: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128)}
    decoder |= {"decoder_blocks.0.attn.qkv.bias": torch.zeros(192), "decoder_pos_embed": torch.zeros(1, 17, 64)}
    return {"model": encoder | decoder, "optimizer": {"state": {}}}


@pytest.mark.parametrize("write", [dino, mocov3, mae])
def test_the_papers_other_systems(tmp_path, write):
    encoder, other = plain_vit(0, num_classes=0), plain_vit(1, num_classes=0)
    content = write(encoder, other)
    found = read_model(save(content, tmp_path / "x.pth"))
    assert (found.origin.dialect, found.mean) == (write.__name__, IMAGENET)
    wrapper = found.origin.wrapper
    accounted_for(found, [*content[wrapper], *(content.keys() - {wrapper})])
    assert len(found.origin.used) == len(encoder)
    torch.testing.assert_close(ours(found)(images()), dialects.vit_features(encoder, images()), atol=1e-5, rtol=1e-5)
    # the encoder alone, as it is released
    alone = read_model(save(encoder, tmp_path / "alone.pth"))
    same(alone.tensors, found.tensors)
    assert alone.origin.dialect == "vit"


def test_moco_v3s_small_model_has_heads_of_32(tmp_path):
    weights = plain_vit(num_classes=0, width=384, depth=1)
    found = read_model(save(mocov3(weights, weights), tmp_path / "x.pth"))
    assert found.model.num_heads == 12
    assert read_model(save(weights, tmp_path / "x.pth")).model.num_heads == 6


def test_a_head_behind_a_layer_that_beit_has_not_is_left_out(tmp_path):
    layer = {"pre_logits.fc.weight": torch.zeros(128, 128), "pre_logits.fc.bias": torch.zeros(128)}
    found = read_model(save(plain_vit() | layer, tmp_path / "x.pth"))
    assert found.origin.left_out.keys() == {*layer, "head.weight", "head.bias"}


def less(name: str) -> Any:
    return lambda w: {key: value for key, value in w.items() if not key.startswith(name)}


def more(name: str, *shape: int) -> Any:
    return lambda w: w | {name: torch.zeros(shape)}


def mended(name: str, value: float) -> Any:
    return lambda w: w | {name: torch.full_like(w[name], value)}


BLOCK = "blocks.1."
BAD = {
    "a missing tensor": (less(f"{BLOCK}mlp.fc2.bias"), "has no blocks.1.mlp.fc2.bias, which .* not whole"),
    "a missing table": (
        less(f"{BLOCK}attn.relative_position_bias_table"),
        "has no blocks.1.attn.relative_pos",
    ),
    "half a norm": (less("fc_norm.bias"), "has fc_norm.weight and no fc_norm.bias"),
    "an unknown tensor": (more("cls_pt_layers.0.x", 3), r"has cls_pt_layers.0.x \[3\], which no BEiT has"),
    "an unknown part of a block": (more("blocks.0.attn.k_norm", 3), "has blocks.0.attn.k_norm"),
    "a gap in the blocks": (lambda w: {k.replace(BLOCK, "blocks.5."): v for k, v in w.items()}, "has no blocks.1."),
    "another width": (more("blocks.1.attn.proj.weight", 64, 64), r"\[64, 64\], and \[128, 128\] is wanted by a model"),
    "heads of another table": (more("blocks.1.attn.relative_position_bias_table", 52, 4), r"\[52, 4\], and \[52, 2\]"),
    "a table of no square": (
        lambda w: {k: v[:-1] if k.endswith("bias_table") else v for k, v in w.items()},
        "a table of 48 offsets, from which no square grid follows",
    ),
    "patches by the million": (
        lambda w: {k: torch.zeros(1999**2 + 3, 2) if k.endswith("bias_table") else v for k, v in w.items()},
        "images of 1000x1000 patches; from 1 to 4096",
    ),
    "a head of another width": (more("head.weight", 7, 64), r"has head.weight \[7, 64\], and \[7, 128\] is wanted"),
    "NaN": (mended("blocks.0.norm1.weight", float("nan")), "blocks.0.norm1.weight holds NaN or infinity"),
    "another order of offsets": (
        lambda w: {k: v + 1 if k.endswith("index") else v for k, v in w.items()},
        "another order of offsets",
    ),
    "whole numbers": (lambda w: w | {"cls_token": torch.zeros(1, 1, 128).long()}, "cls_token of torch.int64"),
    "no model": (lambda w: {"fc.weight": torch.zeros(2, 2)}, r"is of no known kind \(fc.weight, ...\)"),
    "two models": (lambda w: w | {f"a.{k}": v for k, v in w.items()}, "patch_embed.proj.weight under , a.; one model"),
    "another prefix": (lambda w: {f"encoder.{k}": v for k, v in w.items()}, "under encoder.; one model under a known"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=list(BAD))
def test_what_is_wrong_is_named(tmp_path, change, message):
    path = save({"model": change(finetuned())}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message) as err:
        read_model(path)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE and str(err.value).startswith(f"'{path}' ")


VIT_BAD = {
    "distilled": (more("dist_token", 1, 1, 128), "has a token and a head for distillation"),
    "no bias": (less("blocks.1.attn.qkv.bias"), "has no blocks.1.attn.qkv.bias"),
    "a bias of two": (more("blocks.0.attn.qkv.bias", 256), r"blocks.0.attn.qkv.bias \[256\]; q, k and v want a third"),
    "no square": (more("pos_embed", 1, 16, 128), "positions of 15 patches, from which no square grid follows"),
}


@pytest.mark.parametrize("change, message", VIT_BAD.values(), ids=list(VIT_BAD))
def test_what_is_wrong_with_a_plain_vit_is_named(tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        read_model(save(change(plain_vit()), tmp_path / "x.pth"))


def test_a_width_that_does_not_tell_the_heads(tmp_path):
    path = save(plain_vit(width=96), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="width 96, not a multiple of 64: say --num-heads"):
        read_model(path)
    assert read_model(path, num_heads=3).model.num_heads == 3
    with pytest.raises(WeightsError, match="width 96 is not a multiple of num_heads 5"):
        read_model(path, num_heads=5)
    with pytest.raises(WeightsError, match="has tables of 2 heads, and 4 were said"):
        read_model(save(finetuned(), path), num_heads=4)


def test_files_that_are_none(tmp_path):
    with pytest.raises(RunError, match="is not there") as err:
        read_model(tmp_path / "x.pth")
    assert err.value.exit_code == DATA_MISSING
    with pytest.raises(WeightsError, match="wants one of model.safetensors, pytorch_model.bin, and has none"):
        read_model(tmp_path)
    contents = {"x.pth": b"", "y.pth": b"<html>", "z.pth": pickle.dumps(3), "x.safetensors": b"12345678{}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="download it again|not run"):
            read_model(tmp_path / name)
    with pytest.raises(WeightsError, match="it holds epoch, args"):
        read_model(save({"epoch": 1, "args": Namespace()}, tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match="wants a state dict, found int"):
        read_model(save(3, tmp_path / "x.pth"))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="in parts"):
        read_model(tmp_path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damage_is_seen(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    weights = finetuned()
    _ = save({"model": weights}, path) if suffix == "pth" else safetensors(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="download it again"):
        read_model(path)


# what a later job relies on


def test_a_conversion_is_read_as_it_was(tmp_path, capsys):
    path = trainers_file(pretrained(absolute_position=True).state_dict(), tmp_path / "x.pth")
    assert main(["convert", str(path), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "unilm: x.pth, under 'model'" in said and "width 128, 2 blocks, 2 heads" in said
    assert "left out: optimizer, epoch, scaler, args: of the training: no weights" in said
    before, after = read_model(path), read_model(tmp_path / "out")
    same(after.tensors, before.tensors)
    assert (after.model, after.image_size, after.mean, after.origin) == (
        before.model, before.image_size, before.mean, before.origin,
    )  # fmt: skip
    same(read_model(tmp_path / "out/model.safetensors").tensors, before.tensors)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "model.json"}


def test_a_fine_tuning_names_its_classes_and_so_do_its_conversion_and_its_export(tmp_path):
    run = finetuned_run(tmp_path / "run", finetuned(), CLASS_NAMES, levels=[0, 4095])
    found = read_model(run)
    assert found.classes == CLASS_NAMES and found.levels == (0, 4095)
    assert main(["convert", str(run), "-o", str(tmp_path / "converted")]) == 0
    again = read_model(tmp_path / "converted")
    assert again.classes == CLASS_NAMES and again.levels == (0, 4095)
    assert main(["export", str(run), "--to", "hf", "-o", str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASS_NAMES)}
    assert config["label2id"] == {name: i for i, name in enumerate(CLASS_NAMES)}
    assert read_model(tmp_path / "hf").classes == CLASS_NAMES
    same(read_model(tmp_path / "hf").tensors, found.tensors)


def test_classes_that_nobody_names(tmp_path):
    """transformers writes LABEL_0 and so on; an encoder's file may name what its lost head was for."""
    run = finetuned_run(tmp_path / "run", finetuned())
    assert read_model(run).classes is None
    assert main(["export", str(run), "--to", "hf", "-o", str(tmp_path / "hf")]) == 0
    assert "LABEL_6" in (tmp_path / "hf/config.json").read_text() and read_model(tmp_path / "hf").classes is None
    path = tmp_path / "hf/config.json"
    for labels in ({"0": "cat", "1": "dog"}, {"zero": "cat"}, {"0": 3}, ["cat"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
        if labels == {"0": "cat", "1": "dog"}:
            with pytest.raises(WeightsError, match="names 2 classes, and has a head of 7: not one model"):
                read_model(tmp_path / "hf")
        else:
            assert read_model(tmp_path / "hf").classes is None


def test_names_of_classes_that_are_none_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="names 6 classes, and has a head of 7"):
        read_model(finetuned_run(tmp_path / "few", finetuned(), CLASS_NAMES[:-1]))
    with pytest.raises(WeightsError, match="state.json cannot be read: .*classes"):
        read_model(finetuned_run(tmp_path / "numbers", finetuned(), [1, 2]))


def test_where_a_training_kept_an_average_it_is_the_model(tmp_path):
    last, average = finetuned(seed=1), finetuned(seed=2)
    run = finetuned_run(
        tmp_path / "run", last | {f"average.{name}": tensor for name, tensor in average.items()}, CLASS_NAMES
    )
    found = read_model(run)
    same(found.tensors, average)
    accounted_for(found, [*last, *(f"average.{name}" for name in average)])
    assert found.origin.left_out["head.weight"] == "the last step's; their moving average is taken"
    assert found.origin.used["average.head.weight"] == "head.weight"


def test_a_conversion_that_was_damaged_is_refused(tmp_path):
    folder = tmp_path / "out"
    assert (
        main(["convert", str(save({"model": pretrained().state_dict()}, tmp_path / "x.pth")), "-o", str(folder)]) == 0
    )
    card = (folder / "model.json").read_text()
    (folder / "model.json").write_text(card.replace('"depth": 2', '"depth": 3'))
    with pytest.raises(WeightsError, match=r"has no blocks.2\."):
        read_model(folder)
    (folder / "model.json").write_text(card.replace('"format": 1', '"format": 2'))
    with pytest.raises(WeightsError, match="model.json that cannot be read: format: .*; convert again"):
        read_model(folder)
    (folder / "model.json").write_text(card)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="damaged or replaced; convert again"):
        read_model(folder)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """As that of a tokenizer's training."""
    state = {"config": {"model": {"n_hid": 8}, "data": {}}}
    save_checkpoint(tmp_path / "checkpoints", 3, {"x": torch.zeros(1)}, {}, state)
    with pytest.raises(WeightsError, match="of something else than a vision transformer"):
        read_model(tmp_path)


def test_a_folder_that_is_in_use_stays(tmp_path, capsys):
    path = save({"model": pretrained().state_dict()}, tmp_path / "x.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["convert", str(path), "-o", str(tmp_path / "out")]) == USAGE
    assert "is there and not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    path = save({"model": pretrained().state_dict()}, tmp_path / "x.pth")

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "Card", stopped)
    assert main(["convert", str(path), "-o", str(tmp_path / "out")]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_indices_are_those_of_the_modules():
    weights = finetuned()
    model = ModelConfig(**SMALL, relative_position="per_block")
    same(with_indices(dialects.without_index(weights), model, (32, 32)), weights)
