"""The measured tables of the README and of docs/evidence.md, from what benchmarks wrote.

    python -m benchmarks.evidence             fills the tables from benchmarks/results/cpu/*.json
    python -m benchmarks.evidence --run       measures first, on this machine, in half an hour; leave it alone meanwhile

A table stands between `<!-- NAME: made by python -m benchmarks.evidence -->` and `<!-- end -->`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import Row, markdown

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results/cpu")
DOCUMENTS = "README.md", "docs/evidence.md", "docs/data.md", "docs/distributed.md"
# file of results, and the command that writes it with --json
COMMANDS = {
    "data": "python -m benchmarks.data --only photos large tar",
    "fidelity": "python -m benchmarks.data --only fidelity",
    "glue": "python -m benchmarks.data --only glue --batch 256",
    "host": "python -m benchmarks.data --only host --batch 256",
    "shards": "python -m benchmarks.data --only large shards --who 'ours, torch'",
    "tokenizer": "python -m benchmarks.tokenizer",
    "one_core": "python -m benchmarks.tokenizer --only encode --threads 1 --batch 4",
    "masks": "python -m benchmarks.masks",
    "moved": "TRITON_INTERPRET=1 python -m benchmarks.kernels.moved",
    "engines": "python -m benchmarks.engines",
}
DEMO = "make demo"  # writes a file of results of its own
JITTERS = "full_image", "crop"


class Results:
    """The rows of all results, by file and part."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Any] = {
            name: json.loads((folder / f"{name}.json").read_text()) for name in (*COMMANDS, "demo")
        }

    def rows(self, file: str, part: str | None = None, **wanted: Any) -> list[Row]:
        rows = self.found[file] if part is None else self.found[file][part]
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def one(self, file: str, part: str | None = None, **wanted: Any) -> Row:
        rows = self.rows(file, part, **wanted)
        if len(rows) != 1:
            raise ValueError(f"wanted one row of {file}.json with {part}, {wanted}; found {len(rows)}")
        return rows[0]


def demo(results: Results) -> list[list[str]]:
    found = results.found["demo"]

    def gain(kind: str) -> str:
        loss, baseline = found[f"{kind}loss"], found[f"{kind}baseline"]
        return f"{baseline - loss:.3f} nats (from {baseline:.3f} to {loss:.3f})"

    in_use = f"{found['words_in_use']:,} of {found['vocab_size']:,}"
    return [
        ["demo, gain over the baseline on held-out photos", gain(""), DEMO],
        ["demo, the same on unseen crops of the training photos", gain("train_crops_"), DEMO],
        ["demo, words in use on held-out photos; masked accuracy", f"{in_use}; {found['accuracy']:.3f}", DEMO],
        ["demo, all of it", f"{found['seconds']} s", DEMO],
    ]


def times(results: Results, part: str) -> str:
    """Images a second and core over the authors' transform, for either kind of jitter."""
    two_views = dict(who="ours, torch", work="two views")
    return " / ".join(f"{results.one('data', part, jitter=jitter, **two_views)['times']:.1f}" for jitter in JITTERS)


def data(results: Results) -> list[list[str]]:
    def glue(jitter: str) -> float:
        return results.one("glue", "glue", who="glue, sum", jitter=jitter)["share"]

    def peak(who: str) -> float:
        return max(row["peak_mib"] for row in results.rows("data", "photos", who=who))

    def rate(part: str, jitter: str) -> float:
        row = results.one("shards", part, who="ours, torch", work="two views", jitter=jitter)
        return row["img_per_s_core"]

    def host(who: str) -> float:
        return results.one("host", "host", who=who)["img_per_s"]

    return [
        ["photos of 500 x 375", f"{times(results, 'photos')} times", COMMANDS["data"]],
        ["photos of 3 megapixels", f"{times(results, 'large')} times", COMMANDS["data"]],
        ["photos of 500 x 375 out of a tar", f"{times(results, 'tar')} times", COMMANDS["data"]],
        [
            "what is not pixels (order, boxes, masks, look-ups): share of a core at that rate",
            " / ".join(f"{glue(jitter):.1%}" for jitter in JITTERS),
            COMMANDS["glue"],
        ],
        [
            "all but pixels, in one process, decoding stubbed, images a second: torch / DALI, images checked",
            " / ".join(f"{host(who):,.0f}" for who in ("torch", "dali")),
            COMMANDS["host"],
        ],
        [
            "photos of 3 megapixels in shards of `fastbeit shard`, over the photos themselves, torch",
            " / ".join(f"{rate('shards', jitter) / rate('large', jitter):.1f}" for jitter in JITTERS) + " times",
            COMMANDS["shards"],
        ],
        [
            "peak memory of the loading process: fastbeit / the authors' transform / DALI on the CPU",
            " / ".join(f"{peak(who):,.0f}" for who in ("ours, torch", "official", "ours, dali")) + " MiB",
            COMMANDS["data"],
        ],
    ]


