"""The page of a fine-tuning: what it says of held-out images, beside guessing, and where it is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastbeit.cli import main
from fastbeit.data.index.scan import build_index
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, DONE, USAGE
from fastbeit.evaluate import finetuned_page, mistakes
from fastbeit.evaluate.finetuned_page import Judged, verdict
from fastbeit.evaluate.finetuned_run import open_finetuning
from fastbeit.evaluate.mistakes import Answers, examine
from fastbeit.train.checkpoint import save_checkpoint
from helpers.finetuned import classifier, index_of, write_run
from helpers.pages import pictures_of

CLASSES = ["<b>", "cat", "dog", "emu", "fox", "gnu"]
HELD_OUT = {"<b>": 4, "cat": 6, "dog": 3, "emu": 4, "fox": 5, "gnu": 2}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """In training most images are dogs."""
    folder = tmp_path_factory.mktemp("finetuned")
    for part in "train", "val":
        (folder / part).mkdir()
    return index_of(folder / "train", dict.fromkeys(CLASSES, 2) | {"dog": 5}), index_of(folder / "val", HELD_OUT)


def always(name: str):
    """A model that says one class of every image, with 95 %."""
    model = classifier(len(CLASSES))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([float(one == name) for one in CLASSES]) * 4.55)
    return model


def said(capsys) -> str:
    return capsys.readouterr().out.splitlines()[0]


def test_the_page_stands_alone(tmp_path, capsys, indexes):
    run = write_run(tmp_path / "run", indexes, CLASSES, classifier(len(CLASSES)))
    assert main(["report", str(run), "--points", "1,2", "0,0", "--block", "0"]) == DONE
    sentence, place = capsys.readouterr().out.splitlines()
    page = (run / "report.html").read_text()
    assert place == f"report: {run / 'report.html'}" and sentence in page.replace("&#x27;", "'")
    assert len(pictures_of(page)) == 3
    names = {path.name for path in (run / "report").iterdir()}
    assert names == {"attention.png", "curves.png", "mistakes.png", "report.json"}
    facts, opened = json.loads((run / "report/report.json").read_text()), open_finetuning(run)
    assert opened.val_index
    found = examine(opened.model, opened.data, opened.val_index, CLASSES, opened.device)
    figures = facts["figures"]
    assert (figures["top1"], figures["top5"], figures["loss"]) == (found.top1, found.top5, found.loss)
    # three of the 24 are dogs
    assert (figures["num_images"], figures["baseline_top1"]) == (24, 3 / 24)
    assert f"{found.top1:.1%}" in sentence and "'dog', the most frequent class of training" in sentence
    assert "12.5%" in sentence and "Self-attention of block 0, of 0 to 1" in page and "pooling: mean" in page
    # names are text
    assert "<b>" not in page and "&lt;b&gt;" in page
    worst = facts["mistakes"][0]
    assert worst["file"] in page and worst["label"] == Path(worst["file"]).parent.name != worst["guess"]
    assert [one["probability"] for one in facts["mistakes"]] == [one.probability for one in found.mistakes]
    weakest = found.worst_classes(1)[0]
    assert f"{weakest.num_right:,} of {weakest.num_images:,}" in page


@pytest.fixture
def few_pictures(monkeypatch):
    """Twenty take seconds to draw."""
    monkeypatch.setattr(mistakes, "NUM_MISTAKES", 2)


def test_a_model_that_guesses_is_called_so(tmp_path, capsys, indexes, few_pictures):
    run = write_run(tmp_path / "run", indexes, CLASSES, always("dog"))
    assert main(["report", str(run)]) == DONE
    assert said(capsys) == (
        "On 24 held-out images the model is no better than always guessing 'dog', the most frequent class of training: "
        "it is right on 12.5%, and guessing on 12.5%. It has learnt nothing of use yet."
    )


def test_averaged_weights_are_judged_where_there_are(tmp_path, capsys, indexes, few_pictures):
    run = write_run(tmp_path / "run", indexes, CLASSES, always("dog"), always("cat").state_dict())
    assert main(["report", str(run)]) == DONE
    assert said(capsys).startswith("The model is right on 25.0% of 24 held-out images (among its five most likely")


def test_a_model_without_mistakes(tmp_path, capsys, indexes):
    (tmp_path / "val").mkdir()
    cats = index_of(tmp_path / "val", {"cat": 3})
    run = write_run(tmp_path / "run", (indexes[0], cats), CLASSES, always("cat"))
    (run / "report").mkdir()
    # of an earlier checkpoint
    (run / "report/mistakes.png").touch()
    assert main(["report", str(run)]) == DONE
    assert "right on 100.0% of 3 held-out images" in said(capsys)
    page = (run / "report.html").read_text()
    assert "It made none." in page and "weakest" not in page
    assert len(pictures_of(page)) == 2 and not (run / "report/mistakes.png").exists()


@pytest.mark.parametrize("why", ["none", "no labels"])
def test_without_labelled_images_it_says_so_and_shows_curves(tmp_path, capsys, indexes, why):
    train, val, wanted = indexes[0], None, "no images were held out (data.val_index is empty)"
    if why == "no labels":
        (tmp_path / "val").mkdir()
        val = index_of(tmp_path / "val", {"cat": 2, "dog": 1})
        shutil.copy(val.path(0), val.root / "bare.png")
        build_index(val.root, val.location, progress=False)
        wanted = "1 of its 4 held-out images have no label"
        val = type(val)(val.location)
    run = write_run(tmp_path / "run", (train, val), CLASSES, classifier(len(CLASSES)))
    # what a kill leaves of the settings
    (run / "config.yaml").write_bytes(b"")
    assert main(["report", str(run)]) == DONE
    assert said(capsys) == f"What the model knows of new images cannot be said: {wanted}."
    page = (run / "report.html").read_text()
    assert len(pictures_of(page)) == 1 and wanted in page and "mistakes" not in page
    assert {path.name for path in (run / "report").iterdir()} == {"curves.png", "report.json"}


def test_of_few_classes_the_five_most_likely_say_nothing():
    labels = torch.tensor([0, 1, 1])
    judged = Judged(Answers(labels, labels, 1.0, 1.0, 0.1, 0, 0, []), [0, 1], ["x", "y"])
    assert verdict(judged, "") == (
        "The model is right on 100.0% of 3 held-out images; always guessing 'x', the most frequent class of training, "
        "is right on 33.3%."
    )


WRONG = {
    "a patch": (["--points", "0,0", "4,1"], "--points 4,1 is no patch of a grid of 4 x 4"),
    "a block": (["--block", "2"], "--block 2: the model has blocks 0 to 1"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=list(WRONG))
def test_what_the_model_has_not_is_said_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, indexes, options, message
):
    monkeypatch.setattr(finetuned_page, "examine", lambda *_: pytest.fail("measured"))
    run = write_run(tmp_path / "run", indexes, CLASSES, always("dog"))
    assert main(["report", str(run), *options]) == USAGE
    assert message in capsys.readouterr().err and not (run / "report").exists()


def test_a_point_is_a_row_and_a_column(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["report", "run", "--points", "7;3"])
    assert caught.value.code == USAGE
    assert "wanted row and column of a patch, such as 7,3; got '7;3'" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch, indexes):
    monkeypatch.setattr(finetuned_page, "examine", lambda *_: pytest.fail("measured"))
    run = write_run(tmp_path / "run", indexes, CLASSES, always("dog"))
    (run / "report").write_text("a file where a folder should be")
    assert main(["report", str(run)]) == CANNOT_WRITE
    assert "cannot be written" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_of_these_settings_is_said(tmp_path, capsys, indexes):
    run = write_run(tmp_path / "run", indexes, CLASSES, classifier(len(CLASSES) + 1))
    assert main(["report", str(run)]) == CHECKPOINT_UNUSABLE
    assert "does not fit the run's model" in capsys.readouterr().err
    save_checkpoint(run / "checkpoints", 30, classifier(len(CLASSES)).state_dict(), {}, {"config": {}})
    assert main(["report", str(run)]) == CHECKPOINT_UNUSABLE
    assert "step-000030' does not name its classes" in capsys.readouterr().err
