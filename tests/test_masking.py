"""Masks: the authors' generator to the random number, and the fast form equal to it on our random stream."""

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbeit import masking
from fastbeit.config.pretrain import MAX_GRID, Config
from fastbeit.config.sections import MaskingConfig
from fastbeit.data.sampling import Purpose, uniform
from fastbeit.errors import ConfigError
from fastbeit.masking import (
    UNUSED,
    MaskRule,
    Masks,
    blockwise_mask,
    draw,
    draw_masks,
    label,
    rule_of,
    slots_of,
    try_rule,
)
from fastbeit_kernels.block_masks import MAX_SIDE

GRID = 14, 14


def settings(**fields: Any) -> MaskingConfig:
    return MaskingConfig(**fields)


OFFICIAL = settings()


def digest(masks) -> str:
    return hashlib.sha256(np.asarray(masks, dtype=np.uint8).tobytes()).hexdigest()[:16]


def samples(num: int, first: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return torch.full((num,), epoch), torch.arange(first, first + num)


def as_bool(masks: Masks, num_patches: int) -> np.ndarray:
    return slots_of(masks, num_patches, "masked").masked.numpy()


class CountedStream:
    """`random.Random`'s two methods on our stream: four numbers an attempt, the last two unused where nothing fits."""

    def __init__(self, seed: int, epoch: int, sample: int) -> None:
        self.numbers = uniform(seed, Purpose.MASK, epoch, sample, 4096)[0]
        self.place = 0

    def _next(self) -> float:
        self.place += 1
        return self.numbers[self.place - 1]

    def uniform(self, low: float, high: float) -> float:
        if self.place % 4 == 2:
            self.place += 2
        return low + (high - low) * self._next()

    def randint(self, low: int, high: int) -> int:
        return low + int(self._next() * (high - low + 1))


def test_a_config_and_the_kernel_hold_the_same_grids():
    # the config imports no kernel, so the number stands twice
    assert MAX_GRID == MAX_SIDE


def test_blockwise_mask_is_the_authors():
    """Recorded from `MaskingGenerator(14, num_masking_patches=75)` under `random.seed(0)`."""
    rng = random.Random(0)
    masks = [blockwise_mask(rng, GRID, 75, 16, 0.3) for _ in range(1000)]
    assert [int(mask.sum()) for mask in masks[:3]] == [75, 75, 75]
    assert [int(np.flatnonzero(mask).sum()) for mask in masks[:3]] == [8499, 7610, 6975]
    assert [digest(mask) for mask in masks[:3]] == ["48478dbc4aef3d67", "a814fdde57014fa2", "d473cf91af32b469"]
    assert digest(masks) == "a2e2be5b4154020e"
    assert np.sum(masks) / 1000 == 74.515


# the official window; one that is not square; one where few blocks fit; one where none does; blocks down to a row;
# a budget below the smallest block, whose bounds are then in reverse
@pytest.mark.parametrize(
    "grid, config",
    [
        (GRID, OFFICIAL),
        ((7, 20), settings(num_masked=56)),
        ((4, 4), settings(num_masked=6)),
        ((2, 2), settings(num_masked=2)),
        ((1, 9), settings(num_masked=3, min_block=1)),
        ((24, 10), settings(num_masked=96, min_block=1, min_aspect=0.05)),
        (GRID, settings(num_masked=4)),
    ],
    ids=str,
)
def test_fast_masks_are_blockwise_masks(grid, config):
    seed, num_patches = 2**40 + 7, grid[0] * grid[1]
    epoch, sample = torch.arange(100) % 2 * 3, torch.arange(100, 200)
    if config is OFFICIAL:  # masks that would be others in float32, found by trying 2.5 million
        epoch[:6], sample[:6] = 0, torch.tensor([93_779, 201_681, 230_350, 457_003, 567_385, 635_504])
    masks = as_bool(draw_masks(MaskRule("blockwise", config, grid, seed), epoch, sample), num_patches)
    rule = config.num_masked_of(num_patches), config.min_block_of(num_patches), config.min_aspect
    streams = [CountedStream(seed, *key) for key in zip(epoch.tolist(), sample.tolist(), strict=True)]
    one_by_one = [blockwise_mask(stream, grid, *rule) for stream in streams]
    np.testing.assert_array_equal(masks, np.reshape(one_by_one, (100, num_patches)))


def test_statistics_are_the_authors():
    """100,000 masks of four epochs; bands of four standard errors or more around as many of the authors' generator."""
    parts = [draw_masks(MaskRule("blockwise", OFFICIAL, GRID, 0), *samples(25_000, epoch=epoch)) for epoch in range(4)]
    masks = Masks(torch.cat([m.masked_idx for m in parts]), torch.cat([m.num_masked for m in parts]))
    counts = masks.num_masked.double()
    assert counts.mean() == pytest.approx(74.469, abs=0.05)
    assert counts.std() == pytest.approx(0.989, abs=0.05)
    assert counts.min() >= 60 and counts.max() == 75
    assert (counts == 75).double().mean() == pytest.approx(0.664, abs=0.01)
    share = as_bool(masks, 196).mean(0).reshape(GRID)
    for corner in (share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]):
        assert corner == pytest.approx(0.041, abs=0.003)
    assert share[6:8, 6:8].mean() == pytest.approx(0.715, abs=0.005)
    assert share[0, 6:8].mean() == pytest.approx(0.191, abs=0.005)
    images = as_bool(masks, 196).reshape(-1, *GRID)
    together = (images[:, :, 1:] & images[:, :, :-1]).sum() / images[:, :, :-1].sum()
    assert together == pytest.approx(0.862, abs=0.005)


