"""float16 with a dynamic loss scale: as PyTorch's, and through a checkpoint; test_update_on_ranks.py has two ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine import loss_scale
from fastbeit.engine.ddp import TorchEngine
from fastbeit.engine.loss_scale import LossScale
from fastbeit.engine.protocol import compute_dtype, make_engine
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError
from fastbeit.jobs.pretrain import blank_inputs
from fastbeit.train.meter import Meter
from fastbeit.train.optim import make_optimizer
from helpers.tiny import SETTINGS, tiny_model

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


def engine_of(name: str = "adamw", precision: str = "fp16", scale: float | None = None) -> TorchEngine:
    optim = OptimConfig.model_validate({"name": name, "lr": 0.01})
    model = tiny_model()
    settings = EngineConfig.model_validate({"precision": precision, "device": "cpu"})
    engine = make_engine(settings, optim, model, make_optimizer(model, optim), WORLD)
    assert isinstance(engine, TorchEngine)
    if scale is not None:
        assert engine.scale
        engine.scale.value.fill_(scale)
    return engine


def take_step(engine: TorchEngine, count: float = 24.0) -> Tensor:
    engine.accumulate(blank_inputs(Config.model_validate(SETTINGS), 4, CPU), torch.tensor(count), True)
    return engine.step()


def weights(engine: TorchEngine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def value_of(engine: TorchEngine) -> float:
    assert engine.scale
    return engine.scale.value.item()


def test_the_scale_rises_and_falls_as_pytorchs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "STEPS_TO_GROW", 3)
    oracle = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = nn.Parameter(torch.ones(1))
    optimizer, ours, found, wanted = torch.optim.SGD([parameter], lr=0.0), LossScale(CPU), [], []
    assert ours.value.item() == oracle.get_scale() == 65536
    for overflows in [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]:
        oracle.scale(parameter.sum())
        parameter.grad = torch.full((1,), float("inf") if overflows else 1.0)
        oracle.step(optimizer)
        oracle.update()
        ours.adjust(torch.tensor(bool(overflows)))
        found.append(ours.value.item())
        wanted.append(oracle.get_scale())
    assert found == wanted and len({*found}) > 3


def test_gradients_that_float16_cannot_hold_arrive_all_the_same():
    """Of a loss so small that in the blocks all are below 2^-24; the norm that is said is without the scale."""
    engines = exact, scaled, plain = engine_of(precision="fp32"), engine_of(scale=2.0**30), engine_of(scale=1.0)
    norms = [take_step(engine, 1e10).item() for engine in engines]
    first, second, third = (
        engine.optimizer_state()["exp_avg.blocks.0.mlp.fc1.weight"] for engine in (exact, scaled, plain)
    )
    # float16 rounds by 2^-11, in some ten products one after the other
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert (second - first).norm() < 1e-2 * first.norm()
    assert not third.any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_overflow_the_scale_changes_nothing_but_rounding(name: str):
    one, other = engine_of(name, scale=1.0), engine_of(name, scale=2.0**10)
    for _ in range(3):
        # gradients as large as these lose at scale 1 what is below 2^-24, some 1e-5 of them
        assert take_step(one).item() == pytest.approx(take_step(other).item(), rel=1e-2)
    assert (value_of(one), value_of(other)) == (1.0, 2.0**10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_overflow_halves_the_scale_until_it_fits(name: str):
    """A start that is 2^30 too high: no update and no moment comes of it, and then it trains."""
    engine = engine_of(name, scale=2.0**40)
    before = weights(engine)
    while not take_step(engine).isfinite():
        assert engine.overflowed and engine.overflowed.item()
        torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
    assert 1 < value_of(engine) < 2.0**36
    assert engine.overflowed is not None and not engine.overflowed.item()
    assert not any(torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True) if a.any() or b.any())
    steps = {value.item() for key, value in engine.optimizer_state().items() if key.startswith("step.")}
    assert steps == {1.0}


def test_only_at_the_least_scale_does_a_skipped_step_count_as_lost():
    scale, meter = LossScale(CPU), Meter(WORLD, 8)
    scale.value.fill_(4.0)
    counts = []
    for norm in ["inf", "inf", "nan", "inf", "1", "inf"]:
        grad_norm = torch.tensor(float(norm))
        scale.adjust(~grad_norm.isfinite())
        meter.add((torch.tensor(0.0),))
        meter.end_step(torch.tensor(1), grad_norm, scale.overflowed)
        *_, figures = meter.read()
        counts.append((scale.value.item(), figures["skipped_steps"], figures["skipped_in_a_row"]))
    assert counts == [(2, 1, 0), (1, 2, 0), (1, 3, 1), (1, 4, 2), (1, 4, 0), (1, 5, 1)]


def test_the_scale_goes_through_a_checkpoint():
    engine = engine_of(scale=2.0**9)
    take_step(engine)
    state = engine.optimizer_state()
    assert (state["loss_scale"].item(), state["growth_tracker"].item()) == (2**9, 1)
    again, without = engine_of(), engine_of(precision="fp32")
    again.load_optimizer_state(state)
    torch.testing.assert_close(again.optimizer_state(), state, rtol=0, atol=0)
    # a part of the run in another precision
    without.load_optimizer_state(state)
    assert {*state} - {*without.optimizer_state()} == {"loss_scale", "growth_tracker"}
    again.load_optimizer_state(without.optimizer_state())
    assert value_of(again) == 2**9


def test_auto_is_what_a_card_is_best_at(monkeypatch: pytest.MonkeyPatch):
    def chosen(capability: tuple[int, int], **engine: Any) -> torch.dtype:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return compute_dtype(EngineConfig.model_validate(engine), torch.device("cuda"))

    found = {capability: chosen(capability) for capability in [(9, 0), (8, 0), (7, 5), (7, 0), (6, 1)]}
    assert [*found.values()] == [torch.bfloat16] * 2 + [torch.float16] * 2 + [torch.float32]
    assert chosen((7, 0), name="deepspeed") == torch.float32
    assert compute_dtype(EngineConfig(), CPU) == torch.float32


def test_float16_under_deepspeed_is_refused():
    with pytest.raises(ConfigError, match="precision=fp16 has not been tried with DeepSpeed.*; set name=ddp"):
        configure(Config, ["engine.name=deepspeed", "engine.precision=fp16"])
