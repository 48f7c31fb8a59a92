"""Fine-tuning as its user runs it, on real photos: what it starts from, keeps, survives and refuses."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BeitForImageClassification

import fastbeit
from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.read import configure, load_config
from fastbeit.data.index.scan import build_index
from fastbeit.errors import ConfigError, RunError
from fastbeit.evaluate.classify import Classification
from fastbeit.jobs.export import export
from fastbeit.jobs.finetune import finetune
from fastbeit.jobs.pretrain import pretrain
from fastbeit.jobs.report import report
from fastbeit.train.checkpoint import load_model, load_optimizer, load_state, resolve_checkpoint
from helpers.ranks import deepspeed, launched, torchrun
from helpers.tiny import make_parts, photo_folder, run, write_config
from helpers.waiting import started, wait_until

CLASSES = "astronaut.png", "chelsea.png", "coffee.png"
SETTINGS = {
    "data.image_size": 32, "data.tail": "wrap", "data.num_workers": 0, "model.width": 32, "model.depth": 2,
    "model.num_heads": 2, "model.mlp_width": 64, "model.patch_size": 8, "model.drop_path": 0.2, "optim.batch_size": 8,
    "optim.steps": 4, "optim.warmup_steps": 1, "optim.lr": 1e-2, "log.every": 1, "log.val_every": 2,
}  # fmt: skip


def write_photos(folder: Path, num_images: int = 12, names: tuple[str, ...] = CLASSES) -> Path:
    """Class folders, each with crops of one photo."""
    for i in range(num_images):
        name, number = names[i % len(names)], i // len(names)
        path = folder / name.partition(".")[0] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.open(photo_folder() / name).convert("RGB").resize((96, 96))
        photo.crop((number % 4 * 8, number // 4 * 8, number % 4 * 8 + 64, number // 4 * 8 + 64)).save(path)
    return folder


COLOURS = "blue", "green", "red"
# nothing in the way of learning them: five seeds have a held-out loss of 0.05 to 0.06 after 20 steps, of ln 3 before
EASY = {
    "optim__steps": 20, "augment__num_ops": 0, "augment__erase": 0, "augment__mix_prob": 0, "augment__smoothing": 0,
    "model__drop_path": 0, "log__val_every": 20,
}  # fmt: skip


def write_colours(folder: Path, names: tuple[str, ...] = COLOURS) -> Path:
    """Class folders, each with images of one colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), name).save(folder / name / f"{number}.png")
    return folder


def listed(folder: Path, labels: list[int]) -> Path:
    """An index of a text list: an image of each of these numbers as its class."""
    lines = []
    for i, label in enumerate(labels):
        Image.effect_noise((40, 40), 20 + i).convert("RGB").save(folder / f"{i}.png")
        lines.append(f"{i}.png\t{label}")
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    return indexed(folder / "list.tsv")