def test_number_of_blocks(monkeypatch):
    draw, num_blocks = masking._draw_block, []
    monkeypatch.setattr(masking, "_draw_block", lambda *args: num_blocks.append(1) or draw(*args))
    rng = random.Random(1)
    masks = [blockwise_mask(rng, GRID, 75, 16, 0.3) for _ in range(4000)]
    in_vain = sum(mask.sum() < 75 for mask in masks)
    assert (len(num_blocks) - in_vain) / 4000 == pytest.approx(4.12, abs=0.03)


@pytest.mark.parametrize("kind", ["blockwise", "random"])
def test_slots(kind):
    masks = draw_masks(MaskRule(kind, OFFICIAL, GRID, 5), *samples(300, epoch=2))
    assert masks.masked_idx.shape == (300, 75) and masks.masked_idx.dtype == masks.num_masked.dtype == torch.int64
    for slots, num_masked in zip(masks.masked_idx.tolist(), masks.num_masked.tolist(), strict=True):
        assert len(set(slots)) == 75 and 0 <= min(slots) and max(slots) < 196
        assert slots[:num_masked] == sorted(slots[:num_masked])
    assert (as_bool(masks, 196).sum(1) == masks.num_masked.numpy()).all()


def test_random_masks():
    masks = draw_masks(MaskRule("random", OFFICIAL, GRID, 0), *samples(20_000))
    assert (masks.num_masked == 75).all()
    share = as_bool(masks, 196).mean(0)
    assert np.abs(share - 75 / 196).max() < 0.016  # 4.5 standard errors for the worst of 196 patches


@pytest.mark.parametrize("grid, num_masked", [(GRID, 75), ((3, 3), 4), ((1, 1), 1)])
def test_random_masks_are_the_smallest_numbers(grid, num_masked):
    seed, (epoch, sample) = 2**40 + 7, samples(50, first=2**31, epoch=3)
    masks = draw_masks(MaskRule("random", settings(num_masked=num_masked), grid, seed), epoch, sample)
    keys = uniform(seed, Purpose.MASK, epoch, sample, grid[0] * grid[1])
    smallest = np.sort(np.argsort(keys, axis=1)[:, :num_masked], axis=1)
    np.testing.assert_array_equal(masks.masked_idx, smallest)


def test_no_mask():
    masks = draw_masks(MaskRule("none", OFFICIAL, GRID, 0), *samples(3))
    assert masks.masked_idx.shape == (3, 0) and masks.num_masked.tolist() == [0, 0, 0]
    slots, tokens = slots_of(masks, 196, "all"), torch.arange(3 * 196).view(3, 196)
    assert not slots.masked.any()
    assert torch.equal(label(slots, tokens.gather(1, slots.predict_idx)), tokens)


