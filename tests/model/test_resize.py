"""Another resolution: the authors' resize of tables, bicubic positions, a table for each block."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig
from fastbeit.model import resize
from fastbeit.model.beit import Beit
from fastbeit.model.resize import resize_positions, resize_table, resize_weights, share_out
from helpers.weights import randomise

# sides of the table and q, as the authors' code finds it from a table of 27
OFFICIAL = {47: 1.090307, 63: 1.134918, 79: 1.168504}


def table_of(values: np.ndarray) -> Tensor:
    """One head: offsets, then cls to patch, patch to cls, cls to cls."""
    return torch.from_numpy(np.concatenate((values.ravel(), [1.5, -2.5, 3.5])))[:, None]


def places(side: int, q: float) -> np.ndarray:
    distances = np.cumsum(q ** np.arange(side // 2))
    return np.concatenate((-distances[::-1], [0], distances))


def scipys(values: np.ndarray, down: np.ndarray, across: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """What scipy's interp2d gave, which was removed; this equals it to rounding."""
    spline: Any = RectBivariateSpline(down, across, values, kx=min(3, len(down) - 1), ky=min(3, len(across) - 1), s=0)
    return spline(*(np.arange(-(side // 2), side // 2 + 1) for side in new))


@pytest.fixture(scope="module")
def rough() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((27, 27))


def test_the_official_resize_from_224_to_384(rough):
    resized = resize_table(table_of(rough), (14, 14), (24, 24))[:-3].view(47, 47)
    assert resized[0, :3].tolist() == pytest.approx([0.12573022, -0.3343337, -0.34115994], abs=1e-8)
    assert resized[23, 23] == pytest.approx(rough[13, 13], abs=1e-12)
    assert rough[13, 13] == pytest.approx(-0.8186598515, abs=1e-10)


@pytest.mark.parametrize("side, q", OFFICIAL.items())
def test_the_official_resize_equals_scipys(rough, side, q):
    found = resize._places(27, side)
    # q to the authors' precision; sums of it multiply its error by some hundreds
    assert found == pytest.approx(places(27, q), abs=2e-3)
    resized = resize_table(table_of(rough), (14, 14), ((side + 1) // 2,) * 2)
    np.testing.assert_allclose(
        resized[:-3, 0].reshape(side, side), scipys(rough, found, found, (side, side)), atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_rows_of_cls_are_the_same_bits(dtype):
    table = torch.randn(27 * 27 + 3, 5, dtype=dtype)
    resized = resize_table(table, (14, 14), (24, 24))
    assert resized.shape == (47 * 47 + 3, 5) and resized.dtype == dtype
    assert torch.equal(resized[-3:], table[-3:])
    # each head for itself
    alone = torch.cat([resize_table(table[:, i : i + 1], (14, 14), (24, 24)) for i in range(5)], dim=1)
    torch.testing.assert_close(alone, resized)


def test_the_same_size_is_left_alone():
    table, positions = torch.randn(27 * 27 + 3, 2), torch.randn(1, 197, 8)
    assert torch.equal(resize_table(table, (14, 14), (14, 14)), table)
    assert torch.equal(resize_positions(positions, (14, 14), (14, 14)), positions)


# one axis grows, the other stays, grows more, or shrinks; grids of 1 to 3 have too few offsets for a cubic
@pytest.mark.parametrize(
    "old, new", [((6, 9), (6, 12)), ((6, 9), (12, 10)), ((9, 6), (5, 8)), ((2, 3), (4, 5)), ((3, 1), (6, 1))]
)
def test_axes_are_resized_apart(old, new):
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    values = np.random.default_rng(0).standard_normal(before)
    resized = resize_table(table_of(values), old, new)[:-3, 0].reshape(*after)
    points = [
        np.arange(-(a // 2), a // 2 + 1) if a == b else resize._places(a, b) for a, b in zip(before, after, strict=True)
    ]
    if 1 in before:
        wanted = scipys(np.repeat(values, 2, axis=1), points[0], np.array([-1, 1]), (after[0], 1))
    else:
        wanted = scipys(values, points[0], points[1], (after[0], after[1]))
    np.testing.assert_allclose(resized, wanted, atol=1e-12)


def test_a_smaller_grid_gets_the_middle(rough):
    """As with the authors: q stays at its lower bound, 1.01, so offsets hardly move."""
    smooth = np.add.outer(np.arange(27.0), 2 * np.arange(27.0))
    resized = resize_table(table_of(smooth), (14, 14), (7, 7))[:-3].view(13, 13)
    torch.testing.assert_close(resized, torch.from_numpy(smooth[7:20, 7:20]), atol=0.6, rtol=0)


def test_positions_are_resized_bicubically():
    positions = torch.randn(1, 1 + 6 * 9, 4)
    resized = resize_positions(positions, (6, 9), (12, 10))
    assert torch.equal(resized[:, 0], positions[:, 0])
    patches = positions[0, 1:].T.reshape(1, 4, 6, 9)
    wanted = F.interpolate(patches, (12, 10), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[0, 1:].T.reshape(1, 4, 12, 10), wanted)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"a table of a 14x14 grid has 732 rows; got 2212"):
        resize_table(torch.zeros(47 * 47 + 3, 2), (14, 14), (24, 24))
    with pytest.raises(ValueError, match=r"positions of a 14x14 grid are 197 with cls; got 577"):
        resize_positions(torch.zeros(1, 577, 2), (14, 14), (24, 24))


def build(image_size: tuple[int, int], **fields) -> Beit:
    model = ModelConfig(width=32, depth=3, num_heads=2, mlp_width=48, patch_size=(8, 8), **fields)
    half = (0.5,) * 3
    return Beit(model, image_size=image_size, num_outputs=11, mean=half, std=half, kernels=Kernels())


def test_a_table_a_block_computes_what_the_shared_one_did():
    torch.manual_seed(0)
    shared, apart = build((32, 48)), build((32, 48), relative_position="per_block")
    randomise(shared)
    weights = share_out(shared.state_dict(), depth=3)
    apart.load_state_dict(weights | {key: one for key, one in apart.state_dict().items() if key.endswith("_index")})
    images, masked = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8), torch.rand(2, 24) < 0.4
    assert torch.equal(shared.logits(images, masked), apart.logits(images, masked))
    # copies: what one block learns does not move another's table
    tables = {weights[f"blocks.{i}.attn.relative_position_bias_table"].data_ptr() for i in range(3)}
    assert len(tables) == 3
    assert share_out(weights, depth=3) is weights


@pytest.mark.parametrize("relative_position", ["shared", "per_block"])
def test_a_model_of_another_resolution_takes_the_weights(relative_position):
    torch.manual_seed(0)
    fields = {"relative_position": relative_position, "absolute_position": True}
    small, large = build((32, 32), **fields), build((48, 64), **fields)
    randomise(small)
    weights = resize_weights(small.state_dict(), (4, 4), (6, 8))
    found = large.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and all(key.endswith("relative_position_index") for key in found.missing_keys)
    assert torch.equal(large.cls_token, small.cls_token)
