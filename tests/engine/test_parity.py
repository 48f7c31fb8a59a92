"""Gradients and losses of each engine on one to three ranks, against one process on the whole batch."""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastbeit.engine.ranks import World
from helpers import parity
from helpers.ranks import launched, torchrun

# each engine and its number of ranks; ZeRO on one is for a single GPU that offloads
CASES = [*itertools.product(("ddp", "0", "1", "2", "3"), (2, 3)), *itertools.product(("1", "2", "3"), (1,))]
QUICK = ("3", 2)


class Found(NamedTuple):
    engine: str
    num_ranks: int
    gradients: dict[str, Tensor]  # by WAY/NAME
    losses: dict[str, list[float]]  # by way


def case(engine: str, num_ranks: int):
    name = f"zero{engine}" if engine.isdecimal() else engine
    marks = [] if (engine, num_ranks) == QUICK else [pytest.mark.long]
    return pytest.param((engine, num_ranks), id=f"{name}-{num_ranks}", marks=marks)


@pytest.fixture(scope="module", params=[case(*one) for one in CASES])
def ranks(request, tmp_path_factory) -> Found:
    """What all ranks found; one start for all ways of taking a step."""
    engine, num_ranks = request.param
    path = tmp_path_factory.mktemp("parity") / "found.safetensors"
    launched([*torchrun(num_ranks), "helpers.parity", engine, str(path)], cwd=Path(parity.__file__).parent.parent)
    return Found(engine, num_ranks, load_file(path), json.loads(path.with_suffix(".json").read_text()))


@functools.cache
def one_process(precision: str, num_micro_batches: int) -> tuple[dict[str, Tensor], list[float]]:
    settings = parity.settings_of("single", precision, num_micro_batches, False)
    return parity.run(settings, num_micro_batches, World(0, 1, torch.device("cpu")))


def in_same_parts(way: str, num_ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    """What one process finds with the micro-batches of all ranks: what rounding to 16 bits does hangs on them."""
    precision, accumulate, _ = way.split("-")
    return one_process(precision, num_ranks * int(accumulate))


def sent_in_bf16() -> set[str]:
    """Parameters of PyTorch's linear layers: under autocast ZeRO adds their gradients over ranks in its dtype."""
    layers = [(name, one) for name, one in parity.make_model(False).named_modules() if type(one) is nn.Linear]
    return {f"{name}.{own}" for name, layer in layers for own, _ in layer.named_parameters(recurse=False)}


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_gradients_are_those_of_one_process(ranks):
    (exact, _), rounded = one_process("fp32", 1), sent_in_bf16()
    assert ranks.gradients.keys() == {f"{'-'.join(map(str, way))}/{name}" for way in parity.WAYS for name in exact}
    for name, gradient in ranks.gradients.items():
        way, _, parameter = name.partition("/")
        # fp32: sums in another order; bf16: twice the error of one process
        allowed = 1e-5
        if way.startswith("bf16"):
            allowed = 2 * error(in_same_parts(way, ranks.num_ranks)[0][parameter], exact[parameter])
            if ranks.engine in ("1", "2", "3") and parameter in rounded:
                # each rank's gradient is rounded once more, to 8 binary digits
                allowed += ranks.num_ranks * 2**-8
        assert error(gradient, exact[parameter]) < allowed, name


def test_losses_of_ten_steps_are_those_of_one_process(ranks):
    _, exact = one_process("fp32", 1)
    for way, losses in ranks.losses.items():
        allowed = 1e-4
        if way.startswith("bf16"):
            mine = in_same_parts(way, ranks.num_ranks)[1]
            allowed = 2 * max(abs(a - b) for a, b in zip(mine, exact, strict=True))
        # no share of the loss itself, which pytest allows for by default
        assert losses == pytest.approx(exact, abs=allowed, rel=0), way
    # the steps did something, measured on one and the same batch: else an optimizer that does nothing would pass
    assert exact[-1] < exact[0] - 0.1
