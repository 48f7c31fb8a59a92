"""Every random number of a run, from a counter: order, augmentation, masks, drop path.

Philox4x32-10 (Salmon et al., SC 2011), the generator behind Triton's `tl.rand`: the key is the run's seed, the counter
says what the number is for. A number is therefore the same on any rank, in any worker, before and after a resume, and a
Triton kernel draws it with `tl.philox(seed, draw, purpose, epoch, sample)`.
"""

from enum import IntEnum
from typing import Any

import numpy as np

from fastbeit_kernels.block_masks import PURPOSE

ROUND_KEYS = 0x9E3779B9, 0xBB67AE85
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
MASK32 = np.uint64(0xFFFFFFFF)


class Purpose(IntEnum):
    """The second counter word: numbers for different ends never meet."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    JITTER = 3
    MASK = PURPOSE  # in the kernels, which draw them
    DROP_PATH = 5
    RAND_AUGMENT = 6
    ERASE_BOX = 7
    ERASE_NOISE = 8
    HOLD_OUT = 9
    MIX = 10


def philox(seed: int, draw, purpose, epoch, sample) -> np.ndarray:
    """Four random words for each counter.

    Args:
        seed: the 64-bit key.
        draw, purpose, epoch, sample: the counter's four 32-bit words; integers or arrays that broadcast together.

    Returns:
        [..., 4] uint64 array of values below 2**32, equal to `tl.philox(seed, draw, purpose, epoch, sample)`.
    """
    words = np.broadcast_arrays(
        *(np.asarray(word).astype(np.uint64) & MASK32 for word in (draw, purpose, epoch, sample))
    )
    c0, c1, c2, c3 = words
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            product1 & MASK32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            product0 & MASK32,
        )
        key0, key1 = (key0 + ROUND_KEYS[0]) & 0xFFFFFFFF, (key1 + ROUND_KEYS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniform(seed: int, purpose: Purpose, epoch, sample, num_draws: int, first_draw: int = 0) -> np.ndarray:
    """Numbers in [0, 1) for each sample.

    Args:
        epoch, sample: [n] integers, or one integer each.
        num_draws: numbers a sample; number k comes from word k % 4 of counter k // 4.
        first_draw: the number to begin with, a multiple of 4.

    Returns:
        [n, num_draws] float64, multiples of 2**-32.
    """
    epoch, sample = np.broadcast_arrays(np.atleast_1d(epoch), np.atleast_1d(sample))
    draw = np.arange(first_draw // 4, (first_draw + num_draws + 3) // 4)
    words = philox(seed, draw, int(purpose), epoch[:, None], sample[:, None])  # [n, draws, 4]
    return words.reshape(len(sample), -1)[:, :num_draws] * 2.0**-32


# the six orders of the three operations; names of the operations in `JITTER_OPS`
JITTER_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
JITTER_OPS = "brightness", "contrast", "saturation"
CROP_TRIES = 10
WINDOW_BLOCKS = 16  # shards that are open, or row groups that are decoded, at a time
FEISTEL_ROUNDS = 6  # four make a strong permutation of many numbers (Luby and Rackoff); of few, tests ask for more


def crop_of(epoch, num_crops: int):
    """The number that crops, flips and jitters of an epoch are keyed by: ever new ones, or `num_crops` > 0 in turn."""
    return epoch % num_crops if num_crops else epoch


def rows_at(seed: int, epoch: int, places: np.ndarray, num_images: int, block_rows: int) -> np.ndarray:
    """Which rows of the index stand at some places of an epoch's order, a permutation of `num_images` rows.

    Images that lie together in a shard are read together: blocks of `block_rows` successive rows come in random order,
    and the images of each `WINDOW_BLOCKS` successive blocks are shuffled among one another. With plain files, a block
    each, that is a uniform shuffle of all. Nothing is stored: a place becomes a row by arithmetic.

    Args:
        places: [n] int64 in [0, num_images), in any order.

    Returns:
        [n] int64 in [0, num_images).
    """
    if block_rows > 1:
        # shuffle the images of each window; where a block is one image, the shuffle of blocks below is enough
        window_rows = WINDOW_BLOCKS * block_rows
        window, place = np.divmod(places, window_rows)
        sizes = np.minimum(window_rows, num_images - window * window_rows)
        places = window * window_rows + _permute(seed, epoch, 2 + window, place, sizes)
    num_blocks = num_images // block_rows
    block, row = np.divmod(places, block_rows)
    whole = block < num_blocks
    block[whole] = _permute(seed, epoch, 1, block[whole], num_blocks)
    # rows that fill no block always come last: which ones they are is drawn too
    first = int(philox(seed, 0, Purpose.ORDER, epoch, 0)[0]) % max(1, num_blocks) * block_rows
    return (first + block * block_rows + row) % num_images


def _permute(seed: int, epoch: int, stream: Any, x: np.ndarray, size: Any) -> np.ndarray:
    """Where permutations of `size` numbers take `x`; each `stream` > 0 is another permutation; all [n] or scalars.

    x is a number of two digits, and in turn one digit is shifted by a Philox number drawn for the other: a Feistel
    network. What leaves [0, size) goes through it again (Black and Rogaway, "Ciphers with arbitrary finite domains").
    """
    stream, x, size = (np.array(values) for values in np.broadcast_arrays(stream, x, size))
    radix = np.ceil(np.sqrt(size)).astype(np.int64)  # of the low digit
    pending = np.arange(len(x))
    while len(pending):
        low_radix, draw = radix[pending], stream[pending] * FEISTEL_ROUNDS
        high_radix = -(-size[pending] // low_radix)
        high, low = np.divmod(x[pending], low_radix)
        for turn in range(0, FEISTEL_ROUNDS, 2):
            high = (high + _shift(seed, epoch, draw + turn, low)) % high_radix
            low = (low + _shift(seed, epoch, draw + turn + 1, high)) % low_radix
        x[pending] = high * low_radix + low
        pending = pending[x[pending] >= size[pending]]
    return x


def _shift(seed: int, epoch: int, draw: np.ndarray, digit: np.ndarray) -> np.ndarray:
    return philox(seed, draw, Purpose.ORDER, epoch, digit)[:, 0].astype(np.int64)


def draw_crops(
    seed: int,
    view,  # [n]
    sample,  # [n]
    height,  # [n] of the images, in pixels
    width,  # [n]
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
) -> np.ndarray:
    """Random-resized-crop boxes, by the official rule (torchvision's `RandomResizedCrop.get_params`).

    Ten tries at a box whose share of the area is uniform in `crop_scale` and whose width / height is log-uniform in
    `crop_ratio`; when none fits, the largest box in the middle with a ratio in range. Try k takes the four words of
    draw k: area, ratio, top, left.

    Returns:
        [n, 4] int64: top, left, height, width, at least 1 x 1 and inside the image.
    """
    height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
    draws = uniform(seed, Purpose.CROP, view, sample, 4 * CROP_TRIES).reshape(-1, CROP_TRIES, 4)
    area = (height * width)[:, None] * _between(crop_scale, draws[..., 0])
    ratio = np.exp(_between(np.log(crop_ratio), draws[..., 1]))
    # np.rint rounds halves to even, as Python's round
    tried_width, tried_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [n, tries]
    fits: np.ndarray = (
        (tried_width > 0) & (tried_width <= width[:, None]) & (tried_height > 0) & (tried_height <= height[:, None])
    )
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    box_height, box_width = tried_height[rows, first], tried_width[rows, first]
    top = np.floor(draws[rows, first, 2] * (height - box_height + 1))
    left = np.floor(draws[rows, first, 3] * (width - box_width + 1))
    drawn = np.stack([top, left, box_height, box_width], axis=1)
    found = fits[rows, first][:, None]
    return np.where(found, drawn, _central_boxes(height, width, crop_ratio)).astype(np.int64)


def draw_flips(seed: int, view, sample, probability: float) -> np.ndarray:
    """Whether each sample's crop is mirrored, [n] bool. The box is drawn in the unmirrored image: equal in distribution
    to the official mirror-then-crop, since boxes are as likely as their mirror images."""
    return uniform(seed, Purpose.FLIP, view, sample, 1)[:, 0] < probability


def draw_jitters(seed: int, view, sample, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Colour jitter, by the official rule (torchvision's `ColorJitter` without hue).

    Returns:
        order: [n, 3] int64, a random order of the operations, numbered as in `JITTER_OPS`.
        factors: [n, 3] float64, the factor of each operation, uniform in [max(0, 1 - strength), 1 + strength].
    """
    draws = uniform(seed, Purpose.JITTER, view, sample, 4)
    order = JITTER_ORDERS[(draws[:, 3] * len(JITTER_ORDERS)).astype(np.int64)]
    return order, _between((max(0.0, 1 - strength), 1 + strength), draws[:, :3])


def drop_path_keep(seed: int, step: int, sample, rates) -> np.ndarray:
    """What each residual branch is multiplied by (stochastic depth, 1603.09382).

    Args:
        sample: [n] indices of the samples.
        rates: [L] drop rate of each block, in [0, 1).

    Returns:
        [n, L, 2] float32, 0 with probability `rate`, else 1 / (1 - rate); attention branch first, then MLP.
    """
    rates = np.asarray(rates, np.float64)
    draw = np.arange(2 * len(rates))
    words = philox(seed, draw, Purpose.DROP_PATH, step, np.asarray(sample)[:, None])[..., 0]  # [n, 2 L]
    rates = rates[:, None]
    kept = words.reshape(-1, len(rates), 2) * 2.0**-32 >= rates
    return (kept / (1 - rates)).astype(np.float32)


def _between(bounds, draws: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * draws


def _central_boxes(height: np.ndarray, width: np.ndarray, crop_ratio: tuple[float, float]) -> np.ndarray:
    """[n, 4] largest boxes in the middle whose width / height is in range, at least 1 x 1."""
    low, high = crop_ratio
    box_height = np.minimum(height, np.maximum(1, np.rint(width / low)))
    box_width = np.minimum(width, np.maximum(1, np.rint(height * high)))
    return np.stack([(height - box_height) // 2, (width - box_width) // 2, box_height, box_width], axis=1)
