"""What probes cost the steps of a pre-training: `python -m benchmarks.probe [--rounds N] [--json FILE]`.

Two small runs on the demo's photos, on the CPU, alike but for a probe after every epoch, turn by turn. Steps are as the
log has them: the median of all, and of those right after a probe; what the probes themselves took stands beside. It
ends with 1 where probes make the median step more than 3 % slower. It wants a machine that does nothing else.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.photos import make_index
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.data.index.scan import build_index
from fastbeit.errors import DONE
from fastbeit.jobs.pretrain import pretrain

MOST = 0.03  # of a step
WARM_UP = 3  # steps
SETTINGS = {
    "data": {"image_size": 32, "tail": "wrap", "num_workers": 0},
    "masking": {"num_masked": 6, "min_block": 2},
    "model": {"width": 64, "depth": 4, "num_heads": 2, "mlp_width": 128, "patch_size": 8},
    "optim": {"batch_size": 16, "steps": 40, "warmup_steps": 4},
    "engine": {"name": "single", "device": "cpu"},
    "log": {"every": 1, "save_every": 0},
}


def label(folder: Path) -> list[str]:
    """Settings of probes: pieces of the same photo are a class, most of which vote for the others."""
    keys = []
    for key, numbers in (("index", "012"), ("val_index", "34")):
        images = sorted(path for path in (folder / "images").iterdir() if path.stem[-1] in numbers)
        (folder / f"{key}.txt").write_text("".join(f"{path}\t{path.stem[:-2]}\n" for path in images))
        build_index(folder / f"{key}.txt", folder / f"{key}.idx", progress=False)
        keys.append(f"probe.{key}={folder / f'{key}.idx'}")
    return [*keys, "probe.every_epochs=1"]


def run(index: Path, out: Path, keys: list[str]) -> list[dict[str, Any]]:
    """The log of a pre-training."""
    config = configure(Config, [f"data.index={index}", f"out={out}", *keys], json.loads(json.dumps(SETTINGS)))
    if pretrain(config, ["fastbeit", "pretrain"]) != DONE:
        raise SystemExit("stopped: nothing was measured")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_of(log: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["step_ms"] for line in log if "event" not in line and line["step"] > WARM_UP}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the row to this file too")
    args = parser.parse_args()
    without: list[float] = []
    with_probes: list[float] = []
    right_after: list[float] = []
    probe_ms: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        index = make_index("photos", Path(name) / "photos", 0)
        keys = label(index.parent)
        for turn in range(args.rounds):
            without += steps_of(run(index, Path(name) / f"without-{turn}", [])).values()
            log = run(index, Path(name) / f"with-{turn}", keys)
            probes = {line["step"]: 1e3 * line["seconds"] for line in log if line.get("event") == "probe"}
            steps = steps_of(log)
            with_probes += steps.values()
            right_after += [ms for step, ms in steps.items() if step - 1 in probes]
            probe_ms += probes.values()
    row = {
        "step_ms": statistics.median(without),
        "step_ms_with_probes": statistics.median(with_probes),
        "step_ms_right_after_a_probe": statistics.median(right_after),
        "probe_ms": statistics.median(probe_ms),
        "probes": len(probe_ms),
    }
    cost = row["step_ms_with_probes"] / row["step_ms"] - 1
    for what, value in row.items():
        print(f"{what:28} {value:10,.1f}")
    print(f"{'more of a step':28} {cost:10.1%}")
    if args.json:
        args.json.write_text(json.dumps(row | {"cost": cost}, indent=1))
    return int(cost > MOST)


if __name__ == "__main__":
    sys.exit(main())
