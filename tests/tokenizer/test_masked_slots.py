"""Tokens of masked slots alone are those of the whole image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastbeit import masking
from fastbeit.config.sections import MaskingConfig
from fastbeit.data.demo_photos import gather_photos
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.tokenizer.dvae import to_mapped
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.frozen import Strided

GRID, SLOTS = (14, 14), 75
NEAR = 1e-5  # of the scale of scores: what sums in another order differ by in float32


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Tensor:
    """[134, 112, 112, 3] uint8: parts of the demo's photos, 10,050 slots in all."""
    folder = tmp_path_factory.mktemp("photos")
    gather_photos(folder / "photos", None)
    found, paths = [], sorted(folder.rglob("*.jpg"))
    for number in range(134):
        with Image.open(paths[number % len(paths)]) as photo:
            part, side = photo.convert("RGB"), min(photo.size) // (1 + number // len(paths) % 3)
            left, top = ((part.width - side) * number // 134, (part.height - side) * (number * 37 % 134) // 134)
            found.append(np.asarray(ImageOps.fit(part.crop((left, top, left + side, top + side)), (112, 112))))
    return torch.from_numpy(np.stack(found))


def slots_of_step(num: int) -> Tensor:
    rule = masking.MaskRule("blockwise", MaskingConfig(), GRID, seed=3)
    return masking.draw(rule, torch.zeros(num, dtype=torch.int64), torch.arange(num)).predict_idx


def test_ten_thousand_slots_of_photos(crops: Tensor, say: Callable[[str], None]):
    tokenizer = load_tokenizer("")
    assert isinstance(tokenizer, DiscreteVAE)
    places = slots_of_step(len(crops))
    some, every = tokenizer.encode_at(crops, places), tokenizer.encode(crops)
    assert some.shape == (134, SLOTS) and some.dtype == torch.int64
    wanted = every.gather(1, places)
    turned = (some != wanted).nonzero().tolist()
    say(f"tokens of {some.numel():,} masked slots that are not those of the whole image: {len(turned)}")
    # two words that score alike may be told apart by the order of a sum, and nothing else may
    encoder = tokenizer._encode
    assert encoder.head.bias is not None
    for row, slot in turned:
        (features,) = encoder.features(to_mapped(crops[row : row + 1])).double()
        feature = features.flatten(1)[:, places[row, slot]]
        head = encoder.head.weight.to_dense() if encoder.head.weight.is_mkldnn else encoder.head.weight
        scores = head.double().flatten(1) @ feature + encoder.head.bias.double()
        gap = (scores.max() - scores[some[row, slot]]).abs().item()
        say(f"image {row}, slot {slot}: words {some[row, slot]} and {wanted[row, slot]}, {gap:.1e} apart")
        assert gap <= NEAR * scores.abs().max().item()
    assert len(turned) < 10  # of 10,050; float32 turned none where this was written


def test_an_image_has_the_same_tokens_in_any_batch(crops: Tensor):
    tokenizer, places = load_tokenizer(""), slots_of_step(5)
    together = tokenizer.encode_at(crops[:5], places)
    alone = [tokenizer.encode_at(crops[i : i + 1], places[i : i + 1]) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_places_come_in_any_order_and_may_be_all(crops: Tensor):
    tokenizer = load_tokenizer("")
    every = tokenizer.encode(crops[:3])
    backwards = torch.arange(195, -1, -1).expand(3, -1)
    # a place mixed up with another would show in most tokens; of these 588, rounding may turn one or two
    assert (tokenizer.encode_at(crops[:3], backwards).flip(1) == every).double().mean() > 0.99


def test_a_tokenizer_that_knows_whole_images_alone_is_asked_for_them():
    class Rows(Strided):
        vocab_size, stride, device = 9, 8, torch.device("cpu")

        def encode(self, images: Tensor) -> Tensor:
            return torch.arange(9).expand(len(images), -1)

    places = torch.tensor([[8, 0], [3, 4]])
    assert torch.equal(Rows().encode_at(torch.zeros(2, 24, 24, 3, dtype=torch.uint8), places), places)
