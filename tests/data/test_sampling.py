import math
import random

import numpy as np
import pytest
import torch

from fastbeit.config.sections import ModelConfig
from fastbeit.data.sampling import (
    JITTER_ORDERS,
    WINDOW_BLOCKS,
    Purpose,
    crop_of,
    draw_crops,
    draw_flips,
    draw_jitters,
    drop_path_keep,
    philox,
    rows_at,
    uniform,
)

MAX = 2**32 - 1
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def same_distribution(a, b) -> bool:
    """Two-sample Kolmogorov-Smirnov at a false alarm in 10 000; seeds are fixed, so it never flickers."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)).max()
    return distance < math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers that come with Random123
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MAX] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert [f"{word:08x}" for word in philox(key, *counter)] == words.split()


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**63 - 1])
def test_philox_is_tritons(device, seed):
    triton = pytest.importorskip("triton")
    from helpers.philox_kernel import philox_kernel

    counters = np.random.default_rng(0).integers(0, 2**32, (4, 100))
    counters[:, 0], counters[:, 1] = 0, MAX
    words = torch.zeros(4, 100, dtype=torch.int64, device=device)
    philox_kernel[(1,)](torch.from_numpy(counters).to(device), words, seed, 100, BLOCK=triton.next_power_of_2(100))
    assert np.array_equal(words.cpu().numpy().T, philox(seed, *counters).astype(np.int64))


def test_uniform_takes_the_words_in_order():
    draws = uniform(3, Purpose.MASK, 5, np.array([11, 12]), 10)
    words = [philox(3, draw, Purpose.MASK, 5, 12) for draw in range(3)]
    assert np.array_equal(draws[1], np.concatenate(words)[:10] / 2**32)
    assert np.array_equal(uniform(3, Purpose.MASK, 5, np.array([11, 12]), 6, first_draw=4), draws[:, 4:])
    assert same_distribution(uniform(0, Purpose.MASK, 0, np.arange(1000), 8).ravel(), np.arange(10_000) / 10_000)


# plain files; shards of whole and of broken blocks, in less and in more than a window
ORDERS = [(1, 1), (2, 1), (3, 1), (1000, 1), (1000, 10), (1003, 10), (37, 1024), (5000, 64)]


def order_of(num_images, block_rows, *, seed=0, epoch=3):
    return rows_at(seed, epoch, np.arange(num_images), num_images, block_rows)


@pytest.mark.parametrize("num_images, block_rows", ORDERS)
def test_an_epochs_order_is_a_permutation(num_images, block_rows):
    order = order_of(num_images, block_rows)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_images))
    # whoever asks for a few places, in another order, gets the same
    places = np.random.default_rng(0).permutation(num_images)[:50]
    assert np.array_equal(rows_at(0, 3, places, num_images, block_rows), order[places])


@pytest.mark.parametrize("num_images, block_rows", [(2, 1), (3, 1), (7, 1), (23, 4), (40, 2)])
def test_every_image_is_as_likely_at_every_place(num_images, block_rows):
    num_epochs, counts = 1000, np.zeros((num_images, num_images))
    for epoch in range(num_epochs):
        counts[np.arange(num_images), order_of(num_images, block_rows, seed=1, epoch=epoch)] += 1
    expected = num_epochs / num_images
    freedom = (num_images - 1) ** 2
    # rows and columns both add up: (n - 1) / n of the usual sum has a chi-square distribution
    chi_square = ((counts - expected) ** 2 / expected).sum() * (num_images - 1) / num_images
    # nearly normal, of variance 2 * freedom; seeds are fixed, so it never flickers
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("block_rows", [1, 16])
def test_epochs_orders_are_unrelated(block_rows):
    num_images = 2000 * block_rows
    orders = [order_of(num_images, block_rows, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i in range(3):
        assert abs(np.corrcoef(orders[i], orders[i - 1])[0, 1]) < 0.1
        assert abs(np.corrcoef(orders[i], np.arange(num_images))[0, 1]) < 0.1
    # neighbours are unrelated too, when each image is a block
    if block_rows == 1:
        assert abs(np.corrcoef(orders[0][1:], orders[0][:-1])[0, 1]) < 0.1


def test_a_window_of_places_reads_few_blocks():
    num_images, block_rows = 64 * 1024, 64
    order = order_of(num_images, block_rows).reshape(-1, WINDOW_BLOCKS * block_rows)
    blocks = [np.unique(window // block_rows) for window in order]
    assert all(len(read) <= WINDOW_BLOCKS for read in blocks)
    # from all over the index
    assert np.mean([np.ptp(read) for read in blocks]) > 800
    # and in a window, successive images come from different ones
    assert (np.diff(order[0] // block_rows) != 0).mean() > 0.9


def test_the_images_that_fill_no_block_are_others_in_each_epoch():
    # 3 of 1003: were they always the last rows, data.tail=drop would leave out the same images again and again
    last = {tuple(order_of(1003, 100, epoch=epoch)[-3:] % 1003 // 100) for epoch in range(50)}
    assert len(last) > 5


def official_crop(rng, height, width):
    """torchvision.transforms.RandomResizedCrop.get_params, with Python's `random`."""
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    in_ratio = width / height
    w, h = width, height
    if in_ratio < RATIO[0]:
        h = round(w / RATIO[0])
    elif in_ratio > RATIO[1]:
        w = round(h * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


# a photo; a panorama, where most tries fail and the fallback counts
@pytest.mark.parametrize("height, width", [(427, 640), (120, 900)])
def test_crops_are_distributed_as_official(height, width):
    n, rng = 4000, random.Random(0)
    boxes = draw_crops(0, 0, np.arange(n), np.full(n, height), np.full(n, width), SCALE, RATIO)
    official = np.array([official_crop(rng, height, width) for _ in range(n)])
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "bottom": lambda b: b[:, 0] + b[:, 2],
        "right": lambda b: b[:, 1] + b[:, 3],
    }.items():
        assert same_distribution(measure(boxes), measure(official)), name


