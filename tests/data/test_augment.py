import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_sampling import Replay, same_distribution

from fastbeit.config.finetune import AugmentConfig
from fastbeit.config.read import configure
from fastbeit.data.augment import ERASE_TRIES, OPS, STEP, draw_erasures, draw_steps, erase_, fill_of, rand_augment
from fastbeit.data.sampling import Purpose, philox, uniform
from fastbeit.errors import ConfigError
from helpers import photos

FILL = 128, 120, 90
BICUBIC = Image.Resampling.BICUBIC
SIGNED = "rotate color contrast brightness sharpness shear_x shear_y shift_x shift_y".split()
AREA, LOG_RATIO = (0.02, 1 / 3), (math.log(0.3), math.log(1 / 0.3))


def by_value(function):
    """An operation on each value alone, [h, w, 3] int in and out."""
    return lambda image, m: function(np.asarray(image).astype(int), m)


def stretched(values):
    """Of each channel the darkest value becomes 0 and the brightest 255."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return np.floor((values - low) * (255 / (high - low)) + 1e-9).clip(0, 255)


def equalized(values):
    """Of each channel every step of as many pixels as a 255th part (without its brightest value) is one level."""
    result = np.empty_like(values)
    for channel in range(3):
        histogram = np.bincount(values[..., channel].ravel(), minlength=256)
        part = (histogram.sum() - histogram[histogram.nonzero()[0][-1]]) // 255
        result[..., channel] = ((part // 2 + histogram.cumsum() - histogram) // part).clip(0, 255)[values[..., channel]]
    return result


def blended(enhancer):
    return lambda image, m: enhancer(image).enhance(max(0.1, 1.0 + m / 10 * 0.9))


def affine(matrix):
    return lambda image, m: image.transform(
        image.size, Image.Transform.AFFINE, matrix(image, m / 10), BICUBIC, fillcolor=FILL
    )


# timm's `rand-m9-mstd0.5-inc1`, by a magnitude in [-10, 10]
TIMM = {
    "auto_contrast": by_value(lambda v, m: stretched(v)),
    "equalize": by_value(lambda v, m: equalized(v)),
    "invert": by_value(lambda v, m: 255 - v),
    "rotate": lambda image, m: image.rotate(m / 10 * 30, resample=BICUBIC, fillcolor=FILL),
    "posterize": by_value(lambda v, m: v - v % 2 ** (4 + int(m / 10 * 4))),
    "solarize": by_value(lambda v, m: np.where(v < 256 - int(m / 10 * 256), v, 255 - v)),
    "solarize_add": by_value(lambda v, m: np.where(v < 128, v + int(m / 10 * 110), v)),
    "color": blended(ImageEnhance.Color),
    "contrast": blended(ImageEnhance.Contrast),
    "brightness": blended(ImageEnhance.Brightness),
    "sharpness": blended(ImageEnhance.Sharpness),
    "shear_x": affine(lambda image, s: (1, s * 0.3, 0, 0, 1, 0)),
    "shear_y": affine(lambda image, s: (1, 0, 0, s * 0.3, 1, 0)),
    "shift_x": affine(lambda image, s: (1, 0, s * 0.45 * image.width, 0, 1, 0)),
    "shift_y": affine(lambda image, s: (1, 0, 0, 0, 1, s * 0.45 * image.height)),
}
NAMES = list(TIMM)


def steps_of(*named):
    """[n] records of STEP from names and magnitudes."""
    return np.array([(NAMES.index(name), magnitude / 10) for name, magnitude in named], STEP)


# ---- RandAugment


# none, a little, the recipe's mean, what int() cuts, the most
@pytest.mark.parametrize("magnitude", [0, 0.7, 5, 9, 9.77, 10])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_timms(name, magnitude):
    assert len(OPS) == len(TIMM) and OPS[NAMES.index(name)].signed == (name in SIGNED)
    for photo in (photos.small_photo(), photos.small_photo(61, 43).crop((5, 9, 40, 50))):
        for sign in (1, -1) if name in SIGNED else (1,):
            found = rand_augment(np.asarray(photo), steps_of((name, sign * magnitude)), FILL)
            assert np.array_equal(found, np.asarray(TIMM[name](photo, sign * magnitude))), sign


def test_the_restated_lookup_tables_are_pillows():
    photo = photos.small_photo()
    for name, pillows in ("auto_contrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize):
        assert np.array_equal(TIMM[name](photo, 0), np.asarray(pillows(photo)))
    # at magnitude 10 timm asks Pillow for no bits, which Pillow 13 refuses
    assert not rand_augment(np.asarray(photo), steps_of(("posterize", 10)), FILL).any()


def test_what_comes_in_from_outside_is_filled():
    view = np.asarray(photos.small_photo(100, 100))
    right = rand_augment(view, steps_of(("shift_x", 10 * 20 / 45)), FILL)
    assert np.array_equal(right[:, :80], view[:, 20:]) and (right[:, 80:] == FILL).all()
    down = rand_augment(view, steps_of(("shift_y", -10 * 20 / 45)), FILL)
    assert np.array_equal(down[20:], view[:80]) and (down[:20] == FILL).all()
    assert (rand_augment(view, steps_of(("rotate", 9)), FILL)[0, 0] == FILL).all()


def test_steps_follow_one_another():
    photo = photos.small_photo()
    steps = steps_of(("solarize", 6), ("invert", 0), ("brightness", -9))
    steps[1]["op"] = -1
    wanted = TIMM["brightness"](Image.fromarray(TIMM["solarize"](photo, 6).astype(np.uint8)), -9)
    assert np.array_equal(rand_augment(np.asarray(photo), steps, FILL), wanted)
    view = np.asarray(photo)
    assert rand_augment(view, steps[1:2], FILL) is view


def test_the_colour_outside_is_the_mean():
    # 127.5 is rounded to even, as by Python's round in timm
    assert fill_of((0.5, 0.5, 0.5)) == (128, 128, 128)
    assert fill_of((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert fill_of((-0.1, 1.5, 0)) == (0, 255, 0)


def test_steps_are_distributed_as_timms():
    n = 30_000
    steps = draw_steps(0, 3, np.arange(n), 2, 9, 0.5)
    assert steps.shape == (n, 2)
    rng, both = random.Random(0), []
    for turn in range(2):
        chosen = steps[:, turn][steps["op"][:, turn] >= 0]
        assert abs(len(chosen) - n / 2) < 4 * math.sqrt(n / 4)
        counts = np.bincount(chosen["op"], minlength=15)
        assert len(counts) == 15 and ((counts - n / 30) ** 2 / (n / 30)).sum() < 45  # chi-square of 14, one in 10 000
        magnitudes = [max(0, min(10, rng.gauss(9, 0.5))) for _ in range(n)]
        assert same_distribution(np.abs(chosen["strength"]) * 10, magnitudes)
        assert (np.abs(chosen["strength"]) == 1).mean() > 0.015
        signed = np.isin(chosen["op"], [NAMES.index(name) for name in SIGNED])
        assert (chosen["strength"][~signed] > 0).all()
        assert abs((chosen["strength"][signed] < 0).mean() - 0.5) < 4 * math.sqrt(0.25 / signed.sum())
        both += [steps["op"][:, turn], np.abs(steps["strength"][:, turn]), steps["strength"][:, turn] < 0]
    # the second operation knows nothing of the first, nor strength of kind
    related = np.corrcoef(np.array(both, float))
    assert np.abs(related[:3, 3:]).max() < 0.025 and abs(related[0, 1]) < 0.025


def test_magnitudes_are_as_configured():
    assert set(np.abs(draw_steps(0, 0, np.arange(500), 3, 7, 0)["strength"]).ravel()) == {0.7}
    wide = np.abs(draw_steps(0, 0, np.arange(2000), 1, 5, 100)["strength"])
    assert wide.min() == 0 and wide.max() == 1
    assert draw_steps(0, 0, np.arange(4), 0, 9, 0.5).shape == (4, 0)


def test_steps_depend_on_the_key_alone():
    samples = np.arange(50)
    steps = draw_steps(0, 4, samples, 2, 9, 0.5)
    assert np.array_equal(draw_steps(0, 4, samples[::-1], 2, 9, 0.5), steps[::-1])
    assert np.array_equal(draw_steps(0, 4, samples, 1, 9, 0.5), steps[:, :1])
    for seed, epoch in [(1, 4), (0, 5)]:
        assert (draw_steps(seed, epoch, samples, 2, 9, 0.5)["op"] != steps["op"]).mean() > 0.3
    # a resumed run holds to what it drew: pinned
    pinned = draw_steps(1, 2, np.arange(3), 2, 9, 0.5)
    assert pinned["op"].tolist() == [[10, -1], [-1, 1], [-1, 5]]
    assert pinned["strength"].round(6).tolist() == [[-1.0, 0.89606], [0.849028, 0.911538], [0.897274, 0.860761]]


def test_the_defaults_are_the_recipe():
    assert configure(AugmentConfig, []).model_dump() == {
        "num_ops": 2,
        "magnitude": 9.0,
        "magnitude_std": 0.5,
        "erase": 0.25,
        "repeats": 1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_prob": 1.0,
        "cutmix_share": 0.5,
        "smoothing": 0.1,
    }
    for wrong in ("magnitude=11", "magnitude_std=-1", "erase=1.1", "num_ops=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            configure(AugmentConfig, [wrong])


# ---- random erasing


def timms_box(draws, height, width):
    """timm's RandomErasing._erase, with the numbers of `draws`."""
    for _ in range(10):
        area = draws.uniform(*AREA) * height * width
        ratio = math.exp(draws.uniform(*LOG_RATIO))
        h, w = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
        if w < width and h < height:
            return draws.randint(0, height - h), draws.randint(0, width - w), h, w
    return 0, 0, 0, 0


