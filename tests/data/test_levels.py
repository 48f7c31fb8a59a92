"""`data.levels`: 16-bit images that use few of their values are scaled as is asked, or refused, by all jobs alike."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.cli import main
from fastbeit.config.sections import DataConfig, Levels
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.labelled import make_eval_loader
from fastbeit.data.loader import make_token_loader
from fastbeit.errors import ConfigError
from fastbeit.jobs.check_index import check_index
from helpers import photos
from helpers.formats import png, tiff
from helpers.loading import PIPELINES, assert_same, batches
from helpers.tiny import make_tokenizer, write_config

CHINA = np.asarray(photos.small_photo(64, 80)).astype(np.uint16)


def make_index(folder: Path, values: np.ndarray, num_images: int = 8) -> Path:
    """Of 16-bit images with these values, and shifted ones; half are PNG, half TIFF."""
    (folder / "data").mkdir(parents=True)
    for number in range(num_images):
        shown = np.roll(values, 5 * number, axis=1)
        data = tiff(shown, photometric="rgb") if number % 2 else png(shown, 16, 2)
        (folder / "data" / f"{number}.png").write_bytes(data)
    build_index(folder / "data", folder / "images.idx", progress=False)
    return folder / "images.idx"


@pytest.mark.parametrize(
    "values, words",
    [
        (CHINA * 16, r"from 0 to 4080 alone.* keeps 16 of 256 grey levels; set data.levels=\[0,4095\], or"),
        (CHINA * 4, r"from 0 to 1020 alone.* keeps 4 of 256 .*data.levels=\[0,1023\]"),
        # as a scanner writes values with a sign
        (CHINA * 4 + 32768, r"from 32768 to 33788 .*data.levels=\[32768,33788\]"),
        (CHINA * 32, None),
        (CHINA * 257, None),
    ],
    ids=["12 bits", "10 bits", "shifted", "13 bits", "16 bits"],
)
def test_next_to_nothing_of_an_image_is_refused(tmp_path, values, words):
    path = make_index(tmp_path, values - values.min() + (values.min() if values.min() > 9999 else 0), 2)
    if words:
        with pytest.raises(ConfigError, match=words) as caught:
            open_index(path, "high_byte")
        assert caught.value.exit_code == 2
    allowed: list[Levels | None] = ["image", (0, 4095), None]
    for levels in allowed if words else [*allowed, "high_byte"]:
        assert len(open_index(path, levels)) == 2


def test_images_of_8_bits_are_no_question(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jpg").write_bytes(photos.encoded(photos.small_photo()))
    build_index(tmp_path / "data", tmp_path / "images.idx", progress=False)
    assert open_index(tmp_path / "images.idx", "high_byte").levels_seen() is None


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    return make_index(tmp_path_factory.mktemp("twelve"), CHINA * 16 + 15)


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """The same images in 8 bits."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "data").mkdir()
    for number in range(8):
        shown = np.roll(CHINA, 5 * number, axis=1).astype(np.uint8)
        (folder / "data" / f"{number}.png").write_bytes(photos.encoded(photos.Image.fromarray(shown), "PNG"))
    build_index(folder / "data", folder / "images.idx", progress=False)
    return folder / "images.idx"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_all_pipelines_scale_alike(twelve, eight, pipeline):
    options = {"pipeline": pipeline, "num_steps": 1}
    # 16 v + 15 is the 8-bit value v again
    assert_same(batches(open_index(twelve), levels=[15, 4095], **options), batches(open_index(eight), **options))
    # of high bytes there are 16, which jitter makes up to 1.4 times as bright
    assert int(batches(open_index(twelve), **options)[0].images.max()) <= 21


def test_by_its_own_range_an_image_is_as_bright_as_it_can_be(twelve):
    (batch,) = batches(open_index(twelve), levels="image", num_steps=1, jitter=0, crop_scale=(1, 1), crop_ratio=(1, 1))
    assert batch.images.float().std() > 40 and int(batch.images.max()) > 240


