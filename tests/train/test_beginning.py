"""What the log says of how a training is run."""

import pytest
import torch

from fastbeit.config.running import EngineConfig
from fastbeit.train.beginning import how

ZERO_3 = {"name": "deepspeed", "zero_stage": 3}


@pytest.mark.parametrize(
    "engine, device, said",
    [
        ({}, "cuda", "each block (auto: on cuda)"),
        ({}, "cpu", "nothing (auto: on cpu)"),
        ({"name": "deepspeed", "zero_stage": 2}, "cuda", "each block (auto: on cuda)"),
        (ZERO_3, "cuda", "nothing (auto: ZeRO-3 gathers weights in hooks)"),
        (ZERO_3 | {"compile": "off"}, "cuda", "nothing (as set)"),
        ({"compile": "on"}, "cpu", "each block (as set)"),
    ],
)
def test_what_is_compiled_is_said_with_its_reason(engine, device, said):
    settings = EngineConfig.model_validate({"precision": "bf16", **engine})
    assert how(settings, torch.device(device)) == f"compiled: {said}; activations in bfloat16"
