"""Which kernels a run takes: tried against plain PyTorch, replaced by name, alike on all ranks."""

from dataclasses import asdict, fields
from typing import Any

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Kernels
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.model import kernels as module
from fastbeit.model.kernels import chosen_kernels, trials_of, tried
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import SETTINGS

CPU = torch.device("cpu")
OPS = [field.name for field in fields(Kernels)]


def config(**kernels: Any) -> Config:
    return Config.model_validate(SETTINGS | {"kernels": kernels})


def choose(**kernels: Any) -> tuple[dict[str, str], list[str]]:
    chosen, lines = chosen_kernels(config(**kernels), 32, World(0, 1, CPU))
    return asdict(chosen.kernels.by_op), lines


PLAIN = dict(attention="sdpa", masked_embed="reference", loss="reference", masks="reference")


def test_plain_pytorch_on_a_cpu():
    chosen, lines = choose()
    assert chosen == PLAIN and choose(backend="reference")[0] == PLAIN
    assert lines == [
        "kernels: attention sdpa, masked_embed reference, loss reference, masks reference",
        "attention: sdpa (on cpu)",
    ]


@pytest.mark.skipif(not INTERPRETED, reason="interprets the kernels")
@pytest.mark.parametrize("op", OPS)
def test_each_kernel_passes_its_trial(op: str, monkeypatch: pytest.MonkeyPatch):
    """On a CPU attention would not be tried: nobody asks for it there."""
    monkeypatch.setattr(module, "attention_choice", lambda *_: ("triton", ""))
    assert tried(trials_of(config(), 32, CPU, torch.float32)[op]) is None


def test_what_is_wrong_or_refused_is_told():
    right, wrong = [torch.ones(9)], [torch.ones(9) * 1.1]
    assert tried(lambda backend: right) is None
    assert "differs from plain PyTorch's by 10%" in str(tried(lambda b: wrong if b == "triton" else right))
    assert "differs" in str(tried(lambda b: [torch.full((9,), float("nan"))] if b == "triton" else right))

    def refuse(backend: str) -> list:
        raise MemoryError("out of resource: shared memory, Required: 172032, Hardware limit: 101376\nmore")

    said = tried(refuse)  # pyright: ignore[reportArgumentType]
    assert said == "MemoryError: out of resource: shared memory, Required: 172032, Hardware limit: 101376"


def test_plain_pytorch_takes_over_what_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_refusals", lambda *_: {"attention": "too large", "loss": "too odd"})
    chosen, lines = choose()
    assert chosen == PLAIN
    assert lines[1:] == [
        "attention: sdpa, because triton does not serve: too large",
        "loss: reference, because triton does not serve: too odd",
    ]


def test_what_was_asked_for_by_name_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_refusals", lambda *_: {"loss": "too odd"})
    for asked, key in ((dict(loss="triton"), "loss"), (dict(backend="triton"), "backend")):
        with pytest.raises(ConfigError, match=f"kernels.{key}=triton: too odd"):
            choose(**asked)


def test_xformers_is_refused_where_it_does_not_run():
    with pytest.raises(ConfigError, match=r"kernels.attention=xformers: .*(one of PyTorch|not installed)"):
        choose(attention="xformers")


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch):
    """What one rank cannot run, none does."""
    monkeypatch.setattr(World, "gather", lambda self, items: [{"loss": "another card"}, *items])
    assert choose()[1][-1] == "loss: reference, because triton does not serve: another card"


def test_older_cards_are_not_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(module, "HAS_TRITON", True)
    monkeypatch.setattr(module, "trials_of", lambda *_: {"loss": pytest.fail})
    refused = module._refusals(config(), config().kernels.by_op, 32, torch.device("cuda"), torch.float16)
    assert refused == {"loss": "RuntimeError: it is for cards of compute capability 8.0 and newer"}