def test_dali_after_a_check_and_token_views_too(twelve, eight):
    pytest.importorskip("nvidia.dali")
    found = []
    told: list[tuple[Path, Levels]] = [(twelve, (15, 4095)), (eight, "high_byte")]
    for path, levels in told:
        assert check_index(path, 0) == 0
        data = DataConfig(pipeline="dali", num_crops=2, num_workers=0, image_size=(32, 48), levels=levels)
        loader = make_token_loader(data, open_index(path), token_size=(16, 24), seed=5, rows=[range(8)], together=4)
        found.append(torch.cat([made.images for made in loader]))
    assert torch.equal(*found)


def test_evaluation_scales_too(twelve):
    data = DataConfig(image_size=(32, 32), num_workers=0, levels=(15, 4095), pipeline="pillow")
    index = open_index(twelve)
    index.labels = np.zeros(len(index), np.int32)
    (batch,) = make_eval_loader(data, index, batch_size=8, rank=0, world_size=1)
    assert int(batch.images.max()) > 200


def test_jobs_refuse_before_they_write_and_do_as_they_are_told(twelve, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "dvae", seed=0)
    config = str(write_config(tmp_path / "tiny.yaml"))
    common = [f"data.index={twelve}", "tokenizer.path=dvae"]
    jobs = [
        ["pretrain", config, "out=run", *common],
        ["tokenize", config, "data.num_crops=1", "data.tokens=tokens", *common],
        ["data", "show", config, *common],
        ["tokenizer", "train", "--data", str(twelve), "-o", "own"],
        ["shard", str(twelve), "-o", "shards"],
    ]
    for job in jobs:
        assert main(job) == 2, job
        said = capsys.readouterr().err
        assert "data.levels=[0,4095], or data.levels=image" in said and "Traceback" not in said, job
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in left} <= {"tiny.yaml", *(path.name for path in (tmp_path / "dvae").iterdir())}
    # the held-out images too, and at the start
    make_index(tmp_path / "full", CHINA * 257)
    args = [f"data.index={tmp_path}/full/images.idx", f"data.val_index={twelve}", "tokenizer.path=dvae"]
    assert main(["pretrain", config, "out=run", *args]) == 2 and not (tmp_path / "run/config.yaml").exists()
    assert "images.idx' holds 16-bit images" in capsys.readouterr().err
    # tokens know by which levels they were made
    told = "data.levels=[0,4095]"
    assert main([*jobs[1], told]) == 0 and main([*jobs[2], told]) == 0
    assert main([*jobs[0], "data.num_crops=1", "data.tokens=tokens", "data.levels=image"]) == 2
    assert "data.levels is (0, 4095) there, image here" in capsys.readouterr().err
    assert (
        main([*jobs[0], "data.num_crops=1", "data.tokens=tokens", "optim.steps=1", "optim.warmup_steps=0", told]) == 0
    )


def test_shards_are_made_by_levels(twelve, tmp_path, capsys):
    pixels = {}
    for levels in ("0,4095", "image"):
        assert main(["shard", str(twelve), "-o", str(tmp_path / levels), "--levels", levels, "--workers", "1"]) == 0
        build_index(tmp_path / levels, tmp_path / "made.idx", progress=False)
        with photos.Image.open(io.BytesIO(open_index(tmp_path / "made.idx").read_bytes(0))) as image:
            pixels[levels] = np.asarray(image)
    assert np.abs(pixels["0,4095"].astype(float) - CHINA).mean() < 8
    assert main(["shard", str(twelve), "-o", str(tmp_path / "image"), "--levels", "0,4095"]) == 2
    assert "levels was image, now (0, 4095)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shard", str(twelve), "-o", str(tmp_path / "x"), "--levels", "4095,0"])
    assert "--levels: Value error, wanted high_byte, image, or [low, high]" in capsys.readouterr().err


@pytest.mark.parametrize("levels", ["low_byte", [5, 5], [-1, 4], [0, 65536], [1], 12, [0, "x"]], ids=str)
def test_levels_that_are_none(levels):
    with pytest.raises(ValueError, match=r"wanted high_byte, image, or \[low, high\] within 0 to 65535; got"):
        DataConfig.model_validate({"levels": levels})
