"""`fastbeit probe`: a table and its JSON."""

import json
import os
import signal

import pytest

from fastbeit.cli import main
from fastbeit.errors import CANNOT_CREATE, USAGE
from fastbeit.jobs import probe as job
from helpers.dialects import DEPTH, pretrained_run
from helpers.labelled import write_classes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    pretrained_run(folder / "run")
    write_classes(folder / "train", range(8))
    write_classes(folder / "val", range(20, 24))
    assert main(["index", str(folder / "val"), "-o", str(folder / "val.idx")]) == 0
    return folder


def probe(place, *more):
    sources = ["--data", str(place / "train"), "--val", str(place / "val.idx")]
    return main(["probe", str(place / "run"), *sources, "--workers", "0", *more])


def test_a_line_a_block_and_the_same_as_json(place, tmp_path, capsys):
    out = tmp_path / "new/probe.json"
    assert probe(place, "--seeds", "3", "-o", str(out)) == 0
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["block"] for row in found["rows"]] == [*range(DEPTH)]
    for row in found["rows"]:
        # chance is a quarter; a random network's features tell four photos apart
        assert row["linear"]["top1"] > 0.5 and row["knn"]["top1"] > 0.5 and row["knn"]["top5"] == 1
        assert row["linear"]["top1_deviation"] >= 0
        assert f"{row['knn']['top1']:.2%}" in said and f"{row['linear']['top1']:.2%} ±" in said
    assert found["train"]["images"] == 32 and found["val"]["images"] == 16 and found["classes"] == 4
    assert found["linear"] == {"epochs": 100, "lr": 4e-3, "batch_size": 1024, "weight_decay": 1e-4, "seeds": 3}
    assert found["knn"] == {"k": 20, "temperature": 0.07} and found["features"]["view"] == "centre crop"
    assert "32 images in 4 classes, 16 images held out" in said and "3 seeds; k-NN: k = 20, cosine" in said
    # the same again gives the same
    assert probe(place, "--seeds", "3", "--blocks", "1", "-o", str(out)) == 0
    assert json.loads(out.read_text())["rows"] == found["rows"][1:]


def test_fewer_images_than_neighbours_and_classes_that_are_not_learnt(place, tmp_path, capsys):
    write_classes(tmp_path / "few", range(3), cat=range(0), rocket=range(1))
    done = main([
        "probe", str(place / "run"), "--data", str(tmp_path / "few"), "--val", str(place / "val.idx"), "--kind", "cls",
        "--blocks", "1", "--epochs", "2", "--workers", "0", "-o", str(tmp_path / "probe.json"),
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert done == 0 and "k = 7 (there are no more images)" in said
    assert "1 class of the held-out images without an image in training: never right" in said
    (row,) = json.loads((tmp_path / "probe.json").read_text())["rows"]
    assert max(row["linear"]["top5"], row["knn"]["top5"]) <= 0.75


@pytest.mark.parametrize(
    "more, code, message",
    [
        (["--blocks", "0,7"], USAGE, "block 7 is wanted of a model of 2"),
        (["--epochs", "0"], USAGE, "argument --epochs: wanted a number from 1 on"),
        (["-o", "{place}/val.idx/probe.json"], CANNOT_CREATE, "probe.json' cannot be written"),
    ],
)
def test_a_mistake_ends_in_its_exit_code(place, tmp_path, capsys, monkeypatch, more, code, message):
    monkeypatch.chdir(tmp_path)
    try:
        found = probe(place, *[one.format(place=place) for one in more])
    except SystemExit as end:
        found = end.code
    assert found == code and message in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_features_that_have_no_room_are_refused_before_they_are_made(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "MEMORY", tmp_path / "meminfo")
    wanted = 4 * 2 * 128 * DEPTH * (32 + 16)
    for free, code in ((wanted // 1024 - 1, USAGE), (wanted // 1024, 0)):
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free} kB\n")
        assert probe(place, "--epochs", "1") == code
    assert "take 0.0 GB of memory, and 0.0 GB are free; name fewer blocks" in capsys.readouterr().err
    assert (tmp_path / "probe.json").exists()


@pytest.mark.parametrize("moment", ["features_of", "nearest"])
def test_a_stop_writes_nothing(place, tmp_path, monkeypatch, moment):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"fastbeit.evaluate.probe.{moment}", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert probe(place) == 130 and not [*tmp_path.iterdir()]