@pytest.mark.parametrize("kind", ["blockwise", "random"])
def test_a_mask_belongs_to_its_sample(kind):
    """Alone, in another batch or in another order: the same; with another seed, epoch or number: another."""
    epoch, sample = torch.tensor([0, 1, 1, 4]), torch.tensor([7, 7, 8, 8])
    together = draw_masks(MaskRule(kind, OFFICIAL, GRID, 9), epoch, sample)
    alone = [
        draw_masks(MaskRule(kind, OFFICIAL, GRID, 9), epoch[i : i + 1], sample[i : i + 1]).masked_idx for i in range(4)
    ]
    assert torch.equal(together.masked_idx, torch.cat(alone))
    reseeded = draw_masks(MaskRule(kind, OFFICIAL, GRID, 9 + 2**32), epoch[:1], sample[:1]).masked_idx
    assert len({tuple(slots) for slots in [*together.masked_idx.tolist(), *reseeded.tolist()]}) == 5


def test_nothing_fits():
    """The smallest block fills the window: every image stays whole, and the generator ends."""
    masks = draw_masks(MaskRule("blockwise", settings(num_masked=16), (4, 4), 0), *samples(64))
    labels = label(slots_of(masks, 16, "masked"), torch.zeros(64, masks.masked_idx.shape[1], dtype=torch.int64))
    assert masks.masked_idx.shape == (64, 16)
    assert torch.equal((labels != UNUSED).sum(1), masks.num_masked)
    nowhere = draw_masks(MaskRule("blockwise", settings(num_masked=1), (1, 1), 0), *samples(4))
    assert nowhere.num_masked.tolist() == [0] * 4
    assert draw_masks(MaskRule("blockwise", OFFICIAL, GRID, 0), *samples(0)).masked_idx.shape == (0, 75)


def test_target_below_the_smallest_block():
    """The rate of empty masks with 4 patches and blocks of 16, as in the authors' code; no mask has more than 4."""
    counts = draw_masks(MaskRule("blockwise", settings(num_masked=4), GRID, 0), *samples(5000)).num_masked
    assert counts.max() == 4
    assert (counts == 0).double().mean() == pytest.approx(0.37, abs=0.03)


def test_prediction():
    """Image 0 has two masked patches in three slots, image 1 has three."""
    masks = Masks(torch.tensor([[1, 4, 0], [0, 2, 5]]), torch.tensor([2, 3]))
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
    some = slots_of(masks, 6, "masked")
    assert some.masked.int().tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]]
    assert some.predict_idx.tolist() == [[1, 4, 0], [0, 2, 5]]
    assert label(some, tokens.gather(1, some.predict_idx)).tolist() == [[11, 14, UNUSED], [20, 22, 25]]
    every = slots_of(masks, 6, "all")
    assert torch.equal(every.masked, some.masked) and torch.equal(
        label(every, tokens.gather(1, every.predict_idx)), tokens
    )
    assert every.predict_idx.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert label(some, None).tolist() == [[0, 0, UNUSED], [0, 0, 0]]


def test_the_rule_of_a_run_draws_its_masks():
    config = Config()
    rule = rule_of(config)
    assert rule == MaskRule("blockwise", OFFICIAL, GRID, 0, "masked", "auto")
    slots = draw(rule, *samples(3))
    assert torch.equal(slots.predict_idx, draw_masks(MaskRule("blockwise", OFFICIAL, GRID, 0), *samples(3)).masked_idx)


def test_masks_are_tried_before_a_run():
    """On 4 x 4 patches no block of 13 finds room; of the paper's rule there is nothing to say."""

    def said(kind: str = "blockwise", grid: tuple[int, int] = GRID, **fields) -> list[str]:
        return try_rule(MaskRule(kind, settings(**fields), grid, 0))  # pyright: ignore[reportArgumentType]

    assert said() == said("random") == said("none", num_masked=1) == []
    with pytest.raises(ConfigError, match="100% of the first 256 masks .*smaller than the grid of 4x4 on both sides"):
        said(grid=(4, 4), num_masked=13, min_block=13)
    (half,) = said(grid=(3, 8), num_masked=24, min_block=12)
    assert "less than half of the 24 that masking asks for" in half
    (few,) = said("random", num_masked=25)
    assert "only 13% of the patches are hidden, 25.0 of 196; the paper hides 40 %" in few
