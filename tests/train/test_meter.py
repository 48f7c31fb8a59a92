"""What is measured between two log lines."""

import pytest
import torch

from fastbeit.engine.cards import CARDS
from fastbeit.engine.ranks import World
from fastbeit.train.meter import Meter

CPU = torch.device("cpu")


def test_the_least_and_the_most_of_several_ranks(monkeypatch: pytest.MonkeyPatch):
    """With the ranks that they are of; one rank has no spread."""
    monkeypatch.setattr(World, "gather", lambda self, items: [(80.0, 0.1), *items, (81.0, 0.0)])
    found = Meter(World(1, 3, CPU), 8)._spread(79.0, 0.3)
    assert found == {
        "step_ms_least": 79.0, "step_ms_least_rank": 1, "step_ms_most": 81.0, "step_ms_most_rank": 2,
        "data_wait_share_least": 0.0, "data_wait_share_least_rank": 2,
        "data_wait_share_most": 0.3, "data_wait_share_most_rank": 1,
    }  # fmt: skip
    assert Meter(World(0, 1, CPU), 8)._spread(79.0, 0.3) == {}


def test_steps_that_predict_nothing_are_counted():
    """Since the last reading, and in a row; whatever the readings between."""
    meter = Meter(World(0, 1, CPU), 8)

    def read(*counts: int) -> tuple[int, int]:
        for count in counts:
            meter.add((torch.tensor(0.0),))
            meter.end_step(torch.tensor(count), torch.tensor(1.0))
        meter.read()
        return meter.num_empty, meter.empty_in_a_row

    assert [read(0, 5, 0), read(0), read(0, 7), read(1)] == [(2, 1), (1, 2), (1, 0), (0, 0)]


def test_rates_are_of_one_gpu():
    """Two ranks, 6,000 images a second in all, 100 GFLOP each: 300 TFLOP/s a GPU."""
    meter = Meter(World(0, 2, CPU), 512, flops_per_image=100 * 10**9)
    assert meter._rates(6000.0, "NVIDIA H100 80GB HBM3") == {"tflop_per_s": 300.0, "mfu": 3e14 / CARDS["h100"].peak}
    assert meter._rates(6000.0, "NVIDIA H100 PCIe") == {"tflop_per_s": 300.0}  # whose peak is not known here
    assert Meter(World(0, 2, CPU), 512)._rates(6000.0, "NVIDIA H100 80GB HBM3") == {}


def test_what_is_looked_at_between_steps_takes_none_of_their_time(monkeypatch: pytest.MonkeyPatch):
    """Also where the look fails, and whatever the readings between."""
    now = [100.0]
    monkeypatch.setattr("fastbeit.train.meter.time.perf_counter", lambda: now[0])
    meter = Meter(World(0, 1, CPU), 8)

    def step() -> None:
        now[0] += 2
        meter.add((torch.tensor(0.0),))
        meter.end_step(torch.tensor(1), torch.tensor(1.0))

    step()
    with meter.paused():
        now[0] += 1000
    step()
    with pytest.raises(ZeroDivisionError), meter.paused():
        now[0] += 1000
        _ = 1 / 0
    meter.waited(1)
    figures = meter.read()[2]
    assert figures["step_ms"] == 2000 and figures["images_per_s"] == 4 and figures["data_wait_share"] == 0.25
    with meter.paused():
        now[0] += 1000
    step()
    assert meter.read()[2]["step_ms"] == 2000