def indexed(source: Path) -> Path:
    output = source.with_suffix(".idx")
    build_index(source, output, progress=False)
    return output


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return indexed(write_photos(tmp_path_factory.mktemp("labelled") / "photos"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    parts = {**make_parts(folder), "out": str(folder / "run"), "optim.steps": 2}
    config = load_config(write_config(folder / "tiny.yaml"), [f"{key}={value}" for key, value in parts.items()])
    assert pretrain(config, []) == 0
    return folder / "run"


@pytest.fixture
def tune(labelled, tmp_path):
    """Runs the job with overrides; gives its exit code, and what the log says: lines of steps, and of validations."""

    def tune(out: str = "run", **overrides):
        settings = {**SETTINGS, "data.index": labelled, "data.val_index": labelled, "out": tmp_path / out}
        settings |= {key.replace("__", "."): value for key, value in overrides.items()}
        config = configure(FinetuneConfig, [f"{key}={value}" for key, value in settings.items()])
        code = finetune(config, ["fastbeit", "finetune", "x.yaml"])
        return code, *read_log(tmp_path / out)

    return tune


def read_log(out: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "event" not in line}
    return steps, {line["step"]: line for line in lines if line.get("event") == "validation"}


def losses(log: dict[int, dict]) -> list[float]:
    return [log[step]["loss"] for step in sorted(log)]


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = resolve_checkpoint(a), resolve_checkpoint(b)
    torch.testing.assert_close(load_model(a), load_model(b), rtol=0, atol=0)
    torch.testing.assert_close(load_optimizer(a), load_optimizer(b), rtol=0, atol=0)


# ---- what it starts from, and learns


def test_it_begins_with_the_encoder_of_a_run_and_a_fresh_head(tune, pretrained, tmp_path, capfd):
    code, log, validations = tune(init=pretrained, optim__lr=0, optim__min_lr=0)
    assert code == 0 and sorted(log) == [1, 2, 3, 4] and sorted(validations) == [2, 4]
    before, after = (load_model(resolve_checkpoint(path)) for path in (pretrained, tmp_path / "run"))
    # nothing was learnt at a rate of 0
    for name in after:
        if name.startswith(("patch_embed", "cls_token", "blocks")) and "relative_position" not in name:
            assert torch.equal(after[name], before[name])
    shared = before["rel_pos_bias.relative_position_bias_table"]
    assert all(torch.equal(after[f"blocks.{i}.attn.relative_position_bias_table"], shared) for i in range(2))
    # a head that tells nothing apart: ln 3, and label smoothing changes nothing of even logits
    assert losses(log) == pytest.approx([1.0986] * 4, abs=1e-2)
    said = capfd.readouterr().err
    assert "12 images of 3 classes" in said and "images a class: 4 to 4" in said
    assert f"start: {pretrained} (fastbeit" in said and "copied to 2 blocks" in said
    state = load_state(resolve_checkpoint(tmp_path / "run"))
    assert state["classes"] == ["astronaut", "chelsea", "coffee"]


def test_it_learns_from_scratch(tune, tmp_path, capfd):
    index = indexed(write_colours(tmp_path / "colours"))
    code, log, validations = tune(data__index=index, data__val_index=index, **EASY)
    # six times the loss that was measured
    assert code == 0 and losses(log)[0] > 1 and validations[20]["loss"] < math.log(3) / 3
    assert validations[20]["top1"] == validations[20]["top5"] == 1
    assert "start: from scratch" in capfd.readouterr().err


CHOICES = {
    "cls": {"model__pooling": "cls"},
    "shared": {"model__relative_position": "shared"},
    "plain": {"model__relative_position": "none", "model__absolute_position": "true", "model__layer_scale": 0},
    "not-square": {"data__image_size": "[32, 48]"},
    "pillow": {"data__pipeline": "pillow"},
    "dali": {"data__pipeline": "dali"},
    "bf16": {"engine__precision": "bf16"},
    "mixup": {"augment__cutmix": 0},
    "cutmix": {"augment__mixup": 0},
    "bare": {"augment__num_ops": 0, "augment__erase": 0, "augment__mix_prob": 0, "augment__smoothing": 0},
    "repeated": {"augment__repeats": 2},
    "average": {"optim__ema_decay": 0.9},
    "recomputed": {"engine__checkpoint_blocks": "true"},
    "clipped": {"optim__clip_grad": 1.0, "optim__layer_decay": 1.0},
}


@pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)
def test_every_choice_trains(tune, overrides):
    code, log, validations = tune(**overrides, optim__steps=2)
    assert code == 0 and len(log) == 2 and validations[2]["loss"] == pytest.approx(math.log(3), abs=0.5)
    assert all(line["loss"] > 0 and line["skipped_steps"] == 0 for line in log.values())


def test_micro_batches_change_nothing_but_rounding(tune):
    _, whole, _ = tune("whole")
    _, parts, _ = tune("parts", optim__accumulate=4)
    # fp32 sums in another order, over 4 steps of AdamW
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4) and losses(parts) != losses(whole)


