"""What is predicted of a card, against what one has shown, and how both are put side by side."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import table
from benchmarks.predictions import A100, H100, chip_of, compared
from benchmarks.step.rates import ANCHORS, work_of
from benchmarks.step.variants import config_of

CARD = "NVIDIA H100 80GB HBM3"


def measured_ms(file: str, case: str) -> float:
    rows = json.loads((Path(__file__).parents[2] / "benchmarks/results/h100" / file).read_text())["rows"]
    return next(row["step_ms"] for row in reversed(rows) if row["case"].startswith(case))


# a bound lies below what an H100 took, and not by much
@pytest.mark.parametrize(
    "size, batch, predicted, file, case",
    [
        ("B", 256, 66.0, "step.json", "B, triton kernels, torch.compile"),
        ("L", 128, 107.6, "step_modes.json", "BEiT-L, 128 images, blocks compiled, attention by relative_attention"),
    ],
)
def test_a_step_takes_little_more_than_predicted(size: str, batch: int, predicted: float, file: str, case: str):
    work, measured = work_of(config_of(size, [])), measured_ms(file, case)
    assert work.step_ms(H100, batch) == pytest.approx(predicted, abs=0.05)
    assert 1 < measured / work.step_ms(H100, batch) < 1.3
    # fewer FLOPs and bytes a second, in about the same relation
    assert 2.2 < work.step_ms(A100, batch) / work.step_ms(H100, batch) < 2.8


@pytest.mark.parametrize(
    "row, found",
    [
        (dict(case="B", predicted_ms=66.0, step_ms=75.8), "66.0 ms, 1.15"),
        (dict(case="B", predicted_ms=66.0, step_ms=94.1), "66.0 ms, 1.43*"),
        (dict(case="B", predicted_ms=66.0, step_ms=33.0), "66.0 ms, 0.50*"),
        (dict(case="B", predicted_ms=66.0, error="no memory"), ""),
        (dict(question="cross_entropy", case="8 warps, 80 registers, silent", us=248.4), "207.0 us, 1.20"),
        (dict(question="masked_embed", case="tiles (64, 128, 64, 4, 4)", us=680.4), "226.8 us, 3.00*"),
        (dict(question="masked_embed", case="convolution, eager", us=680.4), ""),
        (dict(question="linear_cross_entropy", case="512 rows a chunk, bias", us=1230.6), "1,230.6 us, 1.00"),
        (dict(question="host", case="512 rows a chunk, forward", us=1230.6), ""),
    ],
)
def test_far_apart_is_marked(row: dict, found: str):
    assert compared(CARD, row) == found
    # nothing is predicted of another card's kernels
    assert compared("NVIDIA GeForce RTX 4090", row | dict(predicted_ms=None)) == ""


def test_a_card_is_known_by_its_name():
    assert (chip_of(CARD), chip_of("NVIDIA A100-SXM4-40GB"), chip_of("NVIDIA L4"), chip_of(None)) == (
        H100,
        A100,
        None,
        None,
    )


def test_the_table_puts_them_side_by_side():
    row = dict(case="B, triton kernels", predicted_ms=66.0, step_ms=94.1)
    part = dict(status="passed", seconds=1.0, last_line="", found=dict(rows=[row], anchors=ANCHORS))
    lines = table(dict(gpu=CARD), dict(step=part)).splitlines()
    assert lines[0].rstrip(" |").endswith("predicted, measured over it")
    (line,) = (line for line in lines if "triton kernels" in line)
    assert "94.10 ms a step" in line and "66.0 ms, 1.43*" in line and "1.3 times apart" in lines[-1]
    assert [line for line in lines if "others: nvSubquadratic" in line and "2,119 img/s" in line]
    assert [line for line in lines if "others: stable-pretraining" in line and "MFU 36.0%" in line]
