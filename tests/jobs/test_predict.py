"""`fastbeit predict`: a table, JSON, and how many are right."""

import json
import os
import signal

import pytest
from PIL import Image

import fastbeit
from fastbeit.cli import main
from fastbeit.errors import DATA_MISSING, USAGE
from fastbeit.model.classify import Classifier
from helpers import photos
from helpers.dialects import CLASS_NAMES, finetuned, finetuned_run, pretrained_run
from helpers.tiny import make_photos


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A fine-tuned run, and photos of two of its seven classes, one of them damaged."""
    folder = tmp_path_factory.mktemp("predict")
    finetuned_run(folder / "run", finetuned(), CLASS_NAMES)
    for row, number in ((5, 3), (1, 4)):
        make_photos(folder / "photos" / CLASS_NAMES[row], number)
    (folder / "photos" / CLASS_NAMES[1] / "01.jpg").write_bytes(photos.mid_corrupt_jpeg())
    return folder


def predict(run, source, *more):
    return main(["predict", str(run), str(source), "--workers", "0", *more])


def test_a_line_an_image_and_the_same_as_json(place, tmp_path, capsys):
    assert predict(place / "run", place / "photos", "--top", "2", "--json", str(tmp_path / "new/p.json")) == 0
    said = capsys.readouterr()
    lines = [line.split("\t") for line in said.out.splitlines()]
    written = json.loads((tmp_path / "new/p.json").read_text())
    assert len(lines) == len(written["images"]) == 6 and {len(line) for line in lines} == {3}
    wanted = fastbeit.load(place / "run").predict([line[0] for line in lines], top=7)
    num_first = num_among = 0
    for line, image, everything in zip(lines, written["images"], wanted, strict=True):
        assert image["path"] == line[0] and image["label"] == line[0].split("/")[-2]
        for text, told, one in zip(line[1:], image["classes"], everything[:2], strict=True):
            assert told["class"] == one.name and told["probability"] == pytest.approx(one.probability, abs=1e-5)
            assert text == f"{told['class']} {told['probability']:.4f}"
        num_first += everything[0].name == image["label"]
        num_among += image["label"] in [one.name for one in everything[:5]]
    # of five classes, though two are shown
    assert written["accuracy"] == {"top1": num_first / 6, "top5": num_among / 6, "images": 6}
    assert f"top-1 {num_first / 6:.2%}  top-5 {num_among / 6:.2%}  of 6 images with a label" in said.err
    assert len(written["bad"]) == 1 and "01.jpg: corrupt" in written["bad"][0] and "bad image: " in said.err
    assert written["model"] == "fastbeit: step-000003/model.safetensors"


def test_labels_of_other_classes_are_not_compared(place, tmp_path, capsys):
    for name in ("cats", CLASS_NAMES[0], "dogs"):
        make_photos(tmp_path / "photos" / name, 1)
    assert predict(place / "run", tmp_path / "photos", "--json", str(tmp_path / "p.json")) == 0
    said = capsys.readouterr().err
    assert "labels are not compared: the model has no class 'cats' and 1 more" in said and "top-1" not in said
    assert json.loads((tmp_path / "p.json").read_text())["accuracy"] is None
    nameless = finetuned_run(tmp_path / "nameless", finetuned())
    assert predict(nameless, tmp_path / "photos") == 0
    assert "the model does not name its classes" in capsys.readouterr().err


def test_images_without_labels_and_a_name_of_two_lines(place, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "photos/two\nlines.png")
    assert predict(place / "run", tmp_path / "photos") == 0
    said = capsys.readouterr()
    assert "two\\nlines.png" in said.out and len(said.out.splitlines()) == 1 and "label" not in said.err


def test_a_model_without_a_head(place, tmp_path, capsys):
    assert predict(pretrained_run(tmp_path / "run"), place / "photos") == USAGE
    assert "has no head over classes" in capsys.readouterr().err


def test_images_that_are_all_bad(place, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(photos.mid_corrupt_jpeg())
    assert predict(place / "run", tmp_path / "bad", "--json", str(tmp_path / "p.json")) == DATA_MISSING
    assert "none of the 1 images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_stop_leaves_no_json(place, tmp_path, monkeypatch):
    logits = Classifier.logits

    def stopped(model, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return logits(model, images)

    monkeypatch.setattr(Classifier, "logits", stopped)
    assert predict(place / "run", place / "photos", "--json", str(tmp_path / "p.json")) == 130
    assert not [*tmp_path.iterdir()]


def test_a_json_that_cannot_be_written(place, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert predict(place / "run", place / "photos", "--json", str(tmp_path / "file/p.json")) == 73
    assert "cannot be written" in capsys.readouterr().err