def fidelity(results: Results) -> list[list[str]]:
    """Pipelines against Pillow, jitter of the full image."""

    def figure(photos: str, pipeline: str) -> str:
        row = results.one("fidelity", "fidelity", who=f"{photos}, {pipeline}", jitter="full_image")
        return f"{row['patch_view_db']:.1f} / {row['token_view_db']:.1f} dB; {row['same_tokens']:.1%}"

    sizes = {"photos": "500 x 375", "large": "3 megapixels"}
    return [
        [f"`{pipeline}`, photos of {size}", figure(photos, pipeline), COMMANDS["fidelity"]]
        for photos, size in sizes.items()
        for pipeline in ("torch", "dali")
    ]


def tokenizer(results: Results) -> list[list[str]]:
    slots = "ours, fp32, masked slots"

    def encode(file: str, who: str = "ours, fp32") -> float:
        return results.one(file, "encode", who=who)["times"]

    def memory(together: str) -> float:
        return results.one("tokenizer", "memory", who=f"ours, fp32, {together} at a time")["of_dall_e"]

    def agreement(kind: str) -> float:
        (same,) = (
            row["same_tokens"]
            for row in results.rows("tokenizer", "agreement")
            if row["who"].startswith(f"bundled, {kind}")
        )
        return same

    cached = results.one("tokenizer", "step", who="cached")
    command = COMMANDS["tokenizer"]
    return [
        [
            "dVAE of OpenAI's size, fp32, images a second over the `dall-e` package: one core",
            f"{encode('one_core'):.2f} times",
            COMMANDS["one_core"],
        ],
        ["the same: two cores", f"{encode('tokenizer'):.2f} times", f"{command} --only encode"],
        [
            "the same: two cores, tokens of masked slots alone",
            f"{encode('tokenizer', slots):.2f} times",
            f"{command} --only encode",
        ],
        [
            "its memory for 128 images over the package's, counted: 64 at a time, as on a GPU / one, as on a CPU",
            f"{memory('64'):.3f} / {memory('1'):.3f}",
            f"{command} --only memory",
        ],
        [
            "tokens of the bundled tokenizer that equal those of fp32: fp16 / bf16",
            f"{agreement('fp16'):.1%} / {agreement('bf16'):.1%}",
            f"{command} --only agreement",
        ],
        [
            "a step of BEiT-B with 2 images, stored tokens over tokens made on the fly; bytes of a crop's tokens",
            f"{cached['times']:.2f} times; {cached['bytes_per_image']}",
            f"{command} --only step",
        ],
    ]


def kernels(results: Results) -> list[list[str]]:
    def masks(name: str) -> str:
        return f"{results.one('masks', name=name)['masks_per_s']:,.0f}"

    whole = [row["unique"] / row["minimum"] for row in results.rows("moved") if row["part"] != "pixels"]
    return [
        [
            "bytes that the loss and the embedding move, over the least possible",
            f"{min(whole):.3f} to {max(whole):.3f}",
            COMMANDS["moved"],
        ],
        [
            "blockwise masks a second on one core, batches of 256 / 2048",
            " / ".join(masks(f"blockwise, batch of {batch}") for batch in (256, 2048)),
            COMMANDS["masks"],
        ],
        [
            "the authors' algorithm, one mask at a time",
            masks("blockwise, one by one (authors' algorithm)"),
            COMMANDS["masks"],
        ],
    ]


