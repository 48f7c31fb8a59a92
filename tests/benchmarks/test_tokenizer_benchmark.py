"""The benchmark of tokenizers, in small."""

import json

import pytest
import torch

from benchmarks.tokenizer import CACHED_IMAGES, GRID, open_random_cache
from helpers import tiny
from helpers.waiting import PATIENCE_S


def test_its_cache_is_read_as_any(tmp_path):
    cache = open_random_cache(tmp_path)
    tokens = cache.read(torch.arange(CACHED_IMAGES), torch.zeros(CACHED_IMAGES, dtype=torch.int64))
    assert tokens.shape == (CACHED_IMAGES, GRID[0] * GRID[1])
    # random: all of 8192 words, evenly
    assert tokens.min() == 0 and tokens.max() == 8191 and len(tokens.unique()) == 8192


@pytest.mark.long
def test_a_whole_run_has_each_part(tmp_path):
    few = ["--rounds", "1", "--batch", "1", "--step-batch", "1", "--json", str(tmp_path / "found.json")]
    done = tiny.run(*few, module="benchmarks.tokenizer", patience_s=6 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["who"] for row in found["step"]} == {"on the fly", "cached"}
    assert found["encode"] and found["agreement"]
