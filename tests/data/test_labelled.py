import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.config.finetune import AugmentConfig
from fastbeit.config.sections import DataConfig
from fastbeit.data import labelled
from fastbeit.data.augment import draw_steps, fill_of, rand_augment
from fastbeit.data.batch import Batch
from fastbeit.data.decode import decode_reference
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.labelled import centre_crop, make_eval_loader, make_labelled_loader
from fastbeit.data.loader import make_loader
from fastbeit.data.plans import Plans
from fastbeit.errors import ConfigError, DataError
from helpers import photos

NUM_IMAGES = 11  # in 3 classes: a prime, so that batches and ranks leave a rest
SEED = 5


def write_classes(folder, num_images=NUM_IMAGES):
    """Crops of a photo, each another; the class of image i is i * 3 // num_images."""
    photo = photos.small_photo(200, 300)
    for i in range(num_images):
        path = folder / f"class_{i * 3 // num_images}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((7 * i, 5 * i, 7 * i + 60 + i, 5 * i + 70 - i)).save(path)


def indexed(folder):
    build_index(folder / "data", folder / "images.idx", progress=False)
    return open_index(folder / "images.idx")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    write_classes(folder / "data")
    return indexed(folder)


def config(**options):
    chosen = {"image_size": (32, 48), "num_workers": 0, "tail": "wrap", "pipeline": "torch", **options}
    return DataConfig.model_validate(chosen)


def training(index, *, augment=None, batch_size=4, rank=0, world_size=1, first_step=0, num_steps=4, **options):
    return make_labelled_loader(
        config(**options),
        augment or AugmentConfig(),
        index,
        batch_size=batch_size,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        num_steps=num_steps,
    )


def evaluation(index, *, batch_size=4, rank=0, world_size=1, **options):
    return make_eval_loader(config(**options), index, batch_size=batch_size, rank=rank, world_size=world_size)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert_equal(one, two)


VALUES = "images", "labels", "sample", "epoch"


def assert_equal(one, two):
    for name in VALUES:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def joined(shares):
    """One batch of the shares of all ranks."""
    parts = {name: torch.cat([getattr(share, name) for share in shares]) for name in VALUES}
    return Batch(**parts, token_images=None, bad=[entry for share in shares for entry in share.bad])


def labels_of(batch: Batch) -> torch.Tensor:
    assert batch.labels is not None and batch.token_images is None
    return batch.labels


# ---- training


def test_training_batches(index):
    whole = list(training(index))
    samples = torch.cat([batch.sample for batch in whole])
    assert sorted(samples[:NUM_IMAGES].tolist()) == list(range(NUM_IMAGES))
    for batch in whole:
        assert batch.images.shape == (4, 32, 48, 3) and batch.images.dtype == torch.uint8
        assert labels_of(batch).dtype == torch.int64
        assert [f"class_{label}" for label in labels_of(batch)] == [
            index.path(i).parent.name for i in batch.sample.tolist()
        ]


