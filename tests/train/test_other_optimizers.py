"""apex as far as it can be looked at without it and without a card; DeepSpeed's AdamW of the host for real."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastbeit.config.sections import OptimConfig
from fastbeit.engine.optimizer_state import read_state, write_state
from fastbeit.engine.update import clip_and_step
from fastbeit.errors import USAGE, RunError
from fastbeit.train.optim import make_optimizer
from fastbeit.train.other_optimizers import make_apex

CUDA, CPU = torch.device("cuda"), torch.device("cpu")  # no card is asked for: modules are made of text

# as in its source: whether the extensions are there shows when an optimizer is made
APEX_OPTIMIZERS = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, adam_w_mode):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.given = dict(adam_w_mode=adam_w_mode)
        if {broken}:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

class FusedLAMB(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, adam_w_mode, max_grad_norm=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.given = dict(adam_w_mode=adam_w_mode, max_grad_norm=max_grad_norm)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes modules that can be imported in this test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
            monkeypatch.delitem(sys.modules, name)

    forget()

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        forget()
        importlib.invalidate_caches()

    return write


def apex(name: str = "apex_adam", device: torch.device = CUDA) -> torch.optim.Optimizer:
    optim = OptimConfig.model_validate({"name": name})
    return make_apex(optim, [{"params": [nn.Parameter(torch.ones(2))]}], device)


def refused(device: torch.device = CUDA) -> str:
    with pytest.raises(RunError) as caught:
        apex(device=device)
    assert caught.value.exit_code == USAGE and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_there_in_place_of_apex_is_said(site):
    assert "found: apex is not installed; build it: git clone https://github.com/NVIDIA/apex" in refused()
    site("apex/__init__.py", "")
    assert "found: not NVIDIA's apex, but an unrelated package of that name; pip uninstall apex; build it" in refused()
    site("apex/optimizers/__init__.py", "")
    assert "found: NVIDIA's apex, without FusedAdam; build it" in refused()
    site("apex/optimizers/__init__.py", APEX_OPTIMIZERS.replace("{broken}", "True"))
    assert "found: NVIDIA's apex, built without its CUDA extensions: amp_C is missing; build it" in refused()
    site("amp_C.py", "raise ImportError('undefined symbol: _ZN3c10')")
    assert "found: apex was built for another PyTorch: undefined symbol: _ZN3c10; pip uninstall apex" in refused()
    site("amp_C.py", "")
    assert "found: apex.optimizers.FusedAdam requires cuda extensions; build it" in refused()


def test_apex_wants_a_gpu():
    wanted = "optim.name=apex_adam wants a CUDA GPU, and this runs on cpu; set optim.name=adamw"
    assert refused(device=CPU) == wanted


def test_apex_is_told_to_decay_as_adamw_and_to_clip_nothing(site):
    site("apex/__init__.py", "")
    site("apex/optimizers/__init__.py", APEX_OPTIMIZERS.replace("{broken}", "False"))
    site("amp_C.py", "")
    assert vars(apex("apex_adam"))["given"] == {"adam_w_mode": True}
    assert vars(apex("apex_lamb"))["given"] == {"adam_w_mode": True, "max_grad_norm": float("inf")}


def test_a_compiler_that_is_not_there_is_said(monkeypatch):
    """Or ninja, which PyTorch looks for on the PATH, too."""
    builder = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder
    monkeypatch.setattr(builder, "_loaded_ops", {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="^optim.name=ds_cpu_adam: DeepSpeed could not compile .*ninja") as caught:
        make_optimizer(nn.Linear(2, 2), OptimConfig(name="ds_cpu_adam"))
    assert caught.value.exit_code == USAGE and "\n" not in str(caught.value)


@pytest.mark.long  # some minutes: its operator is compiled, where it was not before
def test_deepspeeds_adamw_of_the_host_steps_as_pytorchs():
    """And goes on from what was saved, a skipped step in between."""

    def train(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        optim = OptimConfig.model_validate({"name": name, "lr": 0.1, "weight_decay": 0.5})
        optimizer = make_optimizer(model, optim)
        for factor in (1.0, 10.0, float("nan"), 1.0):
            (model(torch.randn(32, 8)).square().sum() * factor).backward()
            clip_and_step(optimizer, 3.0)
            state, optimizer = read_state(model, optimizer), make_optimizer(model, optim)
            write_state(model, optimizer, state)
        return model

    one, other = train("ds_cpu_adam"), train("adamw")
    for value, wanted in zip(one.parameters(), other.parameters(), strict=True):
        # it has 1 - 0.999 of float32 numbers, off by 5e-5 of it, which is 2.5e-6 of a step of 0.1; three steps
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)