def engines(results: Results) -> list[list[str]]:
    """A row an engine, of `WIDE`."""

    def cells(row: Row) -> list[str]:
        twice = results.one("engines", "rows", engine=row["engine"], micro_batches=2)
        times = f"{row['cpu_times']:.2f} ({row['cpu_low']:.2f} to {row['cpu_high']:.2f})"
        own, clock = f"{row['own_cpu_ms']:.0f}", f"{row['step_ms']:.0f}"
        memory = (f"{row[key]:,.0f}" for key in ("peak_mib", "imports_mib"))
        cpu = f"{row['cpu_ms']:.0f}"
        return [_engine_name(row["engine"]), cpu, times, f"{twice['cpu_times']:.2f}", own, clock, *memory]

    return [cells(row) for row in results.rows("engines", "rows", micro_batches=1)]


def _engine_name(engine: str) -> str:
    return f"ZeRO-{engine[-1]}" if engine.startswith("zero") else f"`{engine}`"


def zero(results: Results) -> list[list[str]]:
    rows = [results.one("engines", "rows", engine=f"zero{stage}", micro_batches=1) for stage in range(4)]
    figure = " / ".join(f"{row['cpu_times']:.2f}" for row in rows) + " times"
    return [
        ["CPU time of a step on one of two ranks over that of `ddp`: ZeRO-0 / 1 / 2 / 3", figure, COMMANDS["engines"]]
    ]


def summary(results: Results) -> list[list[str]]:
    """The README's."""
    names = {
        "demo, gain over the baseline on held-out photos": demo(results)[0],
        "images augmented a second, over the authors' transform; two kinds of jitter": data(results)[0],
        "a step of BEiT-B, stored tokens over tokens made on the fly; bytes": tokenizer(results)[-1],
        "blockwise masks a second on one core, batches of 256 / 2048": kernels(results)[1],
    }
    return [[name, *row[1:]] for name, row in names.items()]


TABLES = {
    "demo": demo,
    "data": data,
    "fidelity": fidelity,
    "tokenizer": tokenizer,
    "kernels": kernels,
    "engines": engines,
    "zero": zero,
    "summary": summary,
}
# headers of tables whose rows are not (what, figure, command)
WIDE = {
    "engines": (
        *("engine", "CPU ms a step", "times `ddp` (quartiles)", "times, two micro-batches", "engine's own CPU ms"),
        *("ms by the clock", "peak, MiB", "of it imports, MiB"),
    )
}


def filled(document: str, results: Results) -> str:
    """The document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        rows = TABLES[name](results)
        if name in WIDE:
            made = markdown(WIDE[name], rows)
        else:
            made = markdown(["what", "figure", "command"], ([what, figure, f"`{run}`"] for what, figure, run in rows))
        return f"{match['begin']}\n{made}\n{match['end']}"

    begin, end = r"(?P<begin><!-- (?P<name>\w+): made by python -m benchmarks.evidence -->)", r"(?P<end><!-- end -->)"
    return re.sub(rf"{begin}.*?{end}", table, document, flags=re.DOTALL)


def measure() -> None:
    for name, command in COMMANDS.items():
        *settings, program = re.split(r" (?=python )", command)
        environment = os.environ | dict(setting.split("=") for setting in settings)
        words = [sys.executable, *shlex.split(program)[1:], "--json", str(RESULTS / f"{name}.json")]
        print(f"$ {command}", flush=True)
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "fastbeit", "demo", "--out", folder], cwd=ROOT, check=True)
        shutil.copyfile(Path(folder) / "result.json", ROOT / RESULTS / "demo.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure first")
    if parser.parse_args().run:
        (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
        measure()
    results = Results(ROOT / RESULTS)
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(), results))


if __name__ == "__main__":
    main()
