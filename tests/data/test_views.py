"""What the views look like: those of Pillow, which makes them as the authors do."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.config.sections import DataConfig
from fastbeit.data.decode import Decoded, check, decode, decode_reduced, decode_reference, mean_grey
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_token_loader
from fastbeit.data.plans import Plans
from fastbeit.data.views import PLAN, Rule, jitter, pillow_views, reduction, torch_views
from fastbeit.tokenizer.disk import load_tokenizer
from helpers import photos
from helpers.loading import PIPELINES, batches, photo_index, psnr


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return photo_index(tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def large_index(tmp_path_factory):
    """Photos of 4 and 17 megapixels, and small ones, as JPEG: decoded whole, at 1/2, at 1/4 and at 1/8."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "photos").mkdir()
    for path, zoom in [(photos.CHINA, 4), (photos.CHINA, 8), (photos.SKLEARN / "flower.jpg", 2)]:
        with Image.open(path) as image:
            larger = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.LANCZOS)
        larger.save(folder / "photos" / f"{path.stem}_{zoom}.jpg", quality=90)
    build_index(folder / "photos", folder / "images.idx", progress=False)
    return open_index(folder / "images.idx")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("", torch.device("cpu"), torch.float32)


# bounds in dB of the means, of small and of large photos. Without jitter rounding alone (measured: torch 72, DALI 56)
# and the smaller pictures that torch takes of large photos (measured: 52); with it, clipping before or after the resize
# (measured: 47 to 49, of large photos 43 to 46)
JITTERS = {
    "plain": ({"jitter": 0}, 50, 48),
    "full_image": ({"jitter_on": "full_image"}, 38, 38),
    "crop": ({"jitter_on": "crop"}, 38, 38),
}


@pytest.mark.parametrize("jitter", list(JITTERS))
@pytest.mark.parametrize("kind", ["small", "large"])
def test_pipelines_agree_with_the_reference(index, large_index, tokenizer, kind, jitter, say):
    options, bound, large_bound = JITTERS[jitter]
    if kind == "large":
        index, bound = large_index, large_bound
    shape = {"image_size": 224, "token_size": (112, 112)}
    options = {**shape, "batch_size": len(index), "num_steps": 3, **options}
    wanted = batches(index, pipeline="pillow", **options)
    words = [tokenizer.encode(batch.token_images) for batch in wanted]
    for pipeline in ("torch", "dali"):
        found = batches(index, pipeline=pipeline, **options)
        ratios = {
            view: np.concatenate([psnr(getattr(a, view), getattr(b, view)) for a, b in zip(found, wanted, strict=True)])
            for view in ("images", "token_images")
        }
        equal = [tokenizer.encode(a.token_images) == b for a, b in zip(found, words, strict=True)]
        share = torch.cat(equal).float().mean().item()
        means = ", ".join(
            f"{view} {values.mean():.1f} dB (least {values.min():.1f})" for view, values in ratios.items()
        )
        say(f"{pipeline}, {kind} photos, {jitter}: {means}, equal tokens {share:.1%}")
        assert all(values.mean() >= bound and values.min() >= bound - 15 for values in ratios.values())
        assert share >= 0.85


def test_lanczos_by_pillow_gives_the_same_tokens(index, tokenizer, say, monkeypatch):
    """As before PyTorch 2.13, whose Lanczos is a level away in one pixel of a hundred."""
    options = {"image_size": 224, "token_size": (112, 112), "batch_size": len(index), "num_steps": 3}
    here = batches(index, **options)
    monkeypatch.setattr("fastbeit.data.views.TORCH_FILTERS", {"bicubic"})
    there = batches(index, **options)
    equal = [
        tokenizer.encode(a.token_images) == tokenizer.encode(b.token_images) for a, b in zip(here, there, strict=True)
    ]
    share = torch.cat(equal).float().mean().item()
    say(f"Lanczos by torch against Pillow: equal tokens {share:.2%}")
    assert share > 0.98 and all(torch.equal(a.images, b.images) for a, b in zip(here, there, strict=True))


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
        rule = Rule((64, 64), None, "full_image")
        ours = torch_views(lambda reduce: Decoded(np.asarray(image), (image.height, image.width), 1), plan, rule)
        return ours[0].astype(int), pillow_views(image, plan, rule)[0].astype(int)

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


# ---- jitter on the crop


def test_jitter_on_the_crop_sees_the_crop_alone(index):
    """Without contrast a crop is as grey as itself, or as the whole image."""
    size = int(index.heights[0]), int(index.widths[0])
    data = index.read_bytes(0)
    image = decode_reference(data, size)
    plan = np.zeros(1, PLAN)[0]
    plan["crop_box"], plan["order"], plan["factors"] = (10, 20, 100, 120), (1, 0, 2), (1, 0, 1)
    whole, crop = (round(np.asarray(part.convert("L")).mean()) for part in (image, image.crop((20, 10, 140, 110))))
    assert abs(whole - crop) > 5
    for jitter_on, grey in (("full_image", whole), ("crop", crop)):
        rule = Rule((64, 64), (32, 32), jitter_on)
        for views in (
            pillow_views(image, plan, rule),
            torch_views(lambda reduce: decode_reduced(data, size, reduce), plan, rule),
        ):
            # a resize keeps the mean but for what it rounds
            assert all(np.unique(view).size == 1 and abs(int(view[0, 0, 0]) - grey) <= 1 for view in views)


