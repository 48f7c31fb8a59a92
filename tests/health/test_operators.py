"""What the doctor says of an operator: checked, wrong, or not there, by name."""

from typing import Any

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.health import operators
from fastbeit.health.operators import Pair, operator, pairs_of, smaller
from fastbeit.model import trials
from fastbeit_kernels.backend import INTERPRETED

CPU = torch.device("cpu")
NUM_WORDS = 64
interpreted = pytest.mark.skipif(not INTERPRETED, reason="interprets the kernels")


def look(pair: Pair, **settings: Any):
    return operator(pair, Config.model_validate(settings), NUM_WORDS, CPU)


@interpreted
@pytest.mark.parametrize("pair", pairs_of(Config()), ids=" ".join)
def test_each_operator_is_right_at_the_shapes_of_beit_base(pair: Pair):
    if pair == ("attention", "xformers"):
        pytest.skip("on CUDA alone")
    found = look(pair)
    assert (found.state, found.name) == ("runs", " ".join(pair)), found.why
    assert found.version == ("interpreted, small, float32" if pair[1] == "triton" else "float32")
    assert found.why == "equal" if pair[0] == "masks" else "worst relative error" in found.why


def test_every_pair_is_looked_at():
    assert pairs_of(Config()) == [
        ("masked_embed", "triton"),
        ("masked_embed", "reference"),
        ("loss", "triton"),
        ("loss", "reference"),
        ("masks", "triton"),
        ("attention", "triton"),
        ("attention", "xformers"),
        ("attention", "sdpa"),
        ("attention", "eager"),
    ]
    assert not {"loss", "masks"} & {op for op, _ in pairs_of(Config(objective="pixels", mask="none", predict="all"))}


@interpreted
def test_a_bias_gradient_that_is_wrong_by_one_percent_is_named(monkeypatch: pytest.MonkeyPatch):
    backward = trials._with_gradients

    def planted(*args: Any) -> trials.Results:
        found = backward(*args)
        return found | {"grad_bias": found["grad_bias"] * 1.01} if found["out"].dtype == torch.float32 else found

    monkeypatch.setattr(trials, "_with_gradients", planted)
    found = look(("loss", "triton"))
    assert found.state == "wrong" and "its grad_bias differs from float64's by 1.0e-02" in found.why
    assert found.fix.startswith("kernels.loss=reference")


def test_attention_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operators, "is_there", lambda name: True)
    monkeypatch.setattr(operators, "check_attention", lambda *_: "no kernel image")
    found = look(("attention", "xformers"))
    assert (found.state, found.why, found.fix) == ("wrong", "no kernel image", "take kernels.attention=auto")
    monkeypatch.setattr(operators, "is_there", lambda name: False)
    assert look(("attention", "xformers")).state == "absent"


def test_shapes_that_a_kernel_does_not_take_are_told():
    found = look(("attention", "triton"), data=dict(image_size=384))
    assert (found.state, found.why) == ("unused", "it takes at most 256 tokens; got 577")


def test_without_triton_it_is_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operators, "HAS_TRITON", False)
    found = look(("masks", "triton"))
    assert (found.state, found.fix) == ("absent", "pip install 'triton>=3.6' (Linux)")


def test_the_small_configuration_is_a_valid_one_of_the_same_head_width():
    for config in (Config(), Config.model_validate(dict(model=dict(width=16, num_heads=1)))):
        small = smaller(config)
        assert Config.model_validate(small.model_dump()) == small and small.num_patches == 9
        width = config.model.width // config.model.num_heads
        assert small.model.width // small.model.num_heads == width
