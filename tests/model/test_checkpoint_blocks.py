"""Activations computed again in the backward: the same bits, and only the blocks' inputs in memory."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.model.beit import Beit, make_beit
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import SETTINGS

VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_block": {"relative_position": "per_block"},
    "absolute": {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0},
}


def model_of(checkpoint_blocks: bool, attention: str = "auto", **fields: Any) -> Beit:
    torch.manual_seed(0)
    settings = SETTINGS | {"model": SETTINGS["model"] | fields, "engine": {"checkpoint_blocks": checkpoint_blocks}}
    settings |= {"kernels": {"attention": attention}}
    return make_beit(Config.model_validate(settings), vocab_size=32)


def inputs() -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=gen)
    slots = torch.arange(6).expand(4, -1)
    masked = torch.zeros(4, 16, dtype=torch.bool).scatter_(1, slots, True)
    keep = torch.randint(2, (4, 2, 2), generator=gen) / 0.8
    return images, masked, slots, torch.randint(32, (4, 6), generator=gen), keep


def step(model: Beit, precision: torch.dtype) -> dict[str, Tensor]:
    """The loss, and every gradient."""
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss_sum, _ = model(*inputs())
    loss_sum.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"loss": loss_sum.detach(), **grads}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_same_bits(variant, precision):
    kept, recomputed = (step(model_of(wanted, **VARIANTS[variant]), precision) for wanted in (False, True))
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="interprets the kernel")
def test_so_they_are_by_our_own_attention():
    """Not compiled, it is asked for its saved tensors by the checkpoint, which gives each of them once."""
    kept, recomputed = (step(model_of(wanted, attention="triton"), torch.float32) for wanted in (False, True))
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


def test_each_block_runs_twice_where_there_is_a_backward_and_once_where_there_is_none():
    model, runs = model_of(True), Counter()
    for i, block in enumerate(model.blocks):
        # what ends a forward may be left out of the second: hooks before it see both
        block.register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    step(model, torch.float32)
    assert runs == {0: 2, 1: 2}
    runs.clear()
    with torch.no_grad():
        model(*inputs())
    assert runs == {0: 1, 1: 1}


# Dynamo makes an instance of torch.autograd.Function, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# Dynamo looks at a block's input, and hides the warning only where warnings are no errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("part", ["whole", "block by block"])
def test_compiled(part):
    """The model as a whole, and each block alone."""
    expected, model = step(model_of(False), torch.float32), model_of(True)
    for module in model.blocks if part == "block by block" else [model]:
        # without code generation: the question is whether forward and backward trace
        module.compile(backend="aot_eager")
    torch.testing.assert_close(step(model, torch.float32), expected, atol=1e-5, rtol=1e-5)
