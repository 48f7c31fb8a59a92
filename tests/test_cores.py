"""Threads: as many as a run may have, and asleep while they wait."""

import os
import re
import sys

import pytest
import torch

from fastbeit.config.running import EngineConfig
from fastbeit.cores import num_cores
from fastbeit.engine.ranks import start_world
from helpers.waiting import finished

STARTS = "import fastbeit.cli; import torch"


def env_of(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **settings}


@pytest.mark.parametrize(
    "settings, spins", [({}, False), ({"OMP_WAIT_POLICY": "ACTIVE"}, True), ({"GOMP_SPINCOUNT": "7"}, True)], ids=str
)
def test_threads_that_wait_sleep_unless_the_user_wants_otherwise(settings, spins):
    """As GNU's OpenMP, which torch brings, says that it has understood when torch loads it."""
    env = env_of(OMP_DISPLAY_ENV="VERBOSE", **settings)
    said = finished([sys.executable, "-c", STARTS], env=env, check=True).stderr
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)
    if not counts:
        pytest.skip("this torch has another OpenMP")
    assert [int(count) > 0 for count in counts] == [spins] * len(counts)


def test_a_run_has_a_thread_a_core_unless_the_user_said_how_many(monkeypatch):
    before = torch.get_num_threads()
    try:
        for said, ranks, wanted in ((None, 1, num_cores()), (None, 2, max(1, num_cores() // 2)), ("3", 1, 3)):
            torch.set_num_threads(3)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            if said:
                monkeypatch.setenv("OMP_NUM_THREADS", said)
            start_world(EngineConfig(name="single", device="cpu"))
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the scheduler's list of cores is known on Linux")
def test_cores_are_those_that_the_scheduler_gives():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from fastbeit.cores import num_cores; print(num_cores())"
    assert finished([sys.executable, "-c", code], env=env_of(), check=True).stdout == "1\n"
