import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastbeit.config.sections import DataConfig
from fastbeit.data import workers
from fastbeit.data.decode import check, decode, decode_reference
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader
from fastbeit.data.plans import Plans, places_at
from fastbeit.errors import BadImage, ConfigError, DataError
from fastbeit.train.bad_samples import BadSamples
from helpers import photos
from helpers.loading import GOOD, PIPELINES, assert_same, batches, photo_index, psnr, small_index
from helpers.waiting import PATIENCE_S, finished

DECODERS = {"torch": decode, "pillow": decode_reference}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return photo_index(tmp_path_factory.mktemp("pipeline"))


# ---- which images


@pytest.mark.parametrize("tail", ["drop", "wrap"])
def test_an_epoch_shows_every_image_once(tail):
    n, batch = 23, 5
    shown = [places_at(step, n, batch, tail) for step in range(23)]
    epochs, places = (np.concatenate(parts) for parts in zip(*shown, strict=True))
    for epoch in range(4):
        seen = places[epochs == epoch]
        assert np.array_equal(seen, np.arange(23 if tail == "wrap" else 20))
    assert (np.diff(epochs) >= 0).all()


def test_steps_per_epoch():
    assert [steps_per_epoch(23, 5, tail) for tail in ("drop", "wrap")] == [4, 5]
    assert steps_per_epoch(1, 5, "wrap") == 1
    with pytest.raises(ConfigError, match=r"batch_size 5 is more than the 4 images.*data.tail=wrap.*at most 4"):
        steps_per_epoch(4, 5, "drop")


def test_what_cannot_be_batched_fails_before_iterating(index):
    with pytest.raises(ConfigError, match="tail=wrap"):
        batches(index, batch_size=8)
    with pytest.raises(ConfigError, match="3 ranks"):
        batches(index, world_size=3)


def test_one_image_wraps(tmp_path):
    index = small_index(tmp_path, {"a.jpg": None})
    (batch,) = batches(index, tail="wrap", num_steps=1)
    assert batch.sample.tolist() == [0] * 4 and batch.epoch.tolist() == [0, 1, 2, 3]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_resume_and_ranks_change_nothing(index, pipeline):
    options = {"pipeline": pipeline, "tail": "wrap"}
    whole = batches(index, num_steps=4, **options)
    assert [batch.images.shape for batch in whole] == [(4, 32, 48, 3)] * 4
    token_images = whole[0].token_images
    assert token_images is not None and token_images.shape == (4, 16, 24, 3)
    assert whole[0].images.dtype == token_images.dtype == torch.uint8
    assert whole[1].epoch.tolist() == [0, 0, 0, 1]
    assert_same(batches(index, first_step=2, num_steps=4, **options), whole[2:])
    shares = [batches(index, rank=rank, world_size=2, num_steps=2, **options) for rank in range(2)]
    for step in range(2):
        for name in ("images", "token_images", "sample", "epoch"):
            share = torch.cat([getattr(batches[step], name) for batches in shares])
            assert torch.equal(share, getattr(whole[step], name))


@pytest.mark.parametrize("pipeline", ["torch", "pillow"])
def test_workers_change_nothing(index, pipeline):
    options = {"pipeline": pipeline, "tail": "wrap", "num_steps": 5}
    assert_same(batches(index, num_workers=2, **options), batches(index, num_workers=0, **options))


