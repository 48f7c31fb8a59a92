"""What ranks tell one another, by two real ones."""

import json
import sys

import pytest
import torch

from fastbeit.engine.ranks import Verdict, World
from fastbeit.errors import DataError
from helpers.waiting import finished

SCRIPT = """
import json, sys
import torch
from torch import nn
from fastbeit.config.sections import EngineConfig
from fastbeit.engine.ranks import stacked, start_world
from fastbeit.errors import DataError

world = start_world(EngineConfig(device="cpu"))
rank = world.rank

def told(**own):
    now = world.agree(**{"stop": False, "save": False, "bad": [], "error": None} | own)
    error = now.error and [str(now.error), now.error.exit_code]
    return [now.stops, now.saves, now.bad, error]

one = rank == 1
verdicts = [
    told(),
    told(stop=one),
    told(save=not one),
    told(bad=[(7 + rank, "cut short")]),
    told(bad=[(9, "of one rank")] if one else []),
    told(error=DataError(f"gone on {rank}", 65 + rank) if one else None, bad=[] if one else [(3, "empty")]),
]
model = nn.Linear(2, 1)
nn.init.constant_(model.weight, rank + 1)
world.share(model)
x = torch.full((2,), float(rank + 1), requires_grad=True)
# a loss on each rank, of what both gave: 1 * x0 + 10 * x1 on rank 0, twice that on rank 1
(stacked(x).sum(1) * torch.tensor([1.0, 10.0])).sum().mul(rank + 1).backward()
try:
    torch.autograd.grad(stacked(x).sum(), x, create_graph=True)
    refused = "nothing"
except RuntimeError as err:
    refused = str(err)
result = {"refused": refused}
result |= {"verdicts": verdicts, "weight": model.weight.tolist(), "grad": x.grad.tolist(), "sum": world.sum([rank, 5])}
print(json.dumps(result), file=open(sys.argv[1] + str(rank), "w"))
world.leave()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "talk.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = finished([*torchrun, str(folder / "talk.py"), str(folder / "rank")])
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(2)]


def test_all_ranks_have_one_verdict(results):
    assert results[0]["verdicts"] == results[1]["verdicts"]
    fine, stop, save, bad, of_one, lost = results[0]["verdicts"]
    assert fine == [False, False, [], None]
    assert stop == [True, False, [], None]
    assert save == [False, True, [], None]
    assert bad == [False, False, [[7, "cut short"], [8, "cut short"]], None]
    assert of_one == [False, False, [[9, "of one rank"]], None]
    assert lost == [False, False, [[3, "empty"]], ["gone on 1", 66]]


def test_weights_of_rank_0_are_shared_and_sums_are_of_all(results):
    for result in results:
        assert result["weight"] == [[1.0, 1.0]] and result["sum"] == [1, 10]


def test_the_gradient_of_what_is_stacked_comes_from_all_ranks(results):
    # d/dx0 of both ranks' losses: 1 + 2; d/dx1: 10 + 20
    assert [result["grad"] for result in results] == [[3.0, 3.0], [30.0, 30.0]]


def test_the_gradient_of_what_is_stacked_has_no_second_derivative(results):
    assert all("no second derivative" in result["refused"] for result in results)


def test_one_rank_agrees_with_itself():
    world, error = World(0, 1, torch.device("cpu")), DataError("gone")
    said = world.agree(stop=True, save=False, bad=[(1, "x")], error=error)
    assert isinstance(said, Verdict) and said.stops and not said.saves and said.bad == [(1, "x")]
    assert said.error and str(said.error) == "gone" and said.error.exit_code == error.exit_code
