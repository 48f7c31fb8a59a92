"""The demo, at a size of seconds; its real size is `make demo`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import simplejpeg
from PIL import Image

from fastbeit.data.demo_photos import gather_photos
from fastbeit.errors import RunError
from fastbeit.jobs.demo import run_demo
from helpers.photos import mid_corrupt_jpeg
from helpers.tiny import make_photos
from helpers.waiting import PATIENCE_S, started, wait_until

MODEL = ["model.width=32", "model.depth=1", "model.mlp_width=32", "data.image_size=32", "masking.num_masked=6"]
STEPS = ["optim.steps=4", "optim.batch_size=8", "optim.warmup_steps=1", "log.every=1", "log.save_every=2"]
PRETRAIN = [*MODEL, *STEPS, "data.num_workers=0", "log.val_every=0", "log.val_crops=1"]
CROPS = 64
COMMAND = ["fastbeit", "demo"]


def test_the_demo_goes_from_photos_to_a_page_and_goes_on_where_it_stopped(tmp_path, capfd):
    out = tmp_path / "demo"
    source = make_photos(tmp_path / "mine", 12)
    assert run_demo(out, source, PRETRAIN, CROPS, COMMAND) == 0
    first = json.loads((out / "result.json").read_text())
    printed = capfd.readouterr().out
    commands = "index", "pretrain", "report"
    places = [printed.index(f"$ fastbeit {command} ") for command in commands]
    assert places == sorted(places)
    assert f"baseline {first['baseline']:.3f}  model {first['loss']:.3f}" in printed
    # four steps are not enough, and the demo does not pretend that they were
    assert "less than the demo should reach" in printed
    assert str(out / "report.html") in printed and (out / "report.html").exists()

    # interrupted after its second step: what is finished stays, the rest is done again to the same end
    (out / "run/checkpoints/step-000004").rename(tmp_path / "gone")
    before = (out / "train.idx").stat().st_mtime_ns
    assert run_demo(out, source, PRETRAIN, CROPS, COMMAND) == 0
    again = json.loads((out / "result.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert before == (out / "train.idx").stat().st_mtime_ns
    with pytest.raises(RunError, match="holds photos of .*mine, wanted those of installed packages"):
        run_demo(out, None, PRETRAIN, CROPS, COMMAND)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    make_photos(tmp_path / "mine", 6)
    # many steps, so that the signal comes in the middle
    settings = ["--pretrain", *PRETRAIN, "optim.steps=100000"]
    args = [sys.executable, "-m", "fastbeit", "demo", "--data", "mine", "--out", "demo", *settings]
    log, pipe = tmp_path / "demo/run/log.jsonl", subprocess.PIPE
    with started(args, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        wait_until(process, lambda: log.exists() and '"loss"' in log.read_text())
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75
    assert "to go on: fastbeit demo --data mine --out demo" in stderr.splitlines()[-1]
    assert list((tmp_path / "demo/run/checkpoints").glob("step-*"))


def test_the_photos_of_the_packages_are_there(tmp_path):
    assert gather_photos(tmp_path / "photos", None) == (20, 5)
    sizes = [simplejpeg.decode_jpeg_header(path.read_bytes())[:2] for path in tmp_path.rglob("*.jpg")]
    assert len(sizes) == 25 and max(int(side) for size in sizes for side in size) <= 512


def test_a_folder_of_ones_own_is_split_and_what_is_damaged_is_said(tmp_path, capfd):
    source = make_photos(tmp_path / "mine", 12)
    (source / "notes.txt").write_text("no image")
    (source / "05b.jpg").write_bytes(mid_corrupt_jpeg())
    (source / "deep").mkdir()
    Image.new("RGBA", (3000, 20), (0, 0, 0, 0)).save(source / "deep" / "clear.png")
    assert gather_photos(tmp_path / "out", source) == (10, 3)
    said = capfd.readouterr()
    assert "notes.txt" in said.out and "05b.jpg': corrupt" in said.err
    with Image.open(sorted(tmp_path.glob("out/*/0012.jpg"))[0]) as clear:
        # on white, as everywhere
        assert clear.size == (512, 3) and clear.getextrema() == ((255, 255),) * 3


def test_an_interrupted_copy_is_made_again(tmp_path):
    source = make_photos(tmp_path / "mine", 3)
    (tmp_path / ".out.part" / "train").mkdir(parents=True)
    (tmp_path / ".out.part" / "train" / "0009.jpg").write_bytes(b"half")
    assert gather_photos(tmp_path / "out", source) == (2, 1)


@pytest.mark.parametrize("num_photos, message", [(0, "no image in"), (1, "at least 2 photos")])
def test_too_few_photos_are_an_error(tmp_path, num_photos, message):
    source = make_photos(tmp_path / "mine", num_photos)
    with pytest.raises(RunError, match=message) as caught:
        gather_photos(tmp_path / "deep/out", source)
    assert caught.value.exit_code == 66 and not (tmp_path / "deep").exists()
    # and nothing is left that a second start would take for photos
    with pytest.raises(RunError, match=message):
        gather_photos(tmp_path / "out", source)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbeit.data.demo_photos.find_spec", lambda package: None)
    with pytest.raises(RunError, match=r"pip install 'fastbeit\[demo\]'.*--data DIR") as caught:
        gather_photos(tmp_path / "out", None)
    assert caught.value.exit_code == 66


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        gather_photos(tmp_path / "out", tmp_path / "nowhere")
