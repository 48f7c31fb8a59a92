"""Which kernels a run takes: tried against plain PyTorch, replaced by name, alike on all ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.model import kernels as module
from fastbeit.model import trials
from fastbeit.model.attention import attend
from fastbeit.model.kernels import chosen_kernels
from helpers.tiny import SETTINGS

CPU = torch.device("cpu")


def config(**kernels: Any) -> Config:
    return Config.model_validate(SETTINGS | {"kernels": kernels})


def choose(**kernels: Any) -> tuple[dict[str, str], list[str]]:
    chosen = chosen_kernels(config(**kernels), 32, World(0, 1, CPU))
    return chosen.config.kernels.by_op.implementations, chosen.lines


PLAIN = dict(attention="sdpa", masked_embed="reference", loss="reference", masks="reference")


def test_plain_pytorch_on_a_cpu():
    chosen, lines = choose()
    assert chosen == PLAIN and choose(backend="reference")[0] == PLAIN
    assert lines == [
        "kernels: attention sdpa, masked_embed reference, loss reference, masks reference",
        "attention: sdpa (on cpu)",
    ]


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


class WrongBiasGradient(torch.autograd.Function):
    """A bias as it is, and 1.01 times its gradient."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return bias.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.01


# what computes each operator, and at which place it takes its bias
OPERATORS = {"masked_embed": ("masked_embed", 3), "loss": ("linear_cross_entropy", 2), "attention": ("attend", 1)}


def as_if_compiled(monkeypatch: pytest.MonkeyPatch, planted: str = "") -> None:
    """Operators run in plain PyTorch under the name of Triton, as on a card; one of them has a wrong bias gradient."""
    monkeypatch.setattr(module, "_tries", lambda device: True)
    monkeypatch.setattr(module, "uses_triton", lambda backend, device: backend != "reference")
    monkeypatch.setattr(module, "attention_choice", lambda *_: ("triton", "on cuda"))
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trials.masking, "draw_masks", plain_masks(trials.masking.draw_masks))
    for op, (name, place) in OPERATORS.items():
        monkeypatch.setattr(trials, name, plain(getattr(trials, name), place, op == planted))


def plain(operator: Callable, place: int, is_wrong: bool) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        asked = kwargs.pop("backend", None) or given.pop()
        if is_wrong and asked == "triton":
            given[place] = WrongBiasGradient.apply(given[place])
        if operator is attend:
            return operator(*given, "eager")
        return operator(*given, **kwargs, backend="reference")

    return run


def plain_masks(draw: Callable) -> Callable:
    return lambda rule, *args: draw(replace(rule, backend="reference"), *args)


@pytest.mark.parametrize("precision, op", [(p, op) for p in ("fp32", "bf16") for op in OPERATORS])
def test_a_bias_gradient_that_is_wrong_by_one_percent_is_replaced(
    precision: str, op: str, monkeypatch: pytest.MonkeyPatch
):
    """On the rank where it is wrong, and on one where it is right."""
    settings = Config.model_validate(SETTINGS | {"engine": {"precision": precision}})
    world, told, all_triton = World(0, 1, CPU), [], dict.fromkeys(PLAIN, "triton")
    with monkeypatch.context() as patch:
        as_if_compiled(patch)
        assert chosen_kernels(settings, 32, world).config.kernels.by_op.implementations == all_triton
        as_if_compiled(patch, planted=op)
        patch.setattr(World, "gather", lambda self, items: told.extend(items) or items)
        wrong_here = chosen_kernels(settings, 32, world)
    with monkeypatch.context() as patch:
        as_if_compiled(patch)
        patch.setattr(World, "gather", lambda self, items: [*items, *told])
        wrong_there = chosen_kernels(settings, 32, world)
    assert wrong_here == wrong_there
    assert wrong_here.config.kernels.by_op.implementations == all_triton | {op: PLAIN[op]}
    line = wrong_here.lines[-1]
    assert f"{op}: {PLAIN[op]}, because triton does not serve: its grad_bias differs from float64's by " in line
