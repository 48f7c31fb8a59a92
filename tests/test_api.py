"""fastbeit in a notebook."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastbeit
from fastbeit.config.sections import DataConfig
from fastbeit.data.decode import decode
from fastbeit.data.in_memory import view_of
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.labelled import EvalBatches, centre_crop
from fastbeit.errors import DATA_MISSING, PREEMPTED, ConfigError, DataError, RunError
from fastbeit.weights.models import read_model
from helpers import dialects, photos
from helpers.dialects import CLASS_NAMES, DEPTH, SIDE, WIDTH, finetuned, finetuned_run, pretrained_run
from helpers.tiny import make_parts, write_config

DATA = DataConfig(image_size=(SIDE, SIDE), num_workers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fastbeit.load(pretrained_run(tmp_path_factory.mktemp("model") / "run"))


def test_the_package_alone_loads_no_torch():
    code = "import sys, fastbeit; assert {'load', 'pretrain'} <= set(dir(fastbeit)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'lood'; it has load, pretrain"):
        _ = fastbeit.lood


def test_every_form_of_an_image_is_the_same_view(tmp_path):
    """And that of an evaluation: of paths, PIL images, arrays and tensors, upright and on white."""
    photo = photos.small_photo(70, 100)
    photo.save(tmp_path / "photo.png")
    build_index(tmp_path, tmp_path / "images.idx", progress=False)
    wanted = EvalBatches(DATA, open_index(tmp_path / "images.idx"))[range(1)].images[0].numpy()
    pixels = np.array(photo)
    forms = [
        str(tmp_path / "photo.png"), tmp_path / "photo.png", photo, Image.open(tmp_path / "photo.png"), pixels,
        torch.tensor(pixels), torch.tensor(pixels).permute(2, 0, 1),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(view_of(form, DATA), wanted), type(form)


@pytest.mark.parametrize("name", photos.odd_files())
def test_an_odd_file_is_the_same_by_its_path_and_opened_by_pillow(tmp_path, name):
    content, shown = photos.odd_files()[name]
    (tmp_path / name).write_bytes(content)
    decoded = decode(content, shown.shape[:2])
    assert np.array_equal(view_of(tmp_path / name, DATA), centre_crop(Image.fromarray(decoded), DATA.image_size))
    found = view_of(Image.open(tmp_path / name), DATA).astype(int)
    # simplejpeg's colours are not to the bit Pillow's
    assert np.abs(found - view_of(tmp_path / name, DATA)).max() <= 2


def test_features_of_one_image_and_of_several(model):
    photo, other = photos.small_photo(), photos.small_photo(60, 200)
    one = model.features(photo)
    assert one.shape == (1, WIDTH) and one.dtype == torch.float32
    several = model.features([photo, np.array(other)], blocks=[1, 0], kind="concat")
    assert [*several] == [0, 1] and several[1].shape == (2, 2 * WIDTH)
    torch.testing.assert_close(several[1][:1, :WIDTH], one)
    assert model.features(photo, blocks=0, kind="patches").shape == (1, 4, 4, WIDTH)
    batch = torch.stack([torch.tensor(np.array(photo))] * 2)
    torch.testing.assert_close(model.features(batch), one.expand(2, -1))
    assert f"{DEPTH} blocks, images of 32x32" in repr(model) and model.classes is None


def test_more_images_than_are_looked_at_together(model, monkeypatch):
    pictures = [photos.small_photo(40, 50 + i) for i in range(5)]
    wanted = model.features(pictures)
    monkeypatch.setattr("fastbeit.api.BATCH", 2)
    torch.testing.assert_close(model.features(iter(pictures)), wanted)


@pytest.mark.parametrize(
    "ask, error, message",
    [
        (lambda model: model.features("nope.jpg"), DataError, "'nope.jpg' cannot be read: No such file"),
        (lambda model: model.features(__file__), DataError, "test_api.py': not an image"),
        (lambda model: model.features(np.zeros((8, 8, 3))), ValueError, r"uint8 .*; got float64 \[8, 8, 3\]"),
        (lambda model: model.features(torch.zeros(8, 8, dtype=torch.uint8)), ValueError, r"got uint8 \[8, 8\]"),
        (lambda model: model.features([3]), ValueError, "got int"),
        (lambda model: model.features([]), ValueError, "one image or several are wanted; got none"),
        (lambda model: model.features(photos.CHINA, blocks=[2]), ConfigError, "block 2 is wanted of a model of 2"),
        (lambda model: model.features(photos.CHINA, kind="norm"), ConfigError, "there are cls, mean, concat, patches"),
        (lambda model: model.predict(photos.CHINA), RunError, "has no head over classes"),
        (lambda model: fastbeit.load("nope"), RunError, "'nope' is not there"),
    ],
)
def test_a_mistake_is_said(model, ask, error, message):
    with pytest.raises(error, match=message):
        ask(model)


def test_the_likeliest_classes_come_first(tmp_path):
    weights = finetuned()
    model = fastbeit.load(finetuned_run(tmp_path / "run", weights, CLASS_NAMES), device="cpu")
    pictures = [photos.small_photo(), photos.small_photo(60, 200)]
    everything = model.predict(pictures, top=99)
    views = torch.tensor(np.stack([view_of(picture, DATA) for picture in pictures]))
    # by the model of an export to ONNX
    logits = dialects.ours(read_model(tmp_path / "run"))((views.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    for found, wanted in zip(everything, logits.softmax(1), strict=True):
        assert {one.name for one in found} == set(CLASS_NAMES)
        assert [one.probability for one in found] == sorted((one.probability for one in found), reverse=True)
        for one in found:
            assert one.probability == pytest.approx(wanted[CLASS_NAMES.index(one.name)].item(), abs=1e-5)
    assert [len(found) for found in model.predict(pictures, top=2)] == [2, 2]
    assert model.classes == CLASS_NAMES


def test_a_pre_training_from_a_notebook(tmp_path, monkeypatch):
    parts = make_parts(tmp_path / "parts")
    config = write_config(tmp_path / "tiny.yaml")
    settings = {**parts, "optim.steps": 2, "data.image_size": (32, 32), "optim.lr": 1e-2, "data.tail": "wrap"}
    run = fastbeit.pretrain(config, settings, out=tmp_path / "run")
    assert run == tmp_path / "run" and fastbeit.load(run).features(photos.CHINA, kind="mean").shape == (1, 32)
    with pytest.raises(ConfigError, match="did you mean 'optim.steps'"):
        fastbeit.pretrain(config, {"optim.stepz": 2})
    with pytest.raises(RunError, match="does not exist") as caught:
        fastbeit.pretrain("demo", {"data.index": "nope.idx", "out": tmp_path / "other"})
    assert caught.value.exit_code == DATA_MISSING
    monkeypatch.setattr("fastbeit.jobs.pretrain.pretrain", lambda *_: PREEMPTED)
    with pytest.raises(RunError, match="stopped before its end, and saved in .*; the same call again") as caught:
        fastbeit.pretrain(config, settings, out=tmp_path / "run")
    assert caught.value.exit_code == PREEMPTED


def test_a_clear_colour_of_a_pil_image_is_laid_on_white(tmp_path):
    photo = photos.small_photo()
    photo.paste((1, 2, 3), (0, 0, 128, 48))
    photo.save(tmp_path / "clear.png", transparency=(1, 2, 3))
    found = view_of(Image.open(tmp_path / "clear.png"), DATA)
    assert np.array_equal(found, view_of(tmp_path / "clear.png", DATA)) and (found[4] == 255).all()
