"""The parts of `make gpu` that have a module of their own, in small: what each says, row by row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decoding, encoder, training, tune
from benchmarks.gpu import PARTS, table
from benchmarks.photos import make_index
from benchmarks.results import Row, keep
from benchmarks.step.variants import TOY
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.data.index.reader import open_index
from fastbeit.errors import RunError
from fastbeit.health import tuning
from fastbeit.health.finding import Finding
from fastbeit.train.loop import Meter

CPU = torch.device("cpu")


def in_a_table(name: str, rows: list[Row]) -> str:
    """As `make gpu` shows them."""
    return table(dict(gpu=None), {name: dict(status="passed", seconds=1, last_line="", found=dict(rows=rows))})


def test_rows_are_written_as_they_come(tmp_path: Path):
    file = tmp_path / "rows.json"

    def rows():
        yield dict(case="a", ms=1.0)
        assert json.loads(file.read_text()) == dict(gpu=None, rows=[dict(case="a", ms=1.0)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(rows(), dict(gpu=None), file)
    assert len(json.loads(file.read_text())["rows"]) == 1


# ---- tune


def test_tuning_has_a_row_a_choice(monkeypatch: pytest.MonkeyPatch):
    """Plain PyTorch alone; interpreted kernels are timed in tests/health/test_tuning.py."""

    def operator(pair: tuple[str, str], *_: Any) -> Finding:
        name = " ".join(pair)
        return Finding(name, "runs") if name == "attention sdpa" else Finding(name, "absent", why="not here")

    monkeypatch.setattr(tune, "operator", operator)
    monkeypatch.setitem(tuning.ROUNDS, "cpu", 1)
    rows = list(tune.rows(configure(Config, ["optim.batch_size=2", *TOY]), CPU))
    assert [row["case"] for row in rows] == [
        "attention triton",
        "attention xformers",
        "loss triton",
        "kernels.attention=sdpa",
        "kernels.loss_rows=default",
        "kernels.loss_rows=8",
        "attention: what a run would take",
        "attention_mib: what a run would take",
        "loss_rows: what a run would take",
    ]
    assert all("left_out" in row for row in rows[:3]) and all(row["ms"] > 0 for row in rows[3:6])
    assert rows[6]["choice"] == "sdpa" and rows[7]["choice"] == "default"
    shown = in_a_table("tune", rows)
    assert "left out: not here" in shown and " ms " in shown


# ---- encoder


def test_the_encoder_in_half_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "VIEW", 32)
    rows = list(encoder.rows(encoder.NARROW, CPU, batch=2, rounds=1))
    assert [row["case"] for row in rows] == [f"{kind}, batch of 2" for kind in ("fp32", "fp16", "bf16")]
    assert all(row["images_per_s"] > 0 for row in rows) and "same_tokens" not in rows[0]
    # 32 tokens, some of which are as likely as another word
    assert all(0.5 < row["same_tokens"] <= 1 and row["speedup"] > 0 for row in rows[1:])
    assert "% of tokens the same" in in_a_table("encoder", rows)


# ---- decoding


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_index("photos", tmp_path_factory.mktemp("photos") / "new", 0)


def test_pipelines_are_held_against_pillow(photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "WARM_UP", 1)
    rows = list(decoding.rows(open_index(photos), CPU, 3, 1))
    names = [row["case"].split(",")[0] for row in rows]
    assert names == ["pillow", "torch", "dali"] and "patch_view_db" not in rows[0]
    for row in rows:
        assert row["images_per_s"] > 0 if "left_out" not in row else row["case"].startswith("dali")
    # as tests/data/test_views.py has it of each view
    assert rows[1]["patch_view_db"] > 38 and rows[1]["token_view_db"] > 38 and rows[1]["same_tokens"] > 0.5
    assert "token view" in in_a_table("decoding", rows)


def test_a_pipeline_that_fails_or_is_not_there_is_a_row(photos: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(index: Any, pipeline: str, *_: Any) -> Any:
        raise RuntimeError(f"{pipeline} has no decoder")

    monkeypatch.setattr(decoding, "loader", refuse)
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    rows = list(decoding.rows(open_index(photos), CPU, 2, 1))
    assert [row.get("error", row.get("left_out")) for row in rows] == [
        "RuntimeError: pillow has no decoder",
        "RuntimeError: torch has no decoder",
        "nvidia.dali is not installed",
    ]


def test_equal_views_are_78_decibels():
    x = torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8)
    assert decoding.psnr(x, x) == pytest.approx(78.13, abs=0.01)
    off = torch.full_like(x, 100)
    assert decoding.psnr(off, off + 10) == pytest.approx(28.13, abs=0.01)


# ---- training


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Its rows, of plain PyTorch against itself: tests/jobs/test_pretrain.py has the interpreter train."""

    def trained(switch: training.Switch = lambda is_error: None, steps: int = 4) -> list[Row]:
        return list(training.rows(training.Runs(tmp_path, steps, CPU), switch))

    monkeypatch.setattr(training, "OURS", "reference")
    return trained


