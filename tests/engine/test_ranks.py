"""What ranks tell one another, by two real ones."""

import json
import socket
import sys

import pytest
import torch

from fastbeit.config.running import EngineConfig
from fastbeit.engine.ranks import Verdict, World, start_world
from fastbeit.errors import DataError, RunError
from helpers.waiting import PATIENCE_S, finished

THERE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
HERE = THERE | {"LOCAL_RANK": "0"}

SCRIPT = """
import json, sys, time
import torch
from torch import nn
from fastbeit.config.running import EngineConfig
from fastbeit.engine import ranks
from fastbeit.engine.ranks import World, stacked, start_world
from fastbeit.errors import DataError, RunError
from fastbeit.process import leave

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
# what is made on rank 0 takes longer than the others would wait in a collective
ranks.WORD_EVERY_S, words, say = 0.01, [], World.first
World.first = lambda self, item: words.append(item) or say(self, item)

def wait_for_words():
    until = time.monotonic() + float(sys.argv[2])
    while len(words) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    return rank, len(words) >= 5

def fail():
    raise DataError(f"nothing on {rank}", 66)

result["made"] = world.from_first(wait_for_words)
try:
    world.from_first(fail)
except RunError as err:
    result["failed"] = str(err), err.exit_code
result |= {"verdicts": verdicts, "weight": model.weight.tolist(), "grad": x.grad.tolist(), "sum": world.sum([rank, 5])}
print(json.dumps(result), file=open(sys.argv[1] + str(rank), "w"))
world.leave()
leave(0)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "talk.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = finished([*torchrun, str(folder / "talk.py"), str(folder / "rank"), str(PATIENCE_S)])
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


def test_ranks_hear_that_rank_0_is_still_at_it_and_have_what_it_makes(results):
    for result in results:
        assert result["made"] == [0, True] and result["failed"] == ["nothing on 0", 66]


def test_one_rank_agrees_with_itself():
    world, error = World(0, 1, torch.device("cpu")), DataError("gone")
    said = world.agree(stop=True, save=False, bad=[(1, "x")], error=error)
    assert isinstance(said, Verdict) and said.stops and not said.saves and said.bad == [(1, "x")]
    assert said.error and str(said.error) == "gone" and said.error.exit_code == error.exit_code


@pytest.fixture(autouse=True)
def threads_stay():
    """`start_world` shares the cores out."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"WORLD_SIZE": "2"},
            "^RANK is not set, but WORLD_SIZE=2 is; start it by torchrun, deepspeed or srun,",
        ),
        ({"LOCAL_RANK": "1"}, "^RANK is not set, but LOCAL_RANK=1 is"),
        ({"RANK": "0"}, "^WORLD_SIZE is not set, but RANK=0 is"),
        ({"RANK": ""}, "^RANK is empty; start"),
        (THERE, "^LOCAL_RANK is not set, but RANK=0 is; .* or set it to the number of this process on its machine"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "^MASTER_ADDR is not set, but RANK=0 is"),
        ({**HERE, "RANK": "2"}, "^RANK='2', wanted a number below WORLD_SIZE=2"),
        ({**HERE, "RANK": "-1"}, "^RANK='-1', wanted"),
        ({**HERE, "WORLD_SIZE": "two"}, "^WORLD_SIZE='two', wanted a number from 1 on"),
        ({**HERE, "LOCAL_RANK": "x"}, "^LOCAL_RANK='x', wanted a number from 0 on"),
        ({**HERE, "LOCAL_WORLD_SIZE": "x"}, "^LOCAL_WORLD_SIZE='x', wanted a number from 1 on"),
        (
            {**HERE, "MASTER_PORT": "port"},
            "^MASTER_PORT='port', wanted a number below 65536",
        ),
    ],
)
def test_ranks_that_are_not_there_are_said(monkeypatch, given, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(RunError, match=words) as caught:
        start_world(EngineConfig(name="ddp", device="cpu"))
    assert caught.value.exit_code == 2


def test_a_port_that_is_taken_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**HERE, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=r"^the ranks do not meet at .*(EADDRINUSE|in use).*is the port taken"):
            start_world(EngineConfig(name="ddp", device="cpu"))


def test_a_container_that_says_one_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_world(EngineConfig(name="single", device="cpu")).size == 1