def test_what_jitter_on_the_crop_changes(index, tokenizer, say):
    """Jitter on the crop is another recipe, not a rounding."""
    shape = {"image_size": 224, "token_size": (112, 112), "batch_size": len(index), "num_steps": 3}
    full, crop = (batches(index, pipeline="pillow", jitter_on=on, **shape) for on in ("full_image", "crop"))
    pairs = list(zip(full, crop, strict=True))
    change = np.mean([(a.images.int() - b.images.int()).abs().float().mean().item() for a, b in pairs])
    words = [tokenizer.encode(a.token_images) == tokenizer.encode(b.token_images) for a, b in pairs]
    share = torch.cat(words).float().mean().item()
    say(f"jitter_on=crop against full_image: {change:.2f} levels a pixel on average, equal tokens {share:.1%}")
    assert 0.5 < change < 5


def test_dali_jitters_as_the_torch_pipeline(index):
    dali = pytest.importorskip("fastbeit.data.dali_graph")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 15, 21), np.uint8))
    plans = Plans(DataConfig(), index, 1, 0, 0, 1).augment(np.zeros(8, np.int64), np.arange(8))
    for grey in (np.linspace(60, 200, 8), None):
        made = dali.jitter(images, dali.jitter_rounds(plans, grey))
        for row, plan in enumerate(plans):
            ours = jitter(images[row].numpy(), plan, None if grey is None else grey[row])
            # sums of float32 in another order, rounded down: a level where they meet a whole number
            difference = np.abs(made[row].int().numpy() - ours)
            assert difference.max() <= 1 and (difference > 0).mean() < 0.001


# ---- smaller pictures


@pytest.mark.parametrize(
    "box, size, wanted",
    [
        ((0, 0, 671, 900), (224, 224), 1),
        ((0, 0, 672, 900), (224, 224), 2),
        ((0, 0, 672, 900), (448, 224), 1),
        ((0, 0, 5000, 1344), (224, 224), 4),
        ((0, 0, 9000, 9000), (224, 224), 8),
    ],
)
def test_reduction(box, size, wanted):
    assert reduction(box, size) == wanted


def test_a_reduced_picture_shows_the_same_places():
    """A box that begins between two pixels of the smaller picture is not moved."""
    data = photos.CHINA.read_bytes()
    plan = np.zeros(1, PLAN)[0]
    plan["order"], plan["factors"] = (0, 1, 2), (1, 1, 1)
    rule = Rule((48, 48), (24, 24), "full_image")
    for top, left, height, width in [(0, 0, 427, 640), (3, 5, 301, 333), (101, 7, 323, 329)]:
        plan["crop_box"] = top, left, height, width
        assert reduction(plan["crop_box"].tolist(), rule.image_size) == 4
        small = torch_views(lambda reduce: decode_reduced(data, (427, 640), reduce), plan, rule)
        whole = torch_views(lambda reduce: Decoded(decode(data, (427, 640)), (427, 640), 1), plan, rule)
        for ours, theirs in zip(small, whole, strict=True):
            assert psnr(torch.from_numpy(ours)[None], torch.from_numpy(theirs)[None]) > 38
            shifted = torch.from_numpy(np.roll(theirs, 1, axis=1))[None]
            assert psnr(torch.from_numpy(ours)[None], shifted) < 25


@pytest.mark.parametrize("token_size", [(32, 32), (112, 80)], ids=["smaller", "larger"])
@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_view_does_not_depend_on_the_others(large_index, pipeline, token_size):
    """Also where the token view is larger than the patch view, and wants a larger picture."""
    options = {
        "pipeline": pipeline,
        "image_size": (64, 64),
        "batch_size": len(large_index),
        "num_steps": 2,
        "num_crops": 2,
    }
    both = batches(large_index, token_size=token_size, **options)
    alone = batches(large_index, token_size=None, **options)
    data = DataConfig.model_validate({"pipeline": pipeline, "image_size": (64, 64), "num_crops": 2, "num_workers": 0})
    rows = [range(len(large_index))]
    (tokens,) = make_token_loader(data, large_index, token_size=token_size, seed=5, rows=rows, together=len(rows[0]))
    for step, (one, two) in enumerate(zip(both, alone, strict=True)):
        assert torch.equal(one.images, two.images)
        assert one.token_images is not None and torch.equal(one.token_images, tokens.images[one.sample, step])


def test_the_whole_image_is_as_grey_from_its_smallest_picture():
    data, size = photos.CHINA.read_bytes(), (427, 640)
    exact = np.asarray(decode_reference(data, size)).astype(np.float64).mean(axis=(0, 1)) @ [0.299, 0.587, 0.114]
    assert mean_grey(decode(data, size), size) == pytest.approx(exact, abs=1e-9)
    for reduce in (2, 4, 8):
        picture = decode_reduced(data, size, reduce)
        assert picture.pixels.shape == (-(-427 // reduce), 640 // reduce, 3)
        # contrast takes whole levels of it
        assert picture.mean_grey == pytest.approx(exact, abs=0.5)
    assert check(data, size).mean_grey == pytest.approx(exact, abs=0.5)