def test_trainings_are_compared(trained: Callable[..., list[Row]], tmp_path: Path):
    rows = trained()
    assert [row["case"].split(":")[0] for row in rows] == [
        "synthetic images",
        "two runs",
        "stopped half-way and resumed",
        "between two lines of the log",
        "photos",
    ]
    assert not any("wrong" in row for row in rows)
    assert rows[0]["first"] == rows[0]["last"] == 0 and rows[0]["loss"] > 0
    assert [row["found"] for row in rows[1:3]] == ["equal to the bit"] * 2
    resumed = (tmp_path / "resumed/log.jsonl").read_text()
    assert resumed.count('"step": 4') >= 1 and (tmp_path / "again/checkpoints/step-000002").exists()
    assert "equal to the bit" in in_a_table("training", rows)


def test_without_photos_there_is_the_rest(trained: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch):
    def no_photos(kind: str, folder: Path, number: int) -> Path:
        if kind == "photos":
            raise RunError("no photos here")
        return make_index(kind, folder, number)

    monkeypatch.setattr(training, "make_index", no_photos)
    monkeypatch.setattr(training.Runs, "same_bits", lambda *_: False)
    rows = trained(steps=2)
    assert rows[-1] == dict(case="photos", left_out="no photos here")
    assert [row["wrong"] for row in rows[1:3]] == ["they differ"] * 2


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_is_watched_between_two_lines_of_the_log(waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the first line on; reading what is logged, and saving, may wait."""
    watched, seen = [False], []
    add = Meter.add

    def step(*args: Any) -> None:
        seen.append(watched[-1])
        if waits and watched[-1]:
            raise RuntimeError("called a synchronizing CUDA operation")
        add(*args)

    monkeypatch.setattr(training, "OURS", "reference")
    monkeypatch.setattr(Meter, "add", step)
    runs = training.Runs(tmp_path, 4, CPU)
    index = make_index("synthetic", tmp_path / "synthetic", 16)
    row = training.silent(runs, index, watched.append)
    assert seen == ([False, True] if waits else [False, True, True, True])
    assert row.get("wrong") == ("called a synchronizing CUDA operation" if waits else None)
    # off while it reads and saves, on after, and off at the end
    assert watched[-1] is False and watched.count(True) >= 1
    assert all(one != other for one, other in zip(watched[1:-1], watched[2:-1], strict=False))


@pytest.mark.parametrize(
    "triton, reference, is_wrong",
    [
        ([7.0] * 10, [7.0] * 10, False),
        ([7.01] * 10, [7.0] * 10, False),
        ([7.02, *[7.0] * 9], [7.0] * 10, True),
        ([7.0] * 8 + [6.9, 6.9], [7.0] * 10, True),
        ([7.0] * 9 + [float("nan")], [7.0] * 10, True),
    ],
    ids=["equal", "rounded", "wrong at once", "trains otherwise", "NaN"],
)
def test_losses_may_differ_by_rounding(triton: list[float], reference: list[float], is_wrong: bool):
    assert ("wrong" in training.compared("x", triton, reference)) == is_wrong


@pytest.mark.parametrize("module", [tune, encoder, decoding, training])
def test_each_part_says_what_it_is(module: Any, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and str(module.__doc__).splitlines()[0] in " ".join(capsys.readouterr().out.split())
    assert any(f"benchmarks.{module.__name__.split('.')[-1]}" in part.command for part in PARTS)
