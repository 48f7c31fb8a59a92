"""Gradients and losses of each engine on two ranks, against one process on the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastbeit.engine.ranks import World
from helpers import parity
from helpers.ranks import launched, torchrun

ONE = World(0, 1, torch.device("cpu"))
Found = tuple[dict[str, Tensor], dict[str, list[float]]]


@pytest.fixture(scope="module")
def one() -> Found:
    return parity.run_all("single", ONE)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("ddp", marks=pytest.mark.long),
        pytest.param("0", id="zero0", marks=pytest.mark.long),
        pytest.param("1", id="zero1", marks=pytest.mark.long),
        pytest.param("2", id="zero2", marks=pytest.mark.long),
        pytest.param("3", id="zero3"),
    ],
)
def two(request, tmp_path_factory) -> Found:
    """What two ranks found; one start for all ways of taking a step."""
    path = tmp_path_factory.mktemp("parity") / "found.safetensors"
    launched([*torchrun(), "helpers.parity", request.param, str(path)], cwd=Path(parity.__file__).parent.parent)
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_gradients_are_those_of_one_process(one, two):
    assert two[0].keys() == one[0].keys()
    for name, gradient in two[0].items():
        way, _, parameter = name.partition("/")
        exact = one[0][f"fp32-1-False/{parameter}"]
        if way.startswith("fp32"):
            # sums of 32 bits in another order
            assert error(gradient, exact) < 1e-5, name
        else:
            # rounding of 16 bits is that of other micro-batches: as large as one process has, and not twice as large
            mine = max(error(one[0][f"bf16-{parts}-False/{parameter}"], exact) for parts in (1, 2))
            assert error(gradient, exact) < 2 * mine + 1e-3, name


def test_losses_of_ten_steps_are_those_of_one_process(one, two):
    for way, losses in two[1].items():
        exact = one[1]["fp32-1-False"]
        if way.startswith("fp32"):
            assert losses == pytest.approx(exact, abs=1e-4), way
        else:
            mine = max(abs(a - b) for a, b in zip(one[1][way], exact, strict=True))
            assert losses == pytest.approx(exact, abs=2 * mine + 1e-3), way
    # the steps did something: else an optimizer that does nothing would pass
    assert one[1]["fp32-1-False"][-1] < one[1]["fp32-1-False"][0] - 0.1
