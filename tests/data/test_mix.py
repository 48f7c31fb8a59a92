"""Mixup and CutMix by timm's rule: what is drawn, and what becomes of pixels and labels."""

import numpy as np
import pytest
import torch

from fastbeit.config.finetune import AugmentConfig
from fastbeit.data.mix import Mix, draw_mix, mix

SIZE = 40, 60
BOTH = AugmentConfig()
MIXES = [draw_mix(BOTH, 0, step, 0, SIZE) for step in range(4000)]


def test_what_is_drawn_is_as_timm_draws():
    cuts = [one for one in MIXES if one.box]
    # 4000 draws of 1/2: three deviations are 0.024
    assert len(cuts) / len(MIXES) == pytest.approx(0.5, abs=0.024)
    shares = np.array([one.share for one in MIXES if not one.box])
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)); three deviations of 2000
    assert shares.mean() == pytest.approx(0.5, abs=0.021) and shares.var() == pytest.approx(1 / 10.4, rel=0.06)
    for one in cuts:
        assert one.box
        top, bottom, left, right = one.box
        assert 0 <= top <= bottom <= SIZE[0] and 0 <= left <= right <= SIZE[1]
        assert one.share == pytest.approx(1 - (bottom - top) * (right - left) / 2400)


def test_a_step_and_a_rank_have_their_own():
    assert draw_mix(BOTH, 0, 7, 0, SIZE) == MIXES[7]
    assert len({draw_mix(BOTH, seed, step, rank, SIZE) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}) == 8


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"mixup": 0.0, "cutmix": 0.0}, {"none"}),
        ({"cutmix": 0.0}, {"mixup"}),
        ({"mixup": 0.0}, {"cutmix"}),
        ({"mix_prob": 0.0}, {"none"}),
        ({"mix_prob": 0.5}, {"none", "mixup", "cutmix"}),
    ],
)
def test_each_can_be_left_out(settings, kinds):
    drawn = [draw_mix(AugmentConfig(**settings), 0, step, 0, SIZE) for step in range(100)]
    assert {"cutmix" if one.box else "none" if one.share == 1 else "mixup" for one in drawn} == kinds


def test_images_are_mixed_first_with_last():
    pixels, labels = torch.randn(5, *SIZE, 3), torch.arange(5)
    before = pixels.clone()
    mixed, others, share = mix(pixels, labels, Mix(0.75, None))
    assert torch.equal(pixels, before) and others.tolist() == [4, 3, 2, 1, 0] and share.tolist() == [0.75] * 5
    torch.testing.assert_close(mixed[1], 0.75 * pixels[1] + 0.25 * pixels[3])
    mixed, _, _ = mix(pixels, labels, Mix(0.9, (2, 10, 5, 35)))
    assert torch.equal(mixed[0, 2:10, 5:35], pixels[4, 2:10, 5:35])
    mixed[0, 2:10, 5:35] = pixels[0, 2:10, 5:35]
    assert torch.equal(mixed[0], pixels[0])


def test_nothing_is_mixed_at_a_share_of_one():
    pixels = torch.randn(4, *SIZE, 3)
    assert torch.equal(mix(pixels, torch.arange(4), Mix(1.0, None))[0], pixels)