# square; flat, where tries fail; so small that all or most fail
@pytest.mark.parametrize("height, width", [(224, 224), (32, 200), (1, 1), (2, 5), (8, 8)])
def test_boxes_follow_timms_rule_draw_by_draw(height, width):
    samples = np.arange(200)
    boxes = draw_erasures(5, 2, samples, (height, width), 0.7)
    draws = uniform(5, Purpose.ERASE_BOX, 2, samples, 4 + 4 * ERASE_TRIES)
    for box, (coin, _, _, _, *tries) in zip(boxes.tolist(), draws.tolist(), strict=True):
        assert tuple(box) == (timms_box(Replay(tries), height, width) if coin < 0.7 else (0, 0, 0, 0))
    assert boxes.dtype == np.int64 and boxes[:, 2:].any() == (height > 1)


def test_boxes_are_distributed_as_timms():
    n, rng = 20_000, random.Random(0)
    boxes = draw_erasures(0, 0, np.arange(n), (224, 224), 0.25)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) - n / 4) < 4 * math.sqrt(n * 3 / 16)
    timms = np.array([timms_box(rng, 224, 224) for _ in range(5000)])
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "bottom": lambda b: b[:, 0] + b[:, 2],
        "right": lambda b: b[:, 1] + b[:, 3],
    }.items():
        assert same_distribution(measure(erased), measure(timms)), name
    assert (draw_erasures(0, 0, np.arange(500), (224, 224), 1)[:, 2] > 0).all()
    assert not draw_erasures(0, 0, np.arange(500), (224, 224), 0).any()


