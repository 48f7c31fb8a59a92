"""The command as its user types it."""

import subprocess
import sys

import pytest

from fastbeit import __version__
from fastbeit.cli import main
from fastbeit.plural import counted
from helpers.tiny import make_photos, run


@pytest.mark.parametrize("args, text", [(["--help"], "fastbeit pretrain CONFIG"), (["--version"], __version__)])
def test_help_and_version_come_without_torch(args, text):
    code = f"import sys\nfrom fastbeit.cli import main\nmain({args})\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert text in done.stdout


def test_the_help_of_pretrain_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for shown in ("--optim.lr", "0.0015", "--masking.num_masked", "75", "--model.layer_scale", "pixels"):
        assert shown in text


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, ""),
        (["pretian"], 2, "no verb 'pretian'; did you mean pretrain? There are demo, index"),
        (["train"], 2, "did you mean tokenizer train or pretrain?"),
        (["fetch"], 2, "did you mean tokenizer fetch?"),
        (["zebra"], 2, "no verb 'zebra'. There are demo"),
        (["pretrain"], 2, "CONFIG is wanted: a YAML file, or one that comes with fastbeit (beit_base_in1k, "),
        (["data", "show", "-o", "x.png"], 2, "CONFIG is wanted"),
        (["plan", "--gpus", "8", "--gpu", "h100", "seed=1"], 2, "CONFIG is wanted"),
        (["tokenize", "data.num_crops=8"], 2, "CONFIG is wanted"),
        (["pretrain", "train.idx"], 2, "'train.idx' is no config, but an index; it goes into data.index=train.idx"),
        (["pretrain", "photos.tar"], 2, "'photos.tar' is no config, but of images; it goes into data.index=photos.tar"),
        (["pretrain", "encoder.pkl"], 2, "fastbeit tokenizer import encoder.pkl -o DIR"),
        (
            ["pretrain", "."],
            2,
            "'.' is a directory, and a config is a YAML file; a folder of images goes into data.index=.",
        ),
        (
            ["pretrain", "demo", "out=r", "data.index=nope"],
            66,
            "data.index: 'nope' does not exist; wanted an index, or a ",
        ),
        (["data", "show", "demo", "data.index=nope"], 66, "'nope' does not exist; an index is made of a folder"),
        (["index", "check", "nope"], 66, "'nope' does not exist; an index is made of a folder"),
        (["tokenizer", "train", "--data", "nope", "-o", "dvae"], 66, "'nope' does not exist; an index is made of"),
        (["pretrain", "beit_bsae_in1k"], 2, "did you mean beit_base_in1k?"),
        (["pretrain", "demo", "seed", "3"], 2, "'demo' is taken for CONFIG, and no setting is 'seed', '3'"),
        (["pretrain", "out=r", "nowhere.yaml"], 2, "no config file 'nowhere.yaml'"),
        (["pretrain", "demo", "out=r"], 2, "data.index is not set; add data.index=PATH"),
        (["tokenizer", "import", "nope", "-o", "dvae"], 66, "'nope' does not exist"),
        (["report", "nope"], 2, "'nope' is no run directory"),
        (["tokenize", "--info", "nope"], 66, "'nope' does not exist"),
        (["shard", "nope", "-o", "shards"], 66, "'nope' does not exist"),
        (["index", "check", "nope.idx"], 66, "no index 'nope.idx'"),
        (["pretrain", "nowhere.yaml"], 2, "no config file 'nowhere.yaml'"),
        (["--local_rank=0", "pretrain", "nowhere.yaml"], 2, "no config file"),
        (["index", "nowhere", "-o", "x.idx"], 66, "'nowhere' does not exist"),
        (["tokenizer", "train", "--data", "nowhere.idx", "-o", "dvae"], 66, "no index 'nowhere.idx'"),
        (["tokenizer", "train", "--data", "x", "-o", "dvae", "optim.stepz=3"], 2, "did you mean 'optim.steps'?"),
    ],
    ids=str,
)
def test_a_mistake_ends_in_one_line_and_an_exit_code(args, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") <= 1 and "Traceback" not in stderr


@pytest.mark.parametrize(
    "number, noun, said", [(1, "image", "1 image"), (0, "class", "0 classes"), (2000, "file", "2,000 files")]
)
def test_a_number_has_its_noun(number, noun, said):
    assert counted(number, noun) == said


def settings_of(command: list[str], monkeypatch) -> list:
    """The configurations that a command hands to its job."""
    given = []
    for job in ("pretrain.pretrain", "tokenize.tokenize", "show.show", "plan.plan", "doctor.doctor"):
        monkeypatch.setattr(f"fastbeit.jobs.{job}", lambda config, *_, **__: given.append(config) or 0)
    monkeypatch.setattr(
        "fastbeit.jobs.train_tokenizer.train_tokenizer", lambda config, *_, **__: given.append(config) or 0
    )
    monkeypatch.setattr("fastbeit.jobs.demo.run_demo", lambda *given_: given.append(sorted(given_[2])) or 0)
    assert main(command) == 0
    return given


VERBS = {
    "pretrain": ["pretrain", "demo"],
    "tokenize": ["tokenize", "demo"],
    "show": ["data", "show", "demo", "-o", "x=y.png"],
    "plan": ["plan", "demo", "--gpus", "1", "--gpu=h100"],
    "doctor": ["doctor", "demo", "--json", "a=b"],
    "tokenizer": ["tokenizer", "train", "--data", "a=b", "-o", "c"],
    "demo": ["demo", "--out", "a=b"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_settings_are_read_alike_in_every_verb_and_in_any_order(verb, monkeypatch):
    num_words = 2 if VERBS[verb][1] in ("show", "train") else 1
    words, more = VERBS[verb][:num_words], VERBS[verb][num_words:]
    forms = [
        [*words, *more, "optim.lr=0.25", "seed=3"],
        [*words, "optim.lr=0.25", *more, "--seed", "3"],
        [*words, "--optim.lr", "0.25", "--seed=3", *more],
    ]
    found = [settings_of(form, monkeypatch) for form in forms]
    assert found[0] == found[1] == found[2] and len(found[0]) == 1


def test_a_folder_is_indexed_and_what_is_no_image_is_listed(tmp_path):
    photos = make_photos(tmp_path / "photos", 3)
    (photos / "notes.jpg").write_text("<html>not found</html>")
    done = run("index", str(photos), "-o", str(tmp_path / "images.idx"))
    assert done.returncode == 0, done.stderr
    assert "3 images, 1 file skipped" in done.stdout
    assert "notes.jpg" in (tmp_path / "images.idx.skipped").read_text()


@pytest.mark.parametrize("names", [["empty.jpg"], []])
def test_a_folder_without_an_image_is_an_error(tmp_path, names, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    assert main(["index", str(folder), "-o", str(tmp_path / "images.idx")]) == 66
    assert "no image in" in capsys.readouterr().err
    assert not (tmp_path / "images.idx").exists()
