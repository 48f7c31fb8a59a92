"""What an A100 and an H100 would need for each kernel, without one: `python -m benchmarks.kernels --predict`.

Compiled code gives registers and accesses; the traffic of the interpreted kernel gives bytes. Then, for a kernel,

    predicted us = max(unique bytes / memory bandwidth, bytes asked of the L2 / L2 bandwidth, FLOPs / matrix rate)
    memory bandwidth = what a copy reaches * min(1, bytes in flight of an SM / (that bandwidth * latency / SMs))

The second line is Little's law. Launch, tail and arithmetic outside matrices are left out: a bound, not a forecast.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels import liger
from benchmarks.kernels.compiled import Case, Compiled, compiled_for
from benchmarks.kernels.launches import cases
from benchmarks.kernels.moved import Moved
from benchmarks.kernels.ops import Shapes
from benchmarks.predictions import A100, H100, Chip


class Occupancy(NamedTuple):
    blocks: int  # an SM
    warps: int
    bytes_in_flight: int  # an SM


def occupancy(chip: Chip, out: Compiled, num_warps: int) -> Occupancy:
    """How many programs an SM holds, and what their loads fetch at a time: at most all that stand in the code."""
    registers = -(-out.registers // 8) * 8 * 32 * num_warps  # handed out 256 a warp
    shared = out.shared + 1024  # the system takes 1 KB a block
    limits = chip.registers // registers, chip.shared // shared, chip.threads // (32 * num_warps), chip.blocks
    blocks = min(limits)
    in_flight = blocks * num_warps * 32 * (16 * out.wide_loads + 4 * out.narrow_loads)
    return Occupancy(blocks, blocks * num_warps, in_flight)


def predicted_us(chip: Chip, moved: Moved, flops: float, in_flight: int) -> tuple[float, str]:
    """The bound, and what sets it."""
    needed = chip.copy * chip.latency / chip.sms
    bounds = {
        "memory": moved.unique / (chip.copy * min(1.0, in_flight / needed)),
        "L2": moved.requested / chip.l2,
        "products": flops / chip.products,
    }
    slowest = max(bounds, key=bounds.__getitem__)
    return 1e6 * bounds[slowest], slowest


def traffic_in_a_run() -> dict[tuple[str, str], Moved]:
    """By kernel and part. From a process of its own: what is interpreted cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "moved.json")
        env = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        command = [sys.executable, "-m", "benchmarks.kernels.moved", "--json", str(file)]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        rows = [Moved(**row) for row in json.loads(file.read_text())]
    return {(row.kernel, row.part): row.in_a_run() for row in rows}


def predicted_cases() -> Iterator[Case]:
    """Of each kernel the first case, which is what a run of BEiT-B launches; and Liger's."""
    seen = set()
    for case in cases():
        if case.name[0] not in seen and "_loop_" not in case.name[0]:
            seen.add(case.name[0])
            yield case
    if liger.INSTALLED:
        yield from liger.cross_entropy_cases()


def predict(chip: Chip, case: Case, moved: Moved | None) -> dict[str, Any]:
    name, variant, _ = case.name
    num_warps = case.options.get("num_warps", 4)
    out = compiled_for(case, chip.target)
    held = occupancy(chip, out, num_warps)
    row = dict(chip=chip.name, kernel=name, variant=variant, registers=out.registers, **held._asdict())
    if moved:
        shapes = Shapes()
        # masked_embed's forward is the one kernel of these that multiplies matrices
        flops = 2 * shapes.B * shapes.N * shapes.K * shapes.D if case.multiplies else 0
        us, bound = predicted_us(chip, moved, flops, held.bytes_in_flight)
        row |= dict(gigabytes=moved.unique / 1e9, over_minimum=moved.ratio, predicted_us=us, bound=bound)
    return row


def linear_cross_entropy(chip: Chip, in_place: Moved) -> dict[str, Any]:
    """Three products, one after the other, and between them the kernel, which finds a chunk of logits in the L2."""
    shapes = Shapes()
    us = 1e6 * (6 * shapes.R * shapes.D * shapes.V / chip.products + in_place.requested / chip.l2)
    return dict(chip=chip.name, kernel="linear_cross_entropy (op)", variant="grad", predicted_us=us, bound="products")


def predictions() -> Iterator[dict[str, Any]]:
    traffic = traffic_in_a_run()
    for chip in (A100, H100):
        for case in predicted_cases():
            yield predict(chip, case, traffic.get((case.name[0], "all")))
        yield linear_cross_entropy(chip, traffic["_cross_entropy_fwd_kernel", "in place"])


COLUMNS = dict(chip="5", kernel="<33", variant="<9", registers=">9", blocks=">6", warps=">5", bytes_in_flight=">15")
COLUMNS |= dict(gigabytes=">9.3f", over_minimum=">12.3f", predicted_us=">12.1f", bound=">8")


def print_predictions() -> list[dict[str, Any]]:
    print(
        "predicted, not measured; blocks, warps and bytes in flight: of an SM; formula: benchmarks/kernels/predict.py"
    )
    for chip in (A100, H100):
        needed = chip.copy * chip.latency / chip.sms
        print(f"{chip.name}: {needed:.0f} bytes in flight reach {chip.copy / 1e12} TB/s; L2 {chip.l2 / 1e12:.1f} TB/s")
    titles = {name: form.split(".")[0] for name, form in COLUMNS.items()}
    print(*(f"{name:{form}}" for name, form in titles.items()))
    found = []
    for row in predictions():
        cells = ((row[name], form) if name in row else ("", titles[name]) for name, form in COLUMNS.items())
        print(*(f"{cell:{form}}" for cell, form in cells), flush=True)
        found.append(row)
    return found