def test_boxes_depend_on_the_key_alone():
    samples = np.arange(100)
    boxes = draw_erasures(0, 4, samples, (64, 48), 0.5)
    assert np.array_equal(draw_erasures(0, 4, samples[::-1], (64, 48), 0.5), boxes[::-1])
    for seed, epoch in [(1, 4), (0, 5)]:
        assert not np.array_equal(draw_erasures(seed, epoch, samples, (64, 48), 0.5), boxes)
    assert draw_erasures(1, 2, np.arange(3), (64, 48), 1).tolist() == [[13, 3, 23, 32], [34, 23, 19, 7], [6, 2, 17, 45]]


def wanted_noise(seed, epoch, sample, size):
    """[height, width, 3] float64: Box and Muller's numbers of Philox's words, 24 bits of each."""
    words = philox(seed, np.arange(size[0] * size[1]), Purpose.ERASE_NOISE, epoch, sample) >> np.uint64(8)
    radius = np.sqrt(-2 * np.log((words[:, [0, 2]] + 1) / 2**24))
    angle = 2 * np.pi * (words[:, [1, 3]] / 2**24)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1, 4)
    return pairs[:, :3].reshape(*size, 3)


def erased(device, dtype=torch.float32, *, probability=0.6, n=12, size=(40, 56)):
    images = torch.randn(n, *size, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    epoch, sample = np.arange(n) // 7 + 3, np.arange(n) * 5 % 11
    boxes = draw_erasures(9, epoch, sample, size, probability)
    after = images.clone()
    assert erase_(after, boxes, 9, epoch, sample) is after
    return images, after, boxes, epoch, sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_box_is_noise_and_the_rest_untouched(device, dtype):
    before, after, boxes, epoch, sample = erased(device, dtype)
    assert 2 < (boxes[:, 2] > 0).sum() < 12
    for i, (top, left, height, width) in enumerate(boxes):
        wanted = before[i].double().cpu().numpy()
        inside = np.s_[top : top + height, left : left + width]
        wanted[inside] = wanted_noise(9, epoch[i], sample[i], wanted.shape[:2])[inside]
        # float32 rounds logarithm and angle, bfloat16 keeps 8 bits
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * np.abs(wanted).max()
        assert np.abs(after[i].double().cpu().numpy() - wanted).max() < tolerance
        outside = torch.ones(before.shape[1:3], dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(after[i][outside], before[i][outside])


def test_noise_is_normal_and_ever_new(device):
    boxes = np.tile([0, 0, 64, 64], (4, 1))
    noise = torch.zeros(4, 64, 64, 3, device=device)
    erase_(noise, boxes, 1, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    noise = noise.cpu().numpy()
    rng = np.random.default_rng(0)
    assert same_distribution(noise.ravel(), rng.normal(size=100_000))
    # images, channels and neighbours are unrelated; 16 384 pixels deviate by 0.008
    assert np.abs(np.corrcoef(noise.reshape(4, -1)) - np.eye(4)).max() < 0.04
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.04
    assert abs(np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]) < 0.04


def test_noise_depends_on_the_key_alone(device):
    before, after, boxes, epoch, sample = erased(device)
    order = np.arange(12)[::-1].copy()
    shuffled = before[order.tolist()].clone()
    erase_(shuffled, boxes[order], 9, epoch[order], sample[order])
    assert torch.equal(shuffled, after[order.tolist()])


def test_nothing_to_erase(device):
    before, after, *_ = erased(device, probability=0)
    assert torch.equal(before, after)
    images = torch.zeros(0, 8, 8, 3, device=device)
    assert erase_(images, np.zeros((0, 4), np.int64), 0, np.zeros(0, np.int64), np.zeros(0, np.int64)) is images