@pytest.mark.parametrize("pipeline", ["torch", "pillow"])
def test_resume_ranks_and_workers_change_nothing(index, pipeline):
    whole = list(training(index, pipeline=pipeline))
    assert whole[2].epoch.tolist() == [0, 0, 0, 1]
    assert_same(training(index, pipeline=pipeline, first_step=2), whole[2:])
    assert_same(training(index, pipeline=pipeline, num_workers=2), whole)
    for world_size in (2, 4):
        ranks = [training(index, pipeline=pipeline, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert_same(map(joined, zip(*ranks, strict=True)), whole)


def test_a_view_is_cropped_resized_mirrored_and_augmented(index):
    """The chain restated, in Pillow; jitter is left out."""
    mean = (0.9, 0.2, 0.4)
    plans = Plans(config(), index, 1, SEED, 0, 1)
    for batch in training(index, pipeline="pillow", mean=mean, jitter=1.0):
        for view, i, epoch in zip(batch.images.numpy(), batch.sample.tolist(), batch.epoch.tolist(), strict=True):
            plan = plans.augment(np.array([i]), np.array([epoch]))[0]
            top, left, height, width = plan["crop_box"].tolist()
            with Image.open(index.path(i)) as image:
                crop = image.crop((left, top, left + width, top + height))
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan["flip"] else crop
            resized = np.asarray(crop.resize((48, 32), Image.Resampling.BICUBIC))
            steps = draw_steps(SEED, epoch, i, 2, 9, 0.5)[0]
            assert np.array_equal(rand_augment(resized, steps, (230, 51, 102)), view)


def test_without_operations_it_is_pre_trainings_view(index):
    options = {"pipeline": "torch", "jitter": 0.3, "crop_scale": (0.5, 1)}
    given = make_loader(
        config(**options),
        index,
        token_size=None,
        batch_size=4,
        seed=SEED,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=4,
    )
    bare = training(index, augment=AugmentConfig(num_ops=0), **options)
    for one, two in zip(bare, given, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.sample, two.sample)


def test_augmentation_is_as_configured(index):
    plain = training(index, augment=AugmentConfig(num_ops=0), jitter=0, num_steps=1)
    (plain,) = plain
    for augment in (AugmentConfig(), AugmentConfig(num_ops=3, magnitude=2, magnitude_std=0)):
        (batch,) = training(index, augment=augment, num_steps=1)
        for row in range(4):
            settings = augment.num_ops, augment.magnitude, augment.magnitude_std
            steps = draw_steps(SEED, int(batch.epoch[row]), int(batch.sample[row]), *settings)[0]
            wanted = rand_augment(plain.images[row].numpy(), steps, fill_of((0.5, 0.5, 0.5)))
            assert np.array_equal(batch.images[row], wanted)
        assert not torch.equal(batch.images, plain.images)


def test_a_bad_image_is_replaced_with_its_label(tmp_path):
    write_classes(tmp_path / "data")
    index = indexed(tmp_path)
    index.path(3).write_bytes(b"?")  # the last of class 0
    (batch,) = training(index, batch_size=NUM_IMAGES, num_steps=1)
    assert [row for row, _ in batch.bad] == [3] and "03.png" in batch.bad[0][1]
    assert sorted(batch.sample.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    assert [f"class_{label}" for label in labels_of(batch)] == [
        index.path(i).parent.name for i in batch.sample.tolist()
    ]
    # with the augmentation of the image that is shown
    first, second = batch.images[batch.sample == 4]
    assert torch.equal(first, second)


# ---- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_every_image_is_evaluated_once_in_order(index, world_size, batch_size):
    ranks = [list(evaluation(index, batch_size=batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    # who waits for one another after every batch must get equally many
    assert {len(batches) for batches in ranks} == {-(-NUM_IMAGES // batch_size)}
    together = joined([joined(shares) for shares in zip(*ranks, strict=True)])
    assert together.sample.tolist() == list(range(NUM_IMAGES)) and not together.epoch.any()
    assert labels_of(together).tolist() == [i * 3 // NUM_IMAGES for i in range(NUM_IMAGES)] and together.bad == []
    (whole,) = evaluation(index, batch_size=NUM_IMAGES)
    assert_equal(together, whole)


def test_workers_evaluate_the_same(index):
    assert_same(evaluation(index, num_workers=2), evaluation(index))
    assert_same(evaluation(index, pipeline="pillow"), evaluation(index))


def test_bad_images_are_left_out_of_evaluation(tmp_path):
    write_classes(tmp_path / "data")
    index = indexed(tmp_path)
    index.path(4).write_bytes(b"?")
    index.path(8).unlink()
    index.path(9).write_bytes(b"?")
    batches = list(evaluation(index, batch_size=2))
    assert [batch.sample.tolist() for batch in batches] == [[0, 1], [2, 3], [5], [6, 7], [], [10]]
    assert [[row for row, _ in batch.bad] for batch in batches] == [[], [], [4], [], [8, 9], []]
    assert all(len(batch.images) == len(labels_of(batch)) == len(batch.epoch) == len(batch.sample) for batch in batches)
    assert "04.png" in batches[2].bad[0][1]
    (whole,) = evaluation(index, batch_size=NUM_IMAGES)
    assert_equal(joined(batches), whole)


def test_dali_makes_the_views_and_what_follows_is_the_same(index):
    """The same images, boxes, labels and operations; pixels of another decoder's crop, resized."""
    pytest.importorskip("nvidia.dali")
    bare = AugmentConfig(num_ops=0)
    plain = joined(list(training(index, augment=bare, jitter=0, pipeline="dali")))
    mine = joined(list(training(index, augment=bare, jitter=0)))
    assert torch.equal(plain.sample, mine.sample) and torch.equal(labels_of(plain), labels_of(mine))
    # two resizes of bytes, each with its own rounding and filter: levels of 255 on average
    assert (plain.images.float() - mine.images.float()).abs().mean() < 4
    augment = AugmentConfig()
    whole = joined(list(training(index, pipeline="dali", augment=augment)))
    drawn = draw_steps(
        SEED, whole.epoch.numpy(), whole.sample.numpy(), augment.num_ops, augment.magnitude, augment.magnitude_std
    )
    changed = 0
    for row, steps in enumerate(drawn):
        wanted = rand_augment(plain.images[row].numpy(), steps, fill_of((0.5, 0.5, 0.5)))
        assert np.array_equal(whole.images[row].numpy(), wanted)
        changed += not np.array_equal(wanted, plain.images[row].numpy())
    assert changed
    assert_same(training(index, pipeline="dali", num_workers=2), [*training(index, pipeline="dali")])


# ---- what cannot be used


@pytest.mark.parametrize("make", [training, evaluation])
def test_an_image_without_label_is_refused_at_once(tmp_path, make):
    write_classes(tmp_path / "data")
    for name in ("a.png", "b.png"):
        shutil.copyfile(tmp_path / "data" / "class_0" / "00.png", tmp_path / "data" / name)
    index = indexed(tmp_path)
    with pytest.raises(
        DataError, match=r"2 of 13 images have no label, such as '.*/data/a.png'; give each one"
    ) as caught:
        make(index)
    assert caught.value.exit_code == 66


def test_what_cannot_be_batched_is_refused_at_once(index):
    with pytest.raises(ConfigError, match="tail=wrap"):
        training(index, batch_size=12, tail="drop")
    with pytest.raises(ConfigError, match="batch_size 4 is not a multiple of the 3 ranks"):
        training(index, world_size=3)


@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_that_vanished_ends_the_run(tmp_path, make, num_workers):
    write_classes(tmp_path / "data")
    batches = make(indexed(tmp_path), num_workers=num_workers)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"data' is gone, or not mounted") as caught:
        list(batches)
    assert caught.value.exit_code == 66


# ---- the middle of an image


def official(image, size):
    """Authors' transform, torchvision's Resize(int) and CenterCrop written out in Pillow's calls."""
    short = int(size / (224 / 256 if size < 384 else 1.0))
    width, height = image.size
    resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    top, left = int(round((image.height - size) / 2.0)), int(round((image.width - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size)))


# the recipe's sizes, and one whose resized side is no whole number
@pytest.mark.parametrize("size", [224, 384, 512, 50])
def test_the_middle_is_the_authors(size):
    china = decode_reference(photos.CHINA.read_bytes(), (427, 640))
    # lying, standing, square, odd by a pixel, much smaller than the crop, a line
    shapes = [(0, 0, 640, 427), (100, 0, 320, 427), (0, 0, 400, 400), (0, 0, 301, 300), (5, 5, 25, 22), (0, 0, 640, 9)]
    for image in map(china.crop, shapes):
        middle = centre_crop(image, (size, size))
        assert middle.shape == (size, size, 3) and np.array_equal(middle, official(image, size))


def test_photos_are_evaluated_as_by_the_authors(tmp_path):
    photos.copy_photos(tmp_path / "data" / "photo")
    index = indexed(tmp_path)
    for pipeline in ("torch", "pillow"):
        (batch,) = evaluation(index, batch_size=len(index), image_size=224, pipeline=pipeline)
        for view, i in zip(batch.images.numpy(), batch.sample.tolist(), strict=True):
            with Image.open(index.path(i)) as image:
                assert np.array_equal(view, official(image.convert("RGB"), 224)), index.path(i).name


def test_a_middle_that_is_not_square():
    # a picture of coordinates: red grows by 1 a column, green by 2 a row
    y, x = np.mgrid[:100, :200]
    image = Image.fromarray(np.stack([x, 2 * y, 0 * x], axis=2).astype(np.uint8))
    for size, columns, rows in [
        ((64, 32), 100 / 64 * 32, 100),
        ((32, 128), 200, 200 / 128 * 32),
        ((50, 100), 200, 100),
    ]:
        red, green, _ = centre_crop(image, size)[2:-2, 2:-2].astype(float).transpose(2, 0, 1)
        # in the middle of the image, and seven eighths of what could be seen of it
        assert abs(red.mean() - 99.5) < 1.5 and abs(green.mean() / 2 - 49.5) < 1.5
        assert abs(np.diff(red, axis=1).mean() * size[1] - columns * 0.875) < 3
        assert abs(np.diff(green, axis=0).mean() / 2 * size[0] - rows * 0.875) < 3


def test_a_line_of_pixels_does_not_fill_the_memory(monkeypatch):
    whole, resized = Image.Image.resize, []

    def watched(image, size, *args, **options):
        resized.append(size[0] * size[1])
        assert resized[-1] <= labelled.MAX_PIXELS
        return whole(image, size, *args, **options)

    # it would be resized to 256 x 4 194 304 pixels, 3 GB
    line = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1, 16384, 3), np.uint8))
    photo = photos.small_photo()
    monkeypatch.setattr(Image.Image, "resize", watched)
    middle = centre_crop(line, (224, 224))
    assert resized == [224 * 224] and np.ptp(middle, axis=0).max() == 0
    # what is made then is the same, but for rounding
    monkeypatch.setattr(labelled, "MAX_PIXELS", 64 * 64)
    for image in (line.crop((0, 0, 900, 1)), photo):
        limited = centre_crop(image, (64, 64)).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", whole)
            assert np.abs(limited - official(image, 64)).max() <= 1
