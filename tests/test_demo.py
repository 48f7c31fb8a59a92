"""The demo, at a size of seconds; its real size is `make demo`."""

import json

import pytest
import simplejpeg

from fastbeit.demo import run_demo
from fastbeit.errors import RunError
from fastbeit.photos import gather_photos
from tiny import make_photos

TOKENIZER = ["steps=2", "batch_size=8", "n_hid=8", "n_init=8", "vocab_size=16", "num_workers=0"]
PRETRAIN = ["optim.steps=4", "optim.batch_size=8", "optim.warmup_steps=1", "data.num_workers=0", "log.save_every=2"]
PRETRAIN += ["model.width=32", "model.depth=1", "model.mlp_width=32"]


def test_the_demo_goes_from_photos_to_a_page_and_goes_on_where_it_stopped(tmp_path, capfd):
    out = tmp_path / "demo"
    source = make_photos(tmp_path / "mine", 12)
    assert run_demo(out, source, TOKENIZER, PRETRAIN) == 0
    first = json.loads((out / "run/report/report.json").read_text())
    printed = capfd.readouterr().out
    for said in ("$ fastbeit index", "$ fastbeit tokenizer train", "$ fastbeit pretrain", "$ fastbeit report"):
        assert said in printed
    assert f"{first['loss']:.3f}" in printed and str(out / "report.html") in printed
    # interrupted after its second step: what is finished stays, the rest is done again to the same end
    checkpoints = out / "run/checkpoints"
    (checkpoints / "step-000004").rename(tmp_path / "gone")
    before = {path: path.stat().st_mtime_ns for path in (out / "train.idx", out / "dvae/dvae.safetensors")}
    assert run_demo(out, source, TOKENIZER, PRETRAIN) == 0
    assert json.loads((out / "run/report/report.json").read_text()) == first
    assert before[out / "train.idx"] == (out / "train.idx").stat().st_mtime_ns


def test_the_photos_of_the_packages_are_there(tmp_path):
    assert gather_photos(tmp_path, None) == (20, 5)
    sizes = [simplejpeg.decode_jpeg_header(path.read_bytes())[:2] for path in tmp_path.rglob("*.jpg")]
    assert len(sizes) == 25 and max(max(size) for size in sizes) <= 512


def test_a_folder_of_ones_own_is_split(tmp_path):
    source = make_photos(tmp_path / "mine", 12)
    (source / "notes.txt").write_text("no image")
    assert gather_photos(tmp_path / "out", source) == (10, 2)
    train, held_out = ({path.name for path in (tmp_path / "out" / part).iterdir()} for part in ("train", "held_out"))
    assert len(train) == 10 and len(held_out) == 2


@pytest.mark.parametrize("num_photos", [0, 1])
def test_too_few_photos_are_an_error(tmp_path, num_photos):
    source = make_photos(tmp_path / "mine", num_photos)
    with pytest.raises(RunError, match="at least 2 photos") as caught:
        gather_photos(tmp_path / "out", source)
    assert caught.value.exit_code == 66


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbeit.photos.find_spec", lambda package: None)
    with pytest.raises(RunError, match=r"pip install 'fastbeit\[demo\]'"):
        gather_photos(tmp_path, None)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="wants a folder"):
        gather_photos(tmp_path / "out", tmp_path / "nowhere")