def test_views_come_round(index):
    def images(step, views):
        (batch,) = batches(index, batch_size=7, first_step=step, num_steps=step + 1, num_crops=views)
        return batch.images[batch.sample.argsort()], batch.sample

    (first, order), (second, _), (third, other_order) = (images(step, 2) for step in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert not torch.equal(order, other_order)
    assert not torch.equal(images(0, 0)[0], images(2, 0)[0])


def test_no_token_view(index):
    for pipeline in PIPELINES:
        (batch,) = batches(index, pipeline=pipeline, token_size=None, num_steps=1)
        assert batch.token_images is None


# ---- who makes them


def test_a_signal_finds_no_worker_unprepared(index, monkeypatch):
    """A scheduler's SIGTERM may come when a worker has just been born: it must not die of it."""
    begin = workers._begin_worker

    def begin_late(parent, worker):
        os.kill(os.getpid(), signal.SIGTERM)
        begin(parent, worker)

    monkeypatch.setattr(workers, "_begin_worker", begin_late)
    assert len(batches(index, num_workers=1)) == 3
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


ENDLESS = """
import sys
from pathlib import Path
import psutil
from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import open_index
from fastbeit.data.loader import make_loader
loader = make_loader(
    DataConfig(num_workers=2, image_size=(32, 32), pipeline="torch"), open_index(Path(sys.argv[1])),
    token_size=None, batch_size=2, seed=0, rank=0, world_size=1, first_step=0, num_steps=10**9,
)
next(loader)
print(*(child.pid for child in psutil.Process().children()), flush=True)
sys.stdin.read()
"""


def test_a_script_that_forgets_its_loader_ends(index, tmp_path):
    """Its workers are ended by SIGTERM alone, which they do not take from others."""
    path = tmp_path.parent / "pipeline0" / "images.idx"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    finished(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a loader has no more workers than there are cores")
def test_workers_end_with_a_killed_run(index, tmp_path):
    path = tmp_path.parent / "pipeline0" / "images.idx"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        assert len(workers) == 2
        run.send_signal(signal.SIGKILL)
        run.wait()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
        for worker in alive:
            worker.kill()
    assert not alive


@pytest.mark.parametrize("pipeline", ["torch", "pillow"])
def test_workers_hand_over_by_shared_memory(index, pipeline):
    (batch,) = batches(index, pipeline=pipeline, num_workers=1, num_steps=1)
    assert all(images is not None and images.is_shared() for images in (batch.images, batch.token_images))


# ---- what files they read


@pytest.mark.parametrize("name", photos.odd_files())
def test_odd_files_show_the_same_in_every_pipeline(name):
    data, pixels = photos.odd_files()[name]
    size = pixels.shape[:2]
    # laying on white rounds once
    tolerance = 1 if "alpha" in name or "rgba" in name else 0
    for decoder in DECODERS.values():
        assert np.abs(np.asarray(decoder(data, size)) - pixels).max() <= tolerance
    encoded = check(data, size).encoded
    assert encoded is data or np.array_equal(decode(encoded, size), decode(data, size))
    if encoded is data:
        assert name in ("grey.jpg", "progressive.jpg", "full_chroma.jpg", "rgb.jpg", "appended.jpg", "exif_1.jpg")


def test_odd_files_in_a_batch(tmp_path):
    (tmp_path / "data").mkdir()
    for name, (data, _) in photos.odd_files().items():
        (tmp_path / "data" / name).write_bytes(data)
    build_index(tmp_path / "data", tmp_path / "images.idx", progress=False)
    index = open_index(tmp_path / "images.idx")
    options = {"batch_size": len(index), "num_steps": 1, "jitter": 0}
    reference, *others = (batches(index, pipeline=name, **options)[0] for name in ("pillow", "torch", "dali"))
    # a dithered black-and-white image overshoots everywhere: 34 dB, by what is clipped between the resize's two passes
    for other in others:
        assert other.bad == [] and (np.sort(psnr(reference.images, other.images))[:2] >= [30, 45]).all()


@pytest.mark.parametrize("name", [*photos.bad_files(), "mid_corrupt.jpg"])
def test_every_pipeline_refuses_the_same_files(name):
    data, reason = photos.bad_files().get(name, (photos.mid_corrupt_jpeg(), "corrupt"))
    size = {"half.png": (96, 128)}.get(name, (427, 640))
    for decoder in (decode, decode_reference, check):
        with pytest.raises(BadImage, match="not an image" if reason == "empty" else reason):
            decoder(data, size)


def test_an_image_that_changed_is_bad():
    for decoder in (decode, decode_reference, check):
        with pytest.raises(BadImage, match="changed since it was indexed: 640 x 427, was 300 x 200"):
            decoder(photos.CHINA.read_bytes(), (200, 300))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_bad_files_are_replaced_by_the_next(tmp_path, pipeline):
    half, text = GOOD[: len(GOOD) // 2].ljust(len(GOOD), b"\0"), b"x" * len(GOOD)
    index = small_index(
        tmp_path, {"a.jpg": None, "b.jpg": b"", "c.jpg": half, "d.jpg": None, "e.jpg": None, "f.jpg": text}
    )
    (tmp_path / "data" / "e.jpg").unlink()
    (batch,) = batches(index, pipeline=pipeline, batch_size=6, num_steps=1)
    assert sorted(batch.sample.tolist()) == [0, 0, 0, 3, 3, 3]
    reasons = dict(batch.bad)
    assert sorted(reasons) == [1, 2, 4, 5]
    for i, words in {1: "empty file", 2: "but others", 4: "No such file", 5: "but others"}.items():
        assert words in reasons[i] and "abcdef"[i] + ".jpg" in reasons[i]
    # with the augmentation of the image that is shown: all copies of it are equal
    for i in (0, 3):
        copies = batch.images[batch.sample == i]
        assert (copies == copies[0]).all()
    order = [samples for _, samples in sorted(zip(range(6), batch.sample.tolist(), strict=True))]
    planned = Plans(DataConfig.model_validate({}), index, 6, 5, 0, 1).draw(0).sample
    assert order == [{0: 0, 1: 3, 2: 3, 3: 3, 4: 0, 5: 0}[i] for i in planned]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_valid_image_ends_the_run(tmp_path, num_workers):
    index = small_index(tmp_path, {"a.jpg": b"", "b.jpg": b"?", "c.jpg": b"?"})
    with pytest.raises(DataError, match=r"^none of the 3 images is valid") as caught:
        batches(index, batch_size=2, num_workers=num_workers)
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_that_vanished_ends_the_run(tmp_path, num_workers):
    index = small_index(tmp_path, {"a.jpg": None, "b.jpg": None})
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"data' is gone, or not mounted$") as caught:
        batches(index, batch_size=2, num_workers=num_workers)
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_made_before_a_disk_vanished_are_given(tmp_path, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    index = small_index(tmp_path, {"a.jpg": None, "b.jpg": None})
    data = DataConfig.model_validate({"pipeline": pipeline, "num_workers": 0, "image_size": 16})
    loader = make_loader(
        data, index, token_size=None, batch_size=2, seed=0, rank=0, world_size=1, first_step=0, num_steps=9
    )
    given = [next(loader)]
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match="is gone, or not mounted"):
        given += loader
    # what DALI has read ahead: a batch that it works on, and one that threads read
    assert len(given) <= 3 and all(batch.images.shape == (2, 16, 16, 3) for batch in given)


def test_very_many_bad_images_in_a_row_end_the_run(tmp_path):
    index = small_index(tmp_path, {f"{i:03}.jpg": b"?" for i in range(110)})
    with pytest.raises(DataError, match="101 bad images in a row") as caught:
        batches(index, num_steps=1)
    assert caught.value.exit_code == 65


def test_bad_samples_are_listed_once_and_limited(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad_samples = BadSamples(path, num_images=20_000)
    bad_samples.add([(7, "a.jpg: empty file"), (8, "b.jpg: corrupt")])
    bad_samples.add([(7, "a.jpg: empty file")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"sample": 7, "reason": "a.jpg: empty file"},
        {"sample": 8, "reason": "b.jpg: corrupt"},
    ]
    with path.open("a") as file:
        file.write('{"sample": 9, "rea')
    resumed = BadSamples(path, num_images=20_000)
    assert len(resumed) == 2
    resumed.add([(i, "x") for i in range(200)])
    assert len(path.read_text().splitlines()) == 201
    with pytest.raises(DataError, match="201 bad images, more than the limit of 200 .*bad_samples.jsonl") as caught:
        resumed.add([(300, "x")])
    assert caught.value.exit_code == 65
