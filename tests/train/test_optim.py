import copy

import pytest
import torch
from torch import nn

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.optimizer_state import read_state, write_state
from fastbeit.engine.update import clip_and_step
from fastbeit.model.beit import make_beit
from fastbeit.train.optim import learning_rate, make_optimizer, parameter_groups


def test_groups_are_the_authors():
    with torch.device("meta"):
        model = make_beit(Config(), vocab_size=8192)
    still, decayed = parameter_groups(model, 0.05)
    assert (len(still["params"]), len(decayed["params"])) == (137, 52)
    assert (sum(p.numel() for p in still["params"]), sum(p.numel() for p in decayed["params"])) == (140_288, 91_825_488)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"mask_token", "rel_pos_bias.relative_position_bias_table", "lm_head.weight"} <= decayed_names
    assert "cls_token" not in decayed_names
    assert (still["weight_decay"], decayed["weight_decay"]) == (0, 0.05)


def test_learning_rate_is_the_authors():
    """800 epochs of ImageNet-1k at batch 2048: what their code gives; 300 epochs: the mean that their log shows."""
    optim = OptimConfig()
    rates = [learning_rate(step, 500_000, 6250, optim) for step in (0, 6249, 6250, 499_999)]
    assert rates == [0, 1.5e-3, 1.5e-3, pytest.approx(1.0000000015e-5, rel=1e-10)]
    epoch = 1_281_167 // 2048
    last_epoch = [learning_rate(step, 300 * epoch, 10 * epoch, optim) for step in range(299 * epoch, 300 * epoch)]
    # the mean of 625 doubles: the log's own digits, but for the order of the sum
    assert sum(last_epoch) / epoch == pytest.approx(1.001460655613469e-05, rel=1e-13)


@pytest.mark.parametrize("num_warmup, num_steps", [(0, 1), (1, 1), (1, 2), (5, 5)])
def test_learning_rate_of_a_short_run_is_finite(num_warmup, num_steps):
    rates = [learning_rate(step, num_steps, num_warmup, OptimConfig()) for step in range(num_steps)]
    assert all(0 <= rate <= 1.5e-3 for rate in rates)


@pytest.mark.parametrize("clip_grad", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_step_equals_clip_grad_norm_and_adamw(clip_grad, weight_decay):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, OptimConfig(weight_decay=weight_decay, lr=0.1))
    oracle = torch.optim.AdamW(parameter_groups(theirs, weight_decay), lr=0.1, fused=False, foreach=False)
    for _ in range(4):
        x = 10 * torch.randn(32, 8)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        norm = clip_and_step(optimizer, clip_grad)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad or float("inf"))
        oracle.step()
        oracle.zero_grad()
        torch.testing.assert_close(norm, wanted)
        # fp32 rounding of four steps of size 0.1
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))

    def step(factor: float) -> torch.Tensor:
        (model(torch.ones(2, 8)).sum() * factor).backward()
        return clip_and_step(optimizer, 3.0)

    step(1.0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    assert not torch.isfinite(step(poison))
    after = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    step(1.0)
    assert not torch.equal(model.weight, before[0]["weight"])


def test_moments_are_restored_as_the_weights_lie_in_memory():
    image = torch.randn(1, 3, 8, 8)

    def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(image).square().sum().backward()
        clip_and_step(optimizer, clip_grad=0)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch does not declare it
        return model, make_optimizer(model, OptimConfig(steps=9, lr=0.1))

    whole, optimizer = make()
    take_step(whole, optimizer)
    saved, moments = copy.deepcopy((whole.state_dict(), read_state(whole, optimizer)))
    take_step(whole, optimizer)
    resumed, optimizer = make()
    resumed.load_state_dict(saved)
    # as they come from a file
    write_state(resumed, optimizer, {name: value.contiguous() for name, value in moments.items()})
    take_step(resumed, optimizer)
    for value, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, wanted)
