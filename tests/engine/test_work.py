"""The formulas of FLOPs against what PyTorch counts on tensors without memory."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step.rates import model_flops
from fastbeit.config.pretrain import Config
from fastbeit.config.tokenizer import Architecture
from fastbeit.engine.work import step_flops, tokenizer_flops
from fastbeit.tokenizer.dvae import Encoder
from helpers.tiny import SETTINGS

LARGE = {"model": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096}}
VOCAB_SIZE = 8192


@pytest.mark.parametrize("authors", [False, True], ids=["ours", "authors"])
@pytest.mark.parametrize("settings", [{}, LARGE, SETTINGS, {"predict": "all"}], ids=["B", "L", "tiny", "predict=all"])
def test_a_step(settings: dict[str, Any], authors: bool):
    config = Config.model_validate(settings)
    assert step_flops(config, VOCAB_SIZE, authors) == model_flops(config, authors)


# OpenAI's; another number of blocks, widths, groups and words
@pytest.mark.parametrize(
    "arch",
    [Architecture(), Architecture(n_hid=8, vocab_size=32, group_count=3, n_blk_per_group=3)],
    ids=["dVAE", "small"],
)
@pytest.mark.parametrize("view", [(112, 112), (64, 32)])
def test_a_tokenizer(arch: Architecture, view: tuple[int, int]):
    with torch.device("meta"):
        encoder, images = Encoder(arch), torch.empty(1, 3, *view)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(images)
    assert tokenizer_flops(arch, view) == counter.get_total_flops()