class Replay:
    """Python's `random`, fed with four numbers a try; a try that does not fit leaves its last two unused."""

    def __init__(self, draws):
        self.draws, self.used = draws, 0

    def _next(self):
        self.used += 1
        return self.draws[self.used - 1]

    def uniform(self, low, high):
        self.used += 2 * (self.used % 4 == 2)
        return low + (high - low) * self._next()

    def randint(self, low, high):
        return low + math.floor(self._next() * (high - low + 1))


def test_crops_follow_the_official_rule_draw_by_draw():
    sizes = [(427, 640), (120, 900), (3, 500), (500, 3), (1, 1), (2, 2), (64, 64)]
    for sample, (height, width) in enumerate(sizes * 20):
        box = draw_crops(5, 2, [sample], [height], [width], SCALE, RATIO)[0]
        assert tuple(box) == official_crop(Replay(uniform(5, Purpose.CROP, 2, sample, 40)[0]), height, width)


def test_crops_lie_inside_the_image():
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, 40, (2, 5000))
    for ratio in (RATIO, (0.01, 0.02), (50, 90)):
        top, left, h, w = draw_crops(0, 0, np.arange(5000), height, width, SCALE, ratio).T
        assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()


def test_a_whole_image_crop():
    assert draw_crops(0, 0, [0], [32], [32], (1, 1), (1, 1)).tolist() == [[0, 0, 32, 32]]


def test_draws_depend_on_the_key_alone():
    samples = np.arange(50)
    height, width = np.full(50, 300), np.full(50, 400)
    boxes = draw_crops(0, 4, samples, height, width, SCALE, RATIO)
    shuffled = samples[::-1]
    assert np.array_equal(draw_crops(0, 4, shuffled, height, width, SCALE, RATIO), boxes[::-1])
    for seed, view in [(1, 4), (0, 5)]:
        assert not np.array_equal(draw_crops(seed, view, samples, height, width, SCALE, RATIO), boxes)


def test_flips():
    assert abs(draw_flips(0, 0, np.arange(10_000), 0.5).mean() - 0.5) < 0.02
    assert not draw_flips(0, 0, np.arange(100), 0).any()
    assert draw_flips(0, 0, np.arange(100), 1).all()


def test_jitters():
    order, factors = draw_jitters(0, 0, np.arange(12_000), 0.4)
    codes, counts = np.unique(order @ [9, 3, 1], return_counts=True)
    assert np.array_equal(np.sort(JITTER_ORDERS @ [9, 3, 1]), codes)
    assert (abs(counts - 2000) < 200).all()
    for factor in factors.T:
        assert same_distribution(factor, np.linspace(0.6, 1.4, 10_000))
    assert np.abs(np.corrcoef(np.c_[factors, order[:, 0]].T) - np.eye(4)).max() < 0.05
    assert (draw_jitters(0, 0, np.arange(10), 0)[1] == 1).all()
    assert draw_jitters(0, 0, np.arange(1000), 3)[1].min() >= 0


def test_drop_path():
    assert ModelConfig(depth=3, drop_path=0.2).drop_rates == [0, 0.1, 0.2]
    rates = [0.0, 0.1, 0.5]
    keep = drop_path_keep(0, 7, np.arange(4000), rates)
    assert keep.shape == (4000, 3, 2) and keep.dtype == np.float32
    for block, rate in enumerate(rates):
        assert set(np.unique(keep[:, block])) <= {np.float32(0), np.float32(1 / (1 - rate))}
        assert np.abs(keep[:, block].mean(0) - 1).max() < 0.06
    # blocks, branches and samples are independent
    assert np.abs(np.corrcoef(keep[:, 1:].reshape(-1, 4).T) - np.eye(4)).max() < 0.06
    assert np.array_equal(drop_path_keep(0, 7, [12, 3], rates), keep[[12, 3]])
    assert not np.array_equal(drop_path_keep(0, 8, np.arange(4000), rates), keep)


def test_views_come_round():
    epochs = np.arange(5)
    assert crop_of(epochs, 0).tolist() == [0, 1, 2, 3, 4]
    assert crop_of(epochs, 2).tolist() == [0, 1, 0, 1, 0]


def test_draws_are_pinned():
    # token caches and resumed runs hold what these gave when they began: a change here breaks them in silence
    sample = np.arange(2)
    assert rows_at(1, 2, np.arange(8), 8, 1).tolist() == [4, 7, 1, 6, 3, 2, 5, 0]
    assert rows_at(1, 2, np.arange(8), 9, 2).tolist() == [0, 5, 6, 2, 4, 3, 7, 8]
    assert draw_crops(1, 2, sample, [427, 427], [640, 640], SCALE, RATIO).tolist() == [
        [31, 198, 315, 291],
        [64, 128, 362, 389],
    ]
    assert draw_flips(1, 2, np.arange(8), 0.5).astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    order, factors = draw_jitters(1, 2, sample, 0.4)
    assert order.tolist() == [[1, 0, 2], [1, 2, 0]]
    assert factors.round(6).tolist() == [[1.333357, 0.924011, 0.67769], [1.364749, 0.919481, 0.98778]]
    assert (drop_path_keep(1, 2, sample, [0.5, 0.5]) / 2).astype(int).tolist() == [[[0, 1], [0, 1]], [[0, 0], [0, 1]]]
