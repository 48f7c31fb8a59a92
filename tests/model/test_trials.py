"""How wrong an implementation of an operator may be: as plain PyTorch is, and no result by one part in a hundred."""

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.model.trials import Results, judge, trials_of, tried
from helpers.tiny import SETTINGS

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
RESULTS = {
    "masked_embed": ["out", "grad_weight", "grad_bias", "grad_cls_token", "grad_mask_token", "grad_positions"],
    "loss": ["out", "grad_hidden", "grad_weight", "grad_bias"],
    "attention": ["out", "grad_qkv", "grad_bias"],
}


def results(op: str, dtype: torch.dtype) -> tuple[Results, Results]:
    """In plain PyTorch, and exact."""
    config = Config.model_validate(SETTINGS | {"model": {**SETTINGS["model"], "absolute_position": True}})
    trial = trials_of(config, 32, CPU, dtype)[op]
    return trial("reference"), trial("exact")


@DTYPES
@pytest.mark.parametrize("op", RESULTS)
def test_one_result_that_is_wrong_by_one_percent_is_found_and_named(op: str, dtype: torch.dtype):
    plain, exact = results(op, dtype)
    assert judge(plain, plain, exact, dtype).wrong is None
    assert list(plain) == list(exact) == RESULTS[op]
    for name in plain:
        verdict = judge(plain | {name: plain[name] * 1.01}, plain, exact, dtype)
        assert verdict.where == name and f"its {name} differs from float64's" in str(verdict.wrong)


@DTYPES
def test_one_row_of_a_gradient_that_is_wrong_is_found(dtype: torch.dtype):
    plain, exact = results("loss", dtype)
    wrong = plain["grad_weight"].clone()
    wrong[3] *= 1.1
    assert "grad_weight" in str(judge(plain | {"grad_weight": wrong}, plain, exact, dtype).wrong)


def test_a_mask_that_differs_in_one_patch_is_found():
    trial = trials_of(Config(), 32, CPU, torch.bfloat16)["masks"]
    plain = trial("reference")
    other = plain["masked_idx"].clone()
    other[5, 70] += 1
    assert judge(plain, plain, plain, torch.bfloat16).wrong is None
    verdict = judge(plain | {"masked_idx": other}, plain, plain, torch.bfloat16)
    assert verdict.where == "masked_idx" and "its masked_idx differs" in str(verdict.wrong)


def test_what_is_no_number_is_found():
    ones = {"out": torch.ones(9)}
    assert "its out differs" in str(judge({"out": torch.full((9,), float("nan"))}, ones, ones, torch.float32).wrong)


def test_what_is_raised_is_told_in_one_line():
    def refuse(how: str) -> Results:
        raise MemoryError("out of resource: shared memory, Required: 172032, Hardware limit: 101376\nmore")

    said = tried(refuse, "triton", torch.float32).wrong
    assert said == "MemoryError: out of resource: shared memory, Required: 172032, Hardware limit: 101376"


def test_what_a_configuration_has_no_use_for_is_not_tried():
    pixels = Config(objective="pixels", mask="none", predict="all")
    assert trials_of(pixels, 32, CPU, torch.float32).keys() == {"masked_embed", "attention"}
