"""Every optimizer is clipped, skips what is not finite, and goes on from a checkpoint as if nothing had been."""

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from fastbeit.config.sections import OptimConfig
from fastbeit.engine.loss_scale import LossScale
from fastbeit.engine.optimizer_state import read_state, write_state
from fastbeit.engine.update import clip_and_step
from fastbeit.train.optim import make_optimizer, parameter_groups
from helpers.group_step import GroupStep
from helpers.tiny import tiny_model

Make = Callable[[nn.Module], torch.optim.Optimizer]
CPU = torch.device("cpu")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, OptimConfig(lr=0.1))


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, OptimConfig(name="muon", lr=0.1))


def group_step(model: nn.Module) -> torch.optim.Optimizer:
    return GroupStep(parameter_groups(model, 0.05), lr=0.1)


EVERY = pytest.mark.parametrize("make", [adamw, muon, group_step], ids=lambda make: make.__name__)


def give_gradients(model: nn.Module, seed: int, factor: float = 1.0) -> float:
    """The same for a seed; gives their norm."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return copy.deepcopy({**model.state_dict(), **read_state(model, optimizer)})


@EVERY
@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_gradients_are_clipped_and_unscaled(make: Make, factor: float):
    """As the optimizer alone, with gradients that were clipped before; whatever the loss was multiplied by."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer, oracle = make(ours), make(theirs)
    scale = LossScale(CPU) if factor != 1 else None
    if scale:
        scale.value.fill_(factor)
    for seed in range(3):
        give_gradients(ours, seed, factor)
        wanted = give_gradients(theirs, seed)
        norm = clip_and_step(optimizer, 3.0, scale)
        nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)
        oracle.step()
        assert wanted > 30 and norm.item() == pytest.approx(wanted, rel=1e-5)
        assert all(parameter.grad is None for parameter in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # fp32 rounding of three steps of 0.1; Muon's bfloat16 makes 2^-9 of a rounding that fell to the other side
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2 if make is muon else 1e-6)


@EVERY
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(make: Make, poison: float, is_scaled: bool):
    model = tiny_model()
    optimizer, scale = make(model), LossScale(CPU) if is_scaled else None
    give_gradients(model, 0)
    clip_and_step(optimizer, 3.0, scale)
    before = everything(model, optimizer)
    give_gradients(model, 1)
    *_, last = model.parameters()
    assert last.grad is not None
    last.grad.view(-1)[-1] = poison
    assert not clip_and_step(optimizer, 3.0, scale).isfinite()
    torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
    give_gradients(model, 1)
    clip_and_step(optimizer, 3.0, scale)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


@EVERY
def test_what_was_saved_goes_on_as_if_nothing_had_been(make: Make):
    whole = tiny_model()
    optimizer = make(whole)
    for seed in range(2):
        give_gradients(whole, seed)
        clip_and_step(optimizer, 3.0)
    weights, state = copy.deepcopy((whole.state_dict(), read_state(whole, optimizer)))
    give_gradients(whole, 2)
    clip_and_step(optimizer, 3.0)
    resumed = tiny_model()
    resumed.load_state_dict(weights)
    again = make(resumed)
    write_state(resumed, again, state)
    torch.testing.assert_close(read_state(resumed, again), state, rtol=0, atol=0)
    give_gradients(resumed, 2)
    clip_and_step(again, 3.0)
    torch.testing.assert_close(everything(resumed, again), everything(whole, optimizer), rtol=0, atol=0)


def test_a_step_that_belongs_to_a_group_is_written_with_each_parameter():
    model = tiny_model()
    optimizer = group_step(model)
    assert read_state(model, optimizer) == {}
    give_gradients(model, 0)
    clip_and_step(optimizer, 0)
    steps = {name: value for name, value in read_state(model, optimizer).items() if name.startswith("group_step.")}
    assert len(steps) == len(list(model.parameters()))
    assert all((value.dtype, value.ndim, value.item()) == (torch.int64, 0, 1) for value in steps.values())


def test_a_state_of_another_model_is_refused():
    model = tiny_model()
    optimizer = adamw(model)
    give_gradients(model, 0)
    clip_and_step(optimizer, 0)
    state = {name: value for name, value in read_state(model, optimizer).items() if not name.endswith("cls_token")}
    with pytest.raises(KeyError, match="cls_token"):
        write_state(model, adamw(model), state)


def test_of_pytorchs_adamw_no_value_comes_to_the_host(monkeypatch: pytest.MonkeyPatch):
    """On tensors without memory, where reading a value is an error; with a loss scale."""
    # the fused optimizer runs on no such tensors, but for this check
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
    meta = torch.device("meta")

    def step(make: Make) -> None:
        model = tiny_model().to(meta)
        optimizer = make(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        clip_and_step(optimizer, 3.0, LossScale(meta))

    step(adamw)
    with pytest.raises(RuntimeError, match="meta tensor"):
        step(muon)
