"""The kernels pass the trials that a run makes of them before it begins."""

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.model.trials import trials_of, tried
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import SETTINGS


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="runs the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["masked_embed", "loss", "attention", "masks"])
def test_each_kernel_passes_its_trial(op: str, dtype: torch.dtype, device: str):
    config = Config.model_validate(SETTINGS | {"model": {**SETTINGS["model"], "absolute_position": True}})
    verdict = tried(trials_of(config, 32, torch.device(device), dtype)[op], "triton", dtype)
    assert verdict.wrong is None
    # rounding is seen, so the kernel did run in this dtype; masks are whole numbers
    assert (verdict.error > 1e-8) == (op != "masks")