# ---- what it survives


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tune, tmp_path):
    """Order, crops, operations, boxes, mixes, drop path, averages and the best one: all go on."""
    options = dict(optim__steps=6, log__save_every=1, log__keep=9, optim__ema_decay=0.9, augment__repeats=2)
    _, whole, seen = tune("whole", **options)
    tune("parts", **options)
    checkpoints = tmp_path / "parts/checkpoints"
    for step in (4, 5, 6):
        (checkpoints / f"step-00000{step}").rename(tmp_path / f"gone-{step}")
    _, resumed, seen_again = tune("parts", **options)
    assert losses(resumed) == losses(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    figures = "top1", "top5", "loss"
    assert [[seen[s][f] for f in figures] for s in seen] == [[seen_again[s][f] for f in figures] for s in seen_again]
    best = [json.loads((tmp_path / out / "checkpoints/best.json").read_text()) for out in ("whole", "parts")]
    assert best[0] == best[1]


def test_a_killed_run_goes_on_where_it_was(tune, labelled, tmp_path):
    options = {"optim.steps": 30, "log.save_every": 3, "log.keep": 99, "log.val_every": 10}
    settings = {**SETTINGS, **options, "data.index": labelled, "out": tmp_path / "killed"}
    (tmp_path / "empty.yaml").write_text("data: {}\n")
    command = [sys.executable, "-m", "fastbeit", "finetune", str(tmp_path / "empty.yaml")]
    command += [f"{key}={value}" for key, value in settings.items()]
    checkpoints = tmp_path / "killed/checkpoints"
    with started(command, start_new_session=True) as process:
        wait_until(process, lambda: list(checkpoints.glob("step-*")))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    overrides = {key.replace(".", "__"): value for key, value in options.items()} | {"data__val_index": ""}
    assert tune("killed", **overrides)[0] == 0
    tune("whole", **overrides)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_the_best_checkpoint_stays(tune, tmp_path, monkeypatch, capfd):
    """Of equals the first; the newest stay as ever."""
    top1 = iter([0.1, 0.7, 0.3, 0.7, 0.2])
    monkeypatch.setattr(
        "fastbeit.jobs.finetune.classify", lambda *args: Classification(next(top1), 1.0, 1.0, num_images=12, num_bad=0)
    )
    tune(optim__steps=5, log__val_every=1, log__keep=1)
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000002", "step-000005"]
    assert resolve_checkpoint(tmp_path / "run/best").name == "step-000002"
    assert resolve_checkpoint(tmp_path / "run").name == "step-000005"
    assert f"best: {checkpoints / 'step-000002'}" in capfd.readouterr().out
    with pytest.raises(RunError, match="no best checkpoint"):
        (checkpoints / "best.json").unlink()
        resolve_checkpoint(tmp_path / "run/best")


@pytest.mark.parametrize("launcher", [torchrun, deepspeed], ids=["ddp", "zero-3"])
def test_two_ranks_compute_what_one_does(tune, labelled, pretrained, tmp_path, launcher):
    """Mixes are of a rank's own images, so without them. Of 13 held-out images one is bad; the others count once."""
    options = {"augment.mix_prob": 0, "init": pretrained, "engine.device": "cpu", "optim.ema_decay": 0.9}
    val_index = indexed(write_photos(tmp_path / "held_out", num_images=13))
    (tmp_path / "held_out/coffee/02.png").write_bytes(b"?")
    options["data.val_index"] = val_index
    settings = {**SETTINGS, **options, "data.index": labelled, "out": tmp_path / "two"}
    settings |= (
        {"engine.name": "deepspeed", "engine.zero_stage": 3} if launcher is deepspeed else {"engine.name": "ddp"}
    )
    (tmp_path / "empty.yaml").write_text("data: {}\n")
    launched(
        [*launcher(), "fastbeit", "finetune", str(tmp_path / "empty.yaml"), *(f"{k}={v}" for k, v in settings.items())]
    )
    _, one, seen = tune("one", **{key.replace(".", "__"): value for key, value in options.items()})
    two, seen_by_two = read_log(tmp_path / "two")
    # fp32 sums in another order, over 4 steps of AdamW
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert seen_by_two[4]["loss"] == pytest.approx(seen[4]["loss"], abs=1e-4)
    assert seen_by_two[4]["bad"] == seen[4]["bad"] == 1
    assert seen_by_two[4]["top1"] == pytest.approx(seen[4]["top1"], abs=1e-9)


# ---- classes of all kinds


def test_one_image_a_class_and_classes_without_any(tune, tmp_path, capfd):
    index = listed(tmp_path, [0, 2, 5])
    code, log, _ = tune(data__index=index, data__val_index=index)
    # even logits over six classes, of which three have images
    assert code == 0 and log[1]["loss"] == pytest.approx(math.log(6), abs=1e-2)
    said = capfd.readouterr().err
    assert "3 images of 6 classes" in said and "images a class: 1 to 1" in said
    assert "WARNING: 3 classes without an image, such as '1'" in said


def test_all_of_imagenet_22k(tune, tmp_path):
    index = listed(tmp_path, [0, 21_840, 7, 20_000])
    code, log, validations = tune(data__index=index, data__val_index=index, optim__steps=2, augment__smoothing=0)
    # even logits over all classes: ln 21,841
    assert code == 0 and log[1]["loss"] == pytest.approx(9.99, abs=0.02)
    assert validations[2]["loss"] == pytest.approx(9.99, abs=0.5)
    assert load_model(resolve_checkpoint(tmp_path / "run"))["head.weight"].shape == (21_841, 32)


def test_another_list_of_classes_is_refused_on_a_resume(tune, tmp_path):
    """Of the same images and numbers: the head's rows would get other names."""
    (tmp_path / "a").mkdir()
    index = listed(tmp_path / "a", [0, 1, 2])
    tune(data__index=index, data__val_index="")
    lines = (tmp_path / "a/list.tsv").read_text().splitlines()
    (tmp_path / "a/list.tsv").write_text("\n".join(line.replace("\t", "\tclass ") for line in lines) + "\n")
    build_index(tmp_path / "a/list.tsv", index, progress=False)
    with pytest.raises(RunError, match="another list of classes") as caught:
        tune(data__index=index, data__val_index="", optim__steps=6)
    assert caught.value.exit_code == 78


def test_other_held_out_images_judge_anew(tune, tmp_path, monkeypatch):
    """An easier set would have the best checkpoint for ever."""
    top1 = iter([0.9, 0.2])
    monkeypatch.setattr(
        "fastbeit.jobs.finetune.classify", lambda *args: Classification(next(top1), 1.0, 1.0, num_images=12, num_bad=0)
    )
    tune(optim__steps=2)
    assert resolve_checkpoint(tmp_path / "run/best").name == "step-000002"
    tune(optim__steps=4, data__val_index=indexed(write_photos(tmp_path / "others", num_images=6)))
    assert resolve_checkpoint(tmp_path / "run/best").name == "step-000004"


def test_held_out_classes_go_by_their_names(tune, tmp_path):
    """An index of fewer classes numbers them otherwise."""
    index, fewer = (indexed(write_colours(tmp_path / names[0], names)) for names in (COLOURS, COLOURS[1:]))
    code, _, validations = tune(data__index=index, data__val_index=fewer, **EASY)
    # numbers 0 and 1 of that index are classes 1 and 2 of the model; by number all would be wrong
    assert code == 0 and validations[20]["top1"] == 1


# ---- what it refuses


def test_what_cannot_be_classified_is_refused_before_anything_is_written(tune, tmp_path):
    bare = write_photos(tmp_path / "bare")
    for path in sorted(bare.glob("*/*")):
        path.rename(bare / f"{path.parent.name}{path.name}")
    one = indexed(write_photos(tmp_path / "one", names=CLASSES[:1]))
    other = indexed(write_photos(tmp_path / "other", names=("rocket.jpg", "coffee.png")))
    for overrides, code, message in (
        ({"data__index": indexed(bare)}, 66, "12 of 12 images have no label"),
        ({"data__val_index": tmp_path / "bare.idx"}, 66, "12 of 12 images have no label"),
        ({"data__index": one, "data__val_index": ""}, 2, "of one class, 'astronaut'"),
        ({"data__val_index": other}, 2, "images are of 1 class that the model does not know, such as 'rocket'"),
        ({"data__index": ""}, 2, "data.index is not set; add data.index=PATH"),
        ({"data__index": "gone.idx"}, 66, "'gone.idx' does not exist; make it with `fastbeit index"),
        ({"init": "gone"}, 66, "init: 'gone' does not exist; wanted a run, a checkpoint, or weights"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            tune(**overrides)
        assert caught.value.exit_code == code, overrides
        assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit_say_what_to_change(tune, pretrained):
    with pytest.raises(ConfigError, match=r"36 is not a multiple of model.patch_size 8; try 32"):
        tune(data__image_size=36)
    with pytest.raises(RunError, match=r"model.width 32, here 64; set model.width=32"):
        tune(init=pretrained, model__width=64)
    with pytest.raises(RunError, match=r"model.depth 2, here 3; set model.depth=2"):
        tune(init=pretrained, model__depth=3)
    with pytest.raises(ConfigError, match="unknown key 'masking'"):
        configure(FinetuneConfig, ["masking.ratio=0.4"])


def test_a_config_of_pre_training_is_known_for_what_it_is(tmp_path):
    path = write_config(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match=r"tiny.yaml' is a config of `fastbeit pretrain` \(masking\)"):
        load_config(path, [], FinetuneConfig)
    for path in sorted((Path(__file__).parents[2] / "configs/finetune").glob("*.yaml")):
        with pytest.raises(ConfigError, match=r"is a config of `fastbeit finetune` \(.*optim.layer_decay"):
            load_config(path, [])
    with pytest.raises(ConfigError, match="'beit_small' is a config of `fastbeit pretrain`, not of this verb"):
        load_config("beit_small", [], FinetuneConfig)


def test_a_fine_tuning_of_another_size_starts_from_one(tune, tmp_path, capfd):
    """224, then 384: tables grow; the head is taken along."""
    tune("small")
    tune("large", init=tmp_path / "small", data__image_size=48, optim__steps=1, optim__lr=0, optim__min_lr=0)
    before, after = (load_model(resolve_checkpoint(tmp_path / out)) for out in ("small", "large"))
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert torch.equal(before["fc_norm.weight"], after["fc_norm.weight"])
    assert after["blocks.0.attn.relative_position_bias_table"].shape == (11 * 11 + 3, 2)
    assert "positions of 4x4 patches, resized to 6x6" in capfd.readouterr().err


def test_what_it_makes_is_asked_judged_and_exported(labelled, pretrained, tmp_path, capfd):
    """From a folder, as in a notebook; then by every verb that takes a run."""
    photos = labelled.with_suffix("")
    settings = {**SETTINGS, "data.val_index": labelled, "init": pretrained, "optim.ema_decay": 0.5, "optim.steps": 3}
    (tmp_path / "empty.yaml").write_text("data: {}\n")
    out = fastbeit.finetune(tmp_path / "empty.yaml", {**settings, "data.index": photos}, out=tmp_path / "run")
    assert out == tmp_path / "run" and (out / "indices/train.idx").is_file()
    model = fastbeit.load(out)
    assert model.classes == ["astronaut", "chelsea", "coffee"]
    paths = sorted(photos.glob("*/*.png"))
    found = model.predict(paths, top=1)
    _, validations = read_log(out)
    # the averaged weights are what was validated, and what is asked
    right = [one[0].name == path.parent.name for one, path in zip(found, paths, strict=True)]
    assert sum(right) / len(right) == pytest.approx(validations[3]["top1"])
    best = fastbeit.load(out / "best")
    assert best.classes == model.classes

    assert report(out, None, 16) == 0
    assert "12 held-out images" in capfd.readouterr().out
    assert json.loads((out / "report/report.json").read_text())["figures"]["top1"] == validations[3]["top1"]
    export(out, "hf", tmp_path / "hf")
    theirs = BeitForImageClassification.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    assert theirs.config.id2label == {0: "astronaut", 1: "chelsea", 2: "coffee"}
    card = (tmp_path / "hf/README.md").read_text()
    assert "3 classes" in card and "top1" in card and f"| init | {pretrained} |" in card and "augment.mixup" in card


def test_the_command(labelled, tmp_path):
    settings = [f"{key}={value}" for key, value in {**SETTINGS, "optim.steps": 1}.items()]
    (tmp_path / "empty.yaml").write_text("data: {}\n")
    done = run("finetune", str(tmp_path / "empty.yaml"), *settings, f"data.index={labelled}", f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "checkpoint: " in done.stdout and "best:" not in done.stdout
    assert "no held-out images: set data.val_index" in done.stderr
