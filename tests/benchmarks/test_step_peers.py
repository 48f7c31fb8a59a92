"""Others' code beside ours: the same loss, or no time."""

from functools import partial

import pytest
import torch

from benchmarks.step import peers
from benchmarks.step.variants import TOY

toy = partial(peers.rows, "B", 2, num_rounds=3, settings=TOY)


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "timm", ("no_module_of_anybody", peers.timm))


def test_who_agrees_is_timed(no_timm: None):
    missing, *timed = toy()
    assert missing == dict(case="B, timm", left_out="no_module_of_anybody is not installed")
    assert [row["who"] for row in timed] == ["ours", "Hugging Face", "official style"]
    for row in timed:
        assert row["low"] <= row["times"] <= row["high"] and row["cpu_ms"] > 0 and row["rounds"] == 3
    assert timed[0]["times"] == timed[0]["low"] == timed[0]["high"] == 1


def test_who_computes_something_else_is_not(no_timm: None, monkeypatch: pytest.MonkeyPatch):
    attend = peers.attend
    monkeypatch.setattr(peers, "attend", lambda attn, x, bias: attend(attn, x, torch.zeros_like(bias)))
    rows = list(toy())
    (wrong,) = (row for row in rows if "wrong" in row)
    assert wrong["case"] == "B, official style" and "its loss is" in wrong["wrong"]
    assert not any(row.get("who") == "official style" for row in rows)


def test_timm_where_it_is(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("timm")
    assert [row["who"] for row in toy() if "times" in row][-1] == "timm"
