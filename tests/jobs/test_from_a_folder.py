"""One command starts from a folder of images: what stands in the run directory, and how it goes on."""

import json
import os

import pytest
import yaml

from fastbeit.cli import main
from fastbeit.data.index.reader import open_index
from fastbeit.errors import RunError
from fastbeit.train.loop import train as train_loop
from helpers import photos, tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of photos, another one, and settings of a tiny run."""
    folder = tmp_path_factory.mktemp("folder")
    tiny.make_photos(folder / "photos")
    tiny.make_photos(folder / "held_out", 4)
    tiny.make_tokenizer(folder / "dvae", seed=0)
    return folder, str(tiny.write_config(folder / "tiny.yaml"))


@pytest.fixture
def pretrain(parts, tmp_path, capfd):
    folder, config = parts

    def pretrain(*settings: str, code: int = 0) -> str:
        """What is said on stderr."""
        found = [f"out={tmp_path / 'run'}", f"data.index={folder / 'photos'}", f"tokenizer.path={folder / 'dvae'}"]
        assert main(["pretrain", config, *found, "optim.steps=2", *settings]) == code
        return capfd.readouterr().err

    return pretrain


def test_a_run_starts_from_folders_goes_on_and_is_repeated(parts, pretrain, tmp_path):
    folder, run = parts[0], tmp_path / "run"
    held_out = f"data.val_index={folder / 'held_out'}"
    said = pretrain(held_out)
    assert f"images: '{run}/indices/train.idx' was made of '{folder}/photos': 12 images, 0 files skipped" in said
    assert f"held-out images: '{run}/indices/val.idx' was made of '{folder}/held_out': 4 images" in said
    saved = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (saved["index"], saved["val_index"]) == (f"{run}/indices/train.idx", f"{run}/indices/val.idx")
    # the same command again: the folder is not looked at
    os.rename(folder / "photos", folder / "moved")
    try:
        assert f"made of '{folder}/photos' when the run began" in pretrain(held_out)
    finally:
        os.rename(folder / "moved", folder / "photos")
    assert "was begun with the images of" in pretrain(f"data.index={folder / 'held_out'}", code=2)
    # its config.yaml says all that another run needs
    again = tmp_path / "again"
    assert main(["pretrain", str(run / "config.yaml"), f"out={again}"]) == 0
    first, second = ((out / "log.jsonl").read_text().splitlines() for out in (run, again))
    losses = [[line["loss"] for line in map(json.loads, lines) if "loss" in line] for lines in (first, second)]
    assert losses[0] and losses[0] == losses[1] and not (again / "indices").exists()


def test_a_start_that_is_refused_after_the_folder_was_indexed_leaves_nothing(pretrain, tmp_path):
    said = pretrain("optim.batch_size=64", "data.tail=drop", code=2)
    assert "optim.batch_size" in said and not (tmp_path / "run").exists()


def test_a_run_that_fails_later_keeps_its_index(pretrain, tmp_path, monkeypatch):
    def fail(*args):
        train_loop(*args)
        raise RunError("the disk is lost", 1)

    monkeypatch.setattr("fastbeit.jobs.pretrain.train", fail)
    pretrain(code=1)
    assert len(open_index(tmp_path / "run/indices/train.idx")) == 12


def test_a_kill_while_the_folder_is_indexed_leaves_a_directory_that_is_taken_up(pretrain, tmp_path):
    (tmp_path / "run/indices").mkdir(parents=True)
    (tmp_path / "run/indices/train.idx.source").write_text("/another")
    (tmp_path / "run/indices/.train.idx.part").write_bytes(b"half")
    pretrain()
    assert sorted(os.listdir(tmp_path / "run/indices")) == ["train.idx", "train.idx.source"]


def test_a_tokenizer_and_its_tokens_are_made_of_folders(parts, tmp_path, capfd):
    folder, config = parts
    settings = "model.n_hid=8 model.n_init=8 model.vocab_size=16 model.group_count=2 data.image_size=16 optim.steps=1"
    settings += " optim.batch_size=4 data.num_workers=0"
    dvae, source = tmp_path / "dvae", str(folder / "photos")
    train = ["tokenizer", "train", "--data", source, "--val", str(folder / "held_out"), "-o", str(dvae)]
    assert main([*train, *settings.split()]) == 0
    assert sorted(os.listdir(dvae / "indices")) == ["train.idx", "train.idx.source", "val.idx", "val.idx.source"]
    tokens = [f"data.index={source}", "data.num_crops=1", f"data.tokens={tmp_path / 'tokens'}"]
    tokens.append(f"tokenizer.path={folder / 'dvae'}")
    assert main(["tokenize", config, *tokens]) == 0
    assert main(["tokenize", config, *tokens, "data.val_index=nowhere"]) == 0
    said = capfd.readouterr().out
    assert f"made of '{source}': 12 images" in said and f"made of '{source}' when the run began" in said
    # a run lists the folder again, and finds the same images
    assert main(["pretrain", config, f"out={tmp_path / 'run'}", *tokens, "optim.steps=1"]) == 0
    # tokens that would not be made leave no index
    assert main(["tokenize", config, *tokens[:-1], "tokenizer.path=nowhere", f"data.tokens={tmp_path / 'none'}"]) == 66
    assert not (tmp_path / "none").exists()
    # another source is no other way to go on
    assert main(["tokenize", config, *tokens, f"data.index={folder / 'held_out'}"]) == 2
    assert "was begun with the images of" in capfd.readouterr().err


def test_verbs_without_a_directory_leave_no_index(parts, tmp_path, capfd, monkeypatch):
    folder, config = parts
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source, sheet = str(folder / "photos"), tmp_path / "sheet.png"
    shown = ["data", "show", config, f"data.index={source}", f"tokenizer.path={folder / 'dvae'}", "--images", "1"]
    assert main([*shown, "-o", str(sheet)]) == 0 and sheet.exists()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "noisy.jpg").write_bytes(photos.mid_corrupt_jpeg())
    capfd.readouterr()
    assert main(["index", "check", source, "--workers", "0"]) == 0
    assert main(["index", "check", str(bad), "--workers", "0"]) == 65
    said = capfd.readouterr().out
    assert "12 images decoded" in said and f"'{bad}/noisy.jpg': corrupt JPEG" in said
    assert "1 are bad, repair or remove them" in said
    assert sorted(os.listdir(tmp_path)) == ["bad", "sheet.png"] and os.listdir(bad) == ["noisy.jpg"]
