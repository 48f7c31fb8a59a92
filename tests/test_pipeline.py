import json
import shutil

import numpy as np
import pytest
import torch

import photos
from fastbeit.config import ConfigError, DataConfig
from fastbeit.data.decode import BadImage, check, decode, decode_reference
from fastbeit.data.index import DataError, build_index, open_index
from fastbeit.data.pipeline import BadSamples, make_loader
from fastbeit.data.plans import Plans, places_at, steps_per_epoch
from fastbeit.data.views import pillow_views, torch_views

PIPELINES = ["torch", "pillow", "dali"]
DECODERS = {"torch": decode, "pillow": decode_reference}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    photos.copy_photos(folder / "photos")
    build_index(folder / "photos", folder / "images.idx", progress=False)
    return open_index(folder / "images.idx")


def small_index(folder, files):
    """An index of files that were all good when it was made; `files` then says what they hold."""
    (folder / "data").mkdir()
    good = photos.encoded(photos.small_photo(24, 32))
    for name in files:
        (folder / "data" / name).write_bytes(good)
    build_index(folder / "data", folder / "images.idx", progress=False)
    for name, data in files.items():
        if data is not None:
            (folder / "data" / name).write_bytes(data)
    return open_index(folder / "images.idx")


def batches(index, *, batch_size=4, rank=0, world_size=1, first_step=0, num_steps=3, token_size=(16, 24), **options):
    if options.get("pipeline") == "dali":
        pytest.importorskip("nvidia.dali")
    data = DataConfig.model_validate({"image_size": (32, 48), "num_workers": 0, **options})
    loader = make_loader(
        data,
        index,
        token_size=token_size,
        batch_size=batch_size,
        seed=5,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        num_steps=num_steps,
    )
    return list(loader)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for name in ("images", "token_images", "sample", "epoch"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


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
        (batch,) = batches(index, batch_size=7, first_step=step, num_steps=step + 1, views=views)
        return batch.images[batch.sample.argsort()], batch.sample

    (first, order), (second, _), (third, other_order) = (images(step, 2) for step in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert not torch.equal(order, other_order)
    assert not torch.equal(images(0, 0)[0], images(2, 0)[0])


def test_no_token_view(index):
    for pipeline in PIPELINES:
        (batch,) = batches(index, pipeline=pipeline, token_size=None, num_steps=1)
        assert batch.token_images is None


# ---- what they look like


def psnr(one, two):
    error = (one.double() - two.double()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
    return 10 * torch.log10(255**2 / error).numpy()


# rounding alone without jitter (measured: torch 71 dB, DALI 56); with it, clipping before or after the resize
# (measured: 48 and 47 for both)
@pytest.fixture(scope="module", params=[(0, 50), (0.4, 38)], ids=["plain", "jitter"])
def reference(index, request):
    jitter, bound = request.param
    options = {"batch_size": 7, "image_size": 224, "token_size": (112, 112), "num_steps": 3, "jitter": jitter}
    return options, batches(index, pipeline="pillow", **options), bound


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_pipelines_agree_with_the_reference(index, reference, pipeline):
    options, wanted, bound = reference
    found = batches(index, pipeline=pipeline, **options)
    for view in ("images", "token_images"):
        ratios = np.concatenate([psnr(getattr(a, view), getattr(b, view)) for a, b in zip(found, wanted, strict=True)])
        assert ratios.mean() >= bound and ratios.min() >= bound - 15, (view, ratios.round(1))


def test_both_views_show_one_crop(index):
    for pipeline in PIPELINES:
        (batch,) = batches(index, pipeline=pipeline, image_size=64, token_size=(32, 32), batch_size=7, num_steps=1)
        small = batch.images.float().view(7, 32, 2, 32, 2, 3).mean(dim=(2, 4))
        assert psnr(small, batch.token_images).min() > 24


def test_flip_mirrors_the_crop(index):
    for pipeline in PIPELINES:
        options = {"pipeline": pipeline, "jitter": 0, "num_steps": 1}
        (straight,), (mirrored,) = (batches(index, flip=flip, **options) for flip in (0, 1))
        # Pillow's and DALI's resizes round a mirror image differently by a level
        assert (mirrored.images.flip(2).int() - straight.images.int()).abs().max() <= 1


def test_a_whole_crop_is_the_image(index):
    options = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "flip": 0, "jitter": 0, "image_size": 512}
    square = [i for i in range(len(index)) if index.heights[i] == index.widths[i] == 512]
    for pipeline in PIPELINES:
        (batch,) = batches(index, pipeline=pipeline, batch_size=7, num_steps=1, **options)
        for i in square:
            pixels = decode(index.read_bytes(i), (512, 512))
            assert np.array_equal(batch.images[batch.sample == i][0], pixels)


def test_jitter_changes_what_it_names(index):
    plans = Plans(DataConfig.model_validate({"crop_scale": (1, 1), "flip": 0}), index, 1, 0, 0, 1)
    image = decode_reference(index.read_bytes(0), (int(index.heights[0]), int(index.widths[0])))
    mean = np.asarray(image.convert("L")).mean()
    plan = plans.augment(np.array([0]), np.array([0]))[0]

    def views(order=(0, 1, 2), **factors):
        plan["order"] = order
        plan["factors"] = [factors.get(name, 1) for name in ("brightness", "contrast", "saturation")]
        ours = torch_views(np.asarray(image), plan, (64, 64), None)[0]
        return ours.int().numpy(), pillow_views(image, plan, (64, 64), None)[0].astype(int)

    plain = views()[0]
    for view in views(brightness=0.7):
        assert np.abs(view - plain * 0.7).mean() < 1
    for view in views(saturation=0):
        assert np.abs(view - (plain @ [0.299, 0.587, 0.114])[..., None]).mean() < 1
    # no contrast leaves the mean grey of the whole image, as bright as what came before made it
    for view in views(contrast=0):
        assert np.unique(view).tolist() == [int(mean + 0.5)]
    for view in views(contrast=0, brightness=0.5):
        assert np.abs(view - mean * 0.5).max() <= 1
    # operations do not commute: bright first is clipped first, where only the reference knows
    for view in views(contrast=0, brightness=1.9, order=(1, 0, 2)):
        assert np.unique(view).tolist() == [min(255, int(int(mean + 0.5) * 1.9))]
    assert views(contrast=0, brightness=1.9, order=(0, 1, 2))[1].max() < mean * 1.9 - 5


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
    half = photos.CHINA.read_bytes()[:9000]
    index = small_index(
        tmp_path, {"a.jpg": None, "b.jpg": b"", "c.jpg": half, "d.jpg": None, "e.jpg": None, "f.jpg": b"x"}
    )
    (tmp_path / "data" / "e.jpg").unlink()
    (batch,) = batches(index, pipeline=pipeline, batch_size=6, num_steps=1)
    assert sorted(batch.sample.tolist()) == [0, 0, 0, 3, 3, 3]
    reasons = dict(batch.bad)
    assert sorted(reasons) == [1, 2, 4, 5]
    for i, words in {1: "empty file", 2: "corrupt JPEG", 4: "No such file", 5: "not an image"}.items():
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
    with pytest.raises(DataError, match="201 bad images, more than the 200.*bad_samples.jsonl") as caught:
        resumed.add([(300, "x")])
    assert caught.value.exit_code == 65
