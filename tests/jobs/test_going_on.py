"""A run is extended, begun from other weights, and looked at after its parts were moved."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastbeit.cli import main
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.data.index.scan import build_index
from fastbeit.errors import RunError
from fastbeit.evaluate.finished_run import Moved, open_run
from fastbeit.jobs.pretrain import Pretraining
from fastbeit.train.checkpoint import load_model, load_state, resolve_checkpoint
from fastbeit.train.settings import FREE_FIELDS, FREE_SECTIONS
from helpers import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {**tiny.make_parts(folder), "config": str(tiny.write_config(folder / "tiny.yaml"))}


@pytest.fixture
def pretrain(parts, tmp_path, capfd):
    def pretrain(*settings: str, out: str = "run", code: int = 0) -> str:
        """What is said on stderr."""
        found = [f"{key}={value}" for key, value in parts.items() if key != "config"]
        assert main(["pretrain", parts["config"], *found, f"out={tmp_path / out}", *settings]) == code
        return capfd.readouterr().err

    return pretrain


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_finished_run_is_extended_and_the_jump_of_the_learning_rate_is_said(pretrain, tmp_path):
    pretrain("optim.steps=4")
    (last,) = (line["lr"] for line in records(tmp_path / "run") if line["step"] == 4 and "lr" in line)
    said = pretrain("optim.steps=7")
    assert "other than in the part up to step 4: optim.steps was 4, now 7" in said
    jump = re.search(
        r"schedule: of 7 steps from here on, up to step 4 of 4: .* goes from (\S+) to (\S+), and falls", said
    )
    lr = {line["step"]: line["lr"] for line in records(tmp_path / "run") if "lr" in line}
    assert jump and (float(jump[1]), float(jump[2])) == (pytest.approx(last, rel=1e-2), pytest.approx(lr[5], rel=1e-2))
    assert sorted(lr) == [1, 2, 3, 4, 5, 6, 7] and lr[5] > lr[4] and lr[7] < lr[6] < lr[5]
    # once: afterwards it is the run's schedule
    assert "schedule:" not in pretrain("optim.steps=7")
    # fewer than planned, but not than taken, and by epochs too
    assert "optim.epochs was 800, now 5" in pretrain("optim.steps=0", "optim.epochs=5")
    steps = load_state(resolve_checkpoint(tmp_path / "run"))["step"]
    said = pretrain("optim.steps=3", code=2)
    assert f"step-{steps:06}' is of step {steps}, and optim.steps or optim.epochs now ask for 3: fewer" in said


def test_a_run_that_was_stopped_is_shortened(pretrain, tmp_path):
    pretrain("optim.steps=4", "log.save_every=2")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    said = pretrain("optim.steps=3", "log.save_every=2")
    assert "schedule: of 3 steps from here on, up to step 2 of 4" in said and "and falls" not in said
    assert resolve_checkpoint(tmp_path / "run").name == "step-000003"


def test_a_tokenizers_training_is_extended(parts, tmp_path, capfd):
    settings = "model.n_hid=8 model.n_init=8 model.vocab_size=16 model.group_count=2 data.image_size=16"
    settings += " optim.batch_size=4 data.num_workers=0 optim.steps="
    train = ["tokenizer", "train", "--data", parts["data.index"], "-o", str(tmp_path / "dvae")]
    for steps in "2", "3":
        assert main([*train, *(settings + steps).split()]) == 0
    assert "schedule: of 3 steps from here on, up to step 2 of 2" in capfd.readouterr().err
    assert json.loads((tmp_path / "dvae/dvae.json").read_text())["origin"]["steps"] == 3


def test_a_checkpoint_of_before_there_were_schedules_is_gone_on_from(pretrain, tmp_path):
    pretrain("optim.steps=2")
    last = resolve_checkpoint(tmp_path / "run")
    assert load_state(last)["schedule"] == [2, 2]
    tiny.rewrite_state(last, schedule=None)
    said = pretrain("optim.steps=3")
    assert "optim.steps was 2, now 3" in said and "schedule:" not in said
    assert resolve_checkpoint(tmp_path / "run").name == "step-000003"


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The weights that fresh runs start with."""
    found, start = [], Pretraining.start

    def noted(self, model, stop):
        start(self, model, stop)
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr(Pretraining, "start", noted)
    return found


def test_a_run_starts_from_another_ones_weights_and_not_when_it_goes_on(pretrain, tmp_path, started):
    pretrain("optim.steps=1", "seed=1", out="first")
    weights = load_model(resolve_checkpoint(tmp_path / "first"))
    init = f"init={tmp_path / 'first'}"
    assert f"start: {tmp_path / 'first'} (fastbeit, " in pretrain("optim.steps=1", init, out="second")
    assert len(started) == 2 and all(torch.equal(started[1][name], weights[name]) for name in weights)
    shutil.rmtree(tmp_path / "first")
    said = pretrain("optim.steps=2", init, out="second")
    assert "is not read: the run goes on from its own checkpoint" in said and len(started) == 2
    pretrain("optim.steps=2", out="second")
    assert "init: '" in pretrain("optim.steps=1", init, out="third", code=66) and not (tmp_path / "third").exists()


