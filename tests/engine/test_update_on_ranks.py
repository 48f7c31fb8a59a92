"""Two real ranks: an overflow on one is one of both, and Muon makes of both their images what one process does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbeit.engine.ranks import World
from helpers.muon_steps import train_by_muon
from helpers.ranks import launched, torchrun

SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from torch import nn
from fastbeit.config.running import EngineConfig
from fastbeit.engine.ddp import TorchEngine
from fastbeit.engine.ranks import start_world
from fastbeit.process import leave
from helpers.group_step import GroupStep
from helpers.muon_steps import train_by_muon

class Squares(nn.Linear):
    def forward(self, x):
        return super().forward(x).float().square().sum(), torch.zeros(())

world = start_world(EngineConfig(device="cpu"))
said = []
for make in (lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
             lambda weights: GroupStep([{"params": weights}], lr=0.1)):
    torch.manual_seed(0)
    model = Squares(4, 2)
    engine = TorchEngine(model, make([*model.parameters()]), world, torch.float16, 1.0)
    for step in range(4):
        x = torch.full((3, 4), world.rank + 1.0)
        if (step, world.rank) == (1, 1):
            x[1, 2] = 1e6  # which float16 does not hold
        before = model.weight.tolist()
        engine.accumulate((x,), torch.tensor(6e3), True)
        norm, now = engine.step(), model.weight.tolist()
        said.append([norm.isfinite().item(), engine.scale.value.item(), engine.overflowed.item(), now == before, now])
json.dump(said, open(f"{sys.argv[1]}/{world.rank}.json", "w"))
torch.Tensor.bfloat16 = torch.Tensor.clone  # in bfloat16 a sum in another order may turn a bit that counts
save_file(train_by_muon(world), f"{sys.argv[1]}/{world.rank}.safetensors")
world.leave()
leave(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks write."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(SCRIPT)
    launched([*torchrun()[:-1], str(folder / "train.py"), str(folder)])
    return folder


def test_an_overflow_on_one_rank_is_one_of_both(folder):
    """They skip together, and scales and weights stay the same; with PyTorch's AdamW, and with one like apex's."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 2 * 4
    for steps in (first[:4], first[4:]):
        assert [step[:4] for step in steps] == [
            [True, 65536.0, False, False],
            [False, 32768.0, True, True],
            [True, 32768.0, False, False],
            [True, 32768.0, False, False],
        ]


def test_two_ranks_train_as_one_with_muon(folder, monkeypatch):
    """Each updates whole matrices, from the sum of both their gradients."""
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    one = train_by_muon(World(0, 1, torch.device("cpu")))
    assert "momentum_buffer.blocks.1.attn.qkv.weight" in one
    # fp32 sums in another order: 2e-6 was seen, after three steps of 1e-2
    torch.testing.assert_close(first, one, rtol=0, atol=1e-4)
