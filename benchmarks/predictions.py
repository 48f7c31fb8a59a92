"""What an H100 and an A100 should need; `make gpu` puts what they do need beside it.

Kernels: of BEiT-B with 256 images, by `python -m benchmarks.kernels --predict`, which computes them anew (formula:
benchmarks/kernels/predict.py). Steps: fastbeit/engine/forecast.py, with FLOPs of an image as benchmarks/step/rates.py
counts them.
"""

from dataclasses import dataclass
from typing import Any

from fastbeit.engine.cards import CARDS, Card

TOO_FAR = 1.3  # measured over predicted, or the inverse: where one of both wants an explanation


@dataclass(frozen=True)
class Chip:
    """The limits: CUDA C programming guide, technical specifications by compute capability. H100: the SXM model."""

    name: str
    card: Card
    target: str
    sms: int
    latency: float  # s from a load to its value, of memory under load
    l2: float  # bytes/s; assumption: 60 % of 5,120 bytes a clock (NVIDIA's A100 white paper; taken for H100 too)
    shared: int  # bytes an SM
    registers: int = 65536  # an SM
    threads: int = 2048
    blocks: int = 32

    @property
    def copy(self) -> float:
        return self.card.copy

    @property
    def products(self) -> float:
        return self.card.products


A100 = Chip("A100", CARDS["a100-80gb"], "sm_80", 108, 450e-9, 0.6 * 5120 * 1.41e9, 164 * 1024)
H100 = Chip("H100", CARDS["h100"], "sm_90", 132, 500e-9, 0.6 * 5120 * 1.755e9, 228 * 1024)
CHIPS = H100, A100

# microseconds on each chip, by question of benchmarks/first_hour and a word in the cases that they are of
KERNELS_US = {
    ("cross_entropy", "warps"): dict(H100=207.0, A100=354.9),
    ("masked_embed", "tiles"): dict(H100=226.8, A100=282.3),
    ("linear_cross_entropy", "rows a chunk"): dict(H100=1230.6, A100=3228.0),
}


def chip_of(gpu: str | None) -> Chip | None:
    """None: nothing is predicted for this card."""
    return next((chip for chip in CHIPS if gpu and chip.name in gpu), None)


def kernel_us(gpu: str | None, question: str, case: str) -> float | None:
    chip = chip_of(gpu)
    found = (us for (asked, word), us in KERNELS_US.items() if asked == question and word in case)
    return next((us[chip.name] for us in found), None) if chip else None


def compared(gpu: str | None, row: dict[str, Any]) -> str:
    """Predicted, and measured over it, with an asterisk where they are far apart; empty where one is not there."""
    if row.get("predicted_ms") and row.get("step_ms"):
        return _ratio(row["predicted_ms"], row["step_ms"], "ms")
    us = kernel_us(gpu, row.get("question", ""), row["case"])
    return _ratio(us, row["us"], "us") if us and row.get("us") else ""


def _ratio(predicted: float, measured: float, unit: str) -> str:
    ratio = measured / predicted
    far = "*" if not 1 / TOO_FAR <= ratio <= TOO_FAR else ""
    return f"{predicted:,.1f} {unit}, {ratio:.2f}{far}"