def test_another_size_is_resized_another_vocabulary_starts_anew_another_model_is_refused(
    pretrain, parts, tmp_path, started
):
    pretrain("optim.steps=1", "seed=1", out="first")
    weights = load_model(resolve_checkpoint(tmp_path / "first"))
    alone = tmp_path / "weights.safetensors"
    weights["lm_head.weight"], weights["lm_head.bias"] = torch.ones(7, 32), torch.ones(7)
    save_file(weights, alone)
    larger = "data.image_size=48", f"init={alone}", "optim.steps=1"
    said = pretrain(*larger, out="second")
    assert "start: positions of 4x4 patches, resized to 6x6" in said
    assert "start: lm_head of the file left out: it has 7 outputs, and 32 are wanted" in said
    assert "start: anew, for the file has none that fits: lm_head.weight, lm_head.bias" in said
    begun, kind = started[1], "blocks.0.mlp.fc1.weight"
    assert torch.equal(begun[kind], weights[kind]) and begun["lm_head.weight"].std() > 0
    table = "rel_pos_bias.relative_position_bias_table"
    assert len(weights[table]) == 7 * 7 + 3 and len(begun[table]) == 11 * 11 + 3
    said = pretrain("model.width=64", f"init={alone}", out="third", code=2)
    assert "model.width 32, here 64" in said and not (tmp_path / "third").exists()


def test_the_documents_list_of_settings_that_may_change_is_the_one_that_is_used():
    text = (ROOT / "docs/distributed.md").read_text()
    table = re.search(r"<!-- free: .*?-->(.*?)<!-- end -->", text, re.S)
    assert table
    listed = [key for row in table[1].strip().splitlines()[2:] for key in re.findall(r"`(.+?)`", row.split("|")[1])]
    fields = [f"{section}.{field}" for section, fields in FREE_FIELDS.items() for field in fields]
    assert sorted(listed) == sorted([*FREE_SECTIONS, *fields])
    known = configure(Config, []).model_dump()
    assert all(key in known if "." not in key else key.split(".")[1] in known[key.split(".")[0]] for key in listed)


@pytest.fixture(scope="module")
def cached(parts, tmp_path_factory) -> Path:
    """A run from stored tokens in a folder with all that it is made of; not to be changed."""
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(parts["tokenizer.path"], folder / "dvae")
    tiny.make_photos(folder / "photos", 8)
    build_index(folder / "photos", folder / "images.idx")
    data = [f"data.index={folder / 'images.idx'}", "data.num_crops=1", f"data.tokens={folder / 'tokens'}"]
    assert main(["tokenize", parts["config"], *data, f"tokenizer.path={folder / 'dvae'}"]) == 0
    assert main(["pretrain", parts["config"], *data, "optim.steps=1", f"out={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def copied(cached, tmp_path) -> Path:
    """A copy of the run alone, so that nothing is where its settings say but what is absolute."""
    shutil.copytree(cached / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_from_stored_tokens_remembers_its_tokenizer(cached, tmp_path):
    run = open_run(cached / "run")
    assert run.config.tokenizer.path == "" and run.tokenizer
    assert run.tokenizer.fingerprint == run.state["tokenizer"]
    card = json.loads((cached / "tokens/tokens.json").read_text())
    assert card["tokenizer_path"] == run.state["tokenizer_path"] == str(cached / "dvae")


def test_what_was_moved_is_named(cached, copied, tmp_path):
    for name in "dvae", "images.idx", "photos":
        (cached / name).rename(tmp_path / name)
    try:
        with pytest.raises(RunError, match="is gone; name its directory by --tokenizer DIR") as caught:
            open_run(copied)
        with pytest.raises(RunError, match="index '.*images.idx' is gone; name it, or its images, by --data") as lost:
            open_run(copied, Moved(tmp_path / "dvae"))
        assert (caught.value.exit_code, lost.value.exit_code) == (78, 66)
        page = ["report", str(copied), "--crops", "8", "--tokenizer", str(tmp_path / "dvae")]
        # images as a folder, whose index is the same; held-out ones that the run did not have
        assert main([*page, "--data", str(tmp_path / "photos"), "--val", str(tmp_path / "photos")]) == 0
        facts = json.loads((copied / "report/report.json").read_text())
        assert facts["figures"]["held_out"] is True
        other = tiny.make_tokenizer(tmp_path / "other", seed=5)
        with pytest.raises(RunError, match="other' is not the tokenizer that the run was trained with"):
            open_run(copied, Moved(other))
        build_index(tiny.make_photos(tmp_path / "fewer", 4), tmp_path / "fewer.idx")
        with pytest.raises(RunError, match="fewer.idx' is not the index that the run was trained on") as caught:
            open_run(copied, Moved(tmp_path / "dvae", tmp_path / "fewer.idx"))
        assert caught.value.exit_code == 78
    finally:
        for name in "dvae", "images.idx", "photos":
            (tmp_path / name).rename(cached / name)


def test_a_run_of_a_folder_is_moved_whole(pretrain, parts, tmp_path):
    photos = Path(parts["data.index"]).with_name("photos")
    pretrain(f"data.index={photos}", "optim.steps=1")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_run(tmp_path / "moved").index.location == tmp_path / "moved/indices/train.idx"
