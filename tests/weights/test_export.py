"""Weights for the loaders of others: Hugging Face's and the authors' here, timm's and ONNX in `make test-timm`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitImageProcessor,
    BeitModel,
)

from fastbeit.cli import main
from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig
from fastbeit.errors import CHECKPOINT_UNUSABLE, USAGE
from fastbeit.files import whole_folder
from fastbeit.jobs.export import export
from fastbeit.model.attention import relative_position_index
from fastbeit.model.beit import Beit
from fastbeit.train.checkpoint import save_checkpoint
from fastbeit.weights import huggingface, onnx, timm, unilm
from fastbeit.weights.dialect import split
from fastbeit.weights.models import read_model
from helpers import dialects
from helpers.dialects import HALF, VARIANTS, WORDS, finetuned, images, ours, pretrained, save
from helpers.weights import randomise

TOLERANCE: dict[str, Any] = dict(atol=1e-5, rtol=1e-5)


def loaded(kind: Any, folder: Path) -> Any:
    """By their own loader, which has to find every tensor and to need no other."""
    model, found = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    return model.eval().requires_grad_(False)


def written(weights: dict[str, Tensor], tmp_path: Path, to: str = "hf") -> Path:
    export(save({"model": weights}, tmp_path / "x.pth"), to, tmp_path / to)
    return tmp_path / to


def hidden(batch: int = 2) -> Tensor:
    return torch.rand(batch, 16, generator=torch.Generator().manual_seed(2)) < 0.4


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_predicts_the_same_visual_words(tmp_path, variant):
    model = pretrained(**VARIANTS[variant])
    theirs = loaded(BeitForMaskedImageModeling, written(model.state_dict(), tmp_path))
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    wanted = model.logits(pixels, hidden())
    found = theirs((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, bool_masked_pos=hidden()).logits
    assert found.shape == (2, 16, WORDS)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    # the encoder alone: before the norm, which masked image modelling has beside its head
    encoder = BeitModel.from_pretrained(tmp_path / "hf", attn_implementation="eager", add_pooling_layer=False).eval()
    x = encoder((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, bool_masked_pos=hidden()).last_hidden_state
    torch.testing.assert_close(theirs.lm_head(theirs.layernorm(x[:, 1:])), wanted, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_gives_the_same_classes(tmp_path, variant, pooling):
    weights = finetuned(pooling, **VARIANTS[variant])
    folder = written(weights, tmp_path)
    theirs = loaded(BeitForImageClassification, folder)
    found = ours(read_model(tmp_path / "x.pth"))(images())
    torch.testing.assert_close(theirs(images()).logits, found, **TOLERANCE)
    # and back
    back = read_model(folder)
    assert back.origin.dialect == "huggingface" and not back.origin.left_out
    assert back.tensors.keys() == weights.keys()
    assert all(torch.equal(back.tensors[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", [BeitForMaskedImageModeling, BeitForImageClassification, BeitModel])
@pytest.mark.parametrize("layout", ["hub", "memory", "bin", "alone"])
@pytest.mark.parametrize("position", ["shared", "per_block"])
def test_hugging_faces_files_are_read(tmp_path, kind, layout, position):
    """Names of the hub, those in memory, a pickle, and an encoder whose names have no prefix."""
    torch.manual_seed(0)
    fields: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    fields |= dict(vocab_size=WORDS, num_labels=5, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    positions = {"shared": "use_shared_relative_position_bias", "per_block": "use_relative_position_bias"}[position]
    fields |= {"use_mask_token": True, positions: True}
    config = BeitConfig(**fields)
    theirs = kind(config).eval().requires_grad_(False)
    randomise(theirs)
    if layout == "hub":
        theirs.save_pretrained(tmp_path)
    else:
        config.save_pretrained(tmp_path)
        state = theirs.state_dict()
        if layout == "bin" and positions == "use_shared_relative_position_bias":
            # files of earlier versions hold it
            state["beit.encoder.relative_position_bias.relative_position_index"] = relative_position_index((4, 4))
        if layout == "alone":
            state = {name.removeprefix("beit."): tensor for name, tensor in state.items()}
        save(state, tmp_path / "pytorch_model.bin")
    found = read_model(tmp_path)
    assert found.origin.dialect == "huggingface" and found.model.num_heads == 4
    values = sum(one.numel() for name, one in found.tensors.items() if not name.endswith("_index"))
    assert values == sum(parameter.numel() for parameter in theirs.parameters())
    if kind is BeitForMaskedImageModeling:
        wanted = theirs(images(), bool_masked_pos=hidden()).logits
        torch.testing.assert_close(ours(found)(images(), hidden()), wanted, **TOLERANCE)
    elif kind is BeitForImageClassification:
        torch.testing.assert_close(ours(found)(images()), theirs(images()).logits, **TOLERANCE)


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_of_two_norms_that_after_the_pooling_is_taken(tmp_path, capsys, to):
    """A fine-tuning with mean pooling may have kept the norm of its pre-training, which it does not use."""
    kept = {"norm.weight": torch.randn(128), "norm.bias": torch.randn(128)}
    path = save({"model": finetuned() | kept}, tmp_path / "x.pth")
    assert main(["export", str(path), "--to", to, "-o", str(tmp_path / "out")]) == 0
    assert "left out, for it has no place there: norm.weight, norm.bias" in capsys.readouterr().out
    assert "Left out: norm.weight, norm.bias" in (tmp_path / "out/README.md").read_text()
    assert not read_model(tmp_path / "out").tensors.keys() & kept.keys()
    if to == "hf":
        found = ours(read_model(path))(images())
        torch.testing.assert_close(
            loaded(BeitForImageClassification, tmp_path / "out")(images()).logits, found, **TOLERANCE
        )


def test_both_layouts_are_told_apart_and_back():
    weights = split(pretrained().state_dict())
    for layout in ("hub", "memory"):
        names = {name: huggingface.to_theirs(name, layout) for name in weights}
        assert len(set(names.values())) == len(names)
        assert all(huggingface.to_ours(theirs) == name for name, theirs in names.items())
    assert huggingface.to_ours("beit.layers.0.attention.x") == "?beit.layers.0.attention.x"


CONFIGS = {
    "another model": ({"model_type": "vit"}, "model_type vit with gelu; BEiT with gelu is wanted"),
    "another activation": ({"hidden_act": "relu"}, "model_type beit with relu"),
    "another width": ({"hidden_size": 64}, "a config.json of hidden_size 64, and weights of 128: not one model"),
    "another depth": ({"num_hidden_layers": 12}, "num_hidden_layers 12, and weights of 2"),
    "other heads": ({"num_attention_heads": 4}, "tables of 2 heads, and 4 were said"),
    "another image size": ({"image_size": 64}, r"\[52, 2\], and \[228, 2\] is wanted"),
}


@pytest.mark.parametrize("change, message", CONFIGS.values(), ids=list(CONFIGS))
def test_a_config_of_another_model_is_refused(tmp_path, capsys, change, message):
    folder = written(finetuned(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert main(["convert", str(folder), "-o", str(tmp_path / "out")]) == CHECKPOINT_UNUSABLE
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_hugging_face_prepares_images_as_ours(tmp_path):
    folder = written(pretrained().state_dict(), tmp_path)
    processor = BeitImageProcessor.from_pretrained(folder)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    found = processor(pixels.numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found[0], (pixels.permute(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6, rtol=0)


def test_the_authors_file_holds_weights_alone(tmp_path):
    weights = pretrained().state_dict()
    folder = written(weights, tmp_path, "unilm")
    content = torch.load(folder / "model.pth", weights_only=True)
    assert content.keys() == {"model"} and content["model"].keys() == weights.keys()
    back = read_model(folder / "model.pth")
    assert all(torch.equal(back.tensors[name], weights[name]) for name in weights)


@pytest.mark.parametrize("write", [finetuned, lambda: pretrained().state_dict()], ids=["fine-tuned", "pre-trained"])
def test_timms_names_come_back(tmp_path, write):
    """What timm computes with them is tested where timm is: test_timm.py."""
    weights = write()
    back = read_model(written(weights, tmp_path, "timm"))
    wanted = dialects.without_index(timm.share_out(weights, 2))
    wanted = {name: one for name, one in wanted.items() if not name.startswith(("mask_token", "lm_head"))}
    assert back.origin.dialect == "timm" and dialects.without_index(back.tensors).keys() == wanted.keys()
    assert all(torch.equal(back.tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "fields, size, name, more",
    [
        ({}, 224, "beit_base_patch16_224", {}),
        ({}, 384, "beit_base_patch16_384", {}),
        ({"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096}, 512, "beit_large_patch16_512", {}),
        (
            {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0},
            224,
            "beit_base_patch16_224",
            {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": 0.0},
        ),
    ],
)
def test_the_papers_models_have_names_in_timm(fields, size, name, more):
    found, args = timm.arguments({"fc_norm.weight": torch.zeros(1)}, ModelConfig(**fields), (size, size))
    assert (found, args) == (name, {"num_classes": 0, "global_pool": "avg"} | more)


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_what_they_cannot_load_is_refused_by_name(tmp_path, capsys, to):
    model = pretrained()
    save_run(tmp_path / "run", model.state_dict(), image_size=[32, 48])
    assert main(["export", str(tmp_path / "run"), "--to", to, "-o", str(tmp_path / "out")]) == CHECKPOINT_UNUSABLE
    assert "is wanted by a model" in capsys.readouterr().err
    torch.manual_seed(0)
    wide = Beit(
        ModelConfig(**dialects.SMALL), image_size=(32, 48), num_outputs=5, mean=HALF, std=HALF, kernels=Kernels()
    )
    save_run(tmp_path / "wide", wide.state_dict(), image_size=[32, 48])
    assert main(["export", str(tmp_path / "wide"), "--to", to, "-o", str(tmp_path / "out")]) == CHECKPOINT_UNUSABLE
    said = capsys.readouterr().err
    assert "has images of [32, 48] and patches of [8, 8] pixels" in said and "export to" in said
    assert {file.name for file in tmp_path.iterdir()} == {"run", "wide"}


def save_run(folder: Path, weights: dict[str, Tensor], image_size: list[int] | None = None) -> Path:
    """A run that has been trained: config, checkpoint, log."""
    config = {
        "seed": 5,
        "objective": "tokens",
        "mask": "blockwise",
        "data": {"index": "/data/photos.idx", "image_size": image_size or [32, 32], "mean": HALF, "std": HALF},
        "tokenizer": {"path": "/data/dvae"},
        "model": dialects.SMALL,
        "optim": {"batch_size": 2048, "lr": 1.5e-3},
    }
    state = {"index": "1" * 64, "tokenizer": "2" * 64, "config": config}
    average = {f"average.{name}": tensor + 1 for name, tensor in weights.items()}
    save_checkpoint(folder / "checkpoints", 30, weights | average, {}, state)
    lines = [
        {"step": 20, "loss": 6.5, "step_ms": 100.0},
        {"step": 30, "loss": 6.25, "masked_accuracy": 0.125},
        {"step": 30, "event": "validation", "loss": 6.375},
        {"step": 40, "loss": 1.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("")
    return folder


def test_a_run_has_a_model_card(tmp_path):
    run = save_run(tmp_path / "run", pretrained().state_dict())
    for path, name in ((run, "a"), (run / "checkpoints/latest", "b"), (run / "checkpoints/step-000030", "c")):
        export(path, "hf", tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        for text in (
            'BeitForMaskedImageModeling.from_pretrained("FOLDER")',
            "| optim.batch_size | 2048 |",
            "| mask | blockwise |",
            f"photos.idx, fingerprint {'1' * 64}",
            f"dvae, sha256 {'2' * 64}",
            "| training, step 30: loss | 6.25 |",
            "| validation, step 30: loss | 6.375 |",
            "less [0.5, 0.5, 0.5], over [0.5, 0.5, 0.5]",
            "| images, patches | 32x32, 8x8 pixels |",
        ):
            assert text in card, text
        # neither where the user keeps things, nor what came after the checkpoint, nor how fast the machine was
        assert "/data" not in card and "1.0" not in card.split("## Figures")[1] and "step_ms" not in card
    found = read_model(run)
    assert found.origin.dialect == "fastbeit" and len(found.origin.left_out) == len(found.tensors) + 1


def test_weights_without_a_run_have_a_model_card(tmp_path):
    card = (written(dialects.plain_vit(), tmp_path, "unilm") / "README.md").read_text()
    assert "what they were normalised with is not known" in card and "a bias of the keys is dropped" in card
    assert "Recipe" not in card and "a classifier of 7 classes" in card


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("to, place", [("hf", huggingface), ("timm", timm), ("unilm", unilm)])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, capsys, error, to, place):
    path = save({"model": pretrained().state_dict()}, tmp_path / "x.pth")
    write = place.write

    def interrupted(*args: Any) -> None:
        write(*args)
        raise error

    monkeypatch.setattr(place, "write", interrupted)
    assert main(["export", str(path), "--to", to, "-o", str(tmp_path / "out")]) == (
        130 if error is KeyboardInterrupt else 74
    )
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
    # and the same again works
    monkeypatch.setattr(place, "write", write)
    assert main(["export", str(path), "--to", to, "-o", str(tmp_path / "out")]) == 0
    assert main(["export", str(path), "--to", to, "-o", str(tmp_path / "out")]) == USAGE


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/old").touch()
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert not list((tmp_path / "out").iterdir())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    path = save({"model": pretrained().state_dict()}, tmp_path / "x.pth")
    assert main(["export", str(path), "--to", "onnx", "-o", str(tmp_path / "out")]) == USAGE
    assert "--to onnx wants onnx and onnxscript; pip install 'fastbeit[export]'" in capsys.readouterr().err
