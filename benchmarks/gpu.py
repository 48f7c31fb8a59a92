"""All that only a card can answer, in nine minutes: kernel tests, tuning, steps of BEiT-B and L, questions of a first
hour, promises of training, decoding on the card, and the tokenizer in half precision.

    python -m benchmarks.gpu [--out DIR] [PART ...]     or `make gpu`; without a card it says what it would do

Builds no environment and downloads nothing: a part whose modules are missing names them and is passed over. Each part
is a process with a budget in seconds, to which the time that earlier parts left over is added: a part that hangs, or
that loses the card, costs itself alone. OUT (default: runs/gpu) holds what each printed (PART.txt), its rows
(PART.json), and after each part results.json and table.md with all there is so far.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.predictions import TOO_FAR, compared
from benchmarks.results import figures, markdown, write_json

ROOT = Path(__file__).parent.parent
GRACE_S = 10  # from the signal that asks a part to end to the one that ends it
POLL_S = 0.1
# how a module is got, where its package has another name
PACKAGES = {"yaml": "PyYAML", "PIL": "Pillow"}

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A command of its own; `{json}` in it stands for the file that its rows go to."""

    name: str
    asks: str
    seconds: float
    needs: tuple[str, ...]  # modules
    command: tuple[str, ...]  # of this Python

    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]


CORE = "torch", "triton"
MODEL = *CORE, "numpy", "pydantic", "yaml"  # what steps of the model want
FILES = "safetensors", "simplejpeg", "PIL", "tqdm"  # and what a job wants


def _question(name: str, asks: str, seconds: float) -> Part:
    return _benchmark("first_hour", name, asks, seconds, CORE, name, "--rounds", "10")


def _benchmark(module: str, name: str, asks: str, seconds: float, needs: tuple[str, ...], *arguments: str) -> Part:
    command = "-m", f"benchmarks.{module}", *arguments, "--json", "{json}"
    return Part(name, asks, seconds, needs, command)


# Left out are tests that prove things without a card, and whose time is better spent here: what compiles for four
# architectures, what is moved in the interpreter, and how the questions below are asked there. Warnings of another
# PyTorch are printed, and are no failures.
KERNEL_TESTS = "-m", "pytest", "tests/kernels", "-m", "not long", "-W", "default", "-p", "no:cacheprovider"
# compiling is most of their time, and is the host's. Tests of large tensors are a group, and have the memory in turn
IN_PARALLEL = ("-n", "8", "--dist", "loadgroup") if find_spec("xdist") else ()
NOT_ON_A_CARD = "test_compile.py", "test_traffic.py", "test_first_hour.py"

# their seconds and one grace are nine minutes: who is late takes from the next. Each writes its rows as they come
PARTS = (
    Part(
        "kernels",
        "are the Triton kernels right on this card, also above 2^31 values?",
        100,
        (*CORE, "numpy", "pytest"),
        (*KERNEL_TESTS, *IN_PARALLEL, *(f"--ignore=tests/kernels/{name}" for name in NOT_ON_A_CARD)),
    ),
    _benchmark(
        "step",
        "step",
        "what does a step of BEiT-B and of BEiT-L take, with whose attention, compiled or not?",
        105,
        MODEL,
        *("--steps", "25"),
    ),
    _benchmark("tune", "tune", "which attention, workspace and rows a chunk would `doctor --tune` take?", 60, MODEL),
    _benchmark(
        "training",
        "training",
        "do our kernels train as plain PyTorch does, with the same bits twice and resumed, and without waiting?",
        60,
        (*MODEL, *FILES),
    ),
    _question("sdpa", "which attention backend takes the bias, and at what price?", 15),
    _question("attention", "which tiles for attention, and how much workspace?", 35),
    _question("linear_cross_entropy", "how many rows a chunk of the loss?", 30),
    _question("cross_entropy", "which warps and registers?", 20),
    _question("masked_embed", "which tiles, and is a convolution as good?", 20),
    _question("host", "does the host keep up with the loss?", 10),
    _benchmark(
        "kernels", "ops", "how fast is each op, beside eager, compiled and others' code?", 40, CORE, "--rounds", "20"
    ),
    _benchmark(
        "decoding", "decoding", "does DALI on the card show what Pillow shows, and how fast?", 20, (*MODEL, *FILES)
    ),
    _benchmark("encoder", "encoder", "how fast, and how exact, is the tokenizer in fp16 and bf16?", 15, MODEL),
)


def run(part: Part, out: Path, seconds: float, grace: float = GRACE_S) -> Result:
    """Run a part for at most `seconds`: then it is asked to end (SIGINT), and after `grace` its whole group is ended.

    What it prints comes to this terminal too, by way of a file: a process that outlives its part holds up nobody.
    """
    log, rows = out / f"{part.name}.txt", out / f"{part.name}.json"
    rows.unlink(missing_ok=True)
    command = [sys.executable, *(word.replace("{json}", str(rows)) for word in part.command)]
    began = time.monotonic()
    # the background job of a shell ignores SIGINT, and its parts would too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as file, log.open(errors="replace") as copy:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(), start_new_session=True
        )
        try:
            in_time = _wait(process, copy, seconds)
            if not in_time:
                os.killpg(process.pid, signal.SIGINT)
                _wait(process, copy, grace)
        finally:
            # also where this process is interrupted: nothing of a part is left behind
            _end(process)
            print(copy.read(), end="", flush=True)
    status = "passed" if process.returncode == 0 else "failed"
    return dict(
        status=status if in_time else "out of time",
        seconds=round(time.monotonic() - began, 1),
        exit_code=process.returncode,
        last_line=next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), ""),
        found=json.loads(rows.read_text()) if rows.exists() else {},
    )


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _wait(process: subprocess.Popen, copy: Any, seconds: float) -> bool:
    """Whether the process ended by itself within `seconds`; what it prints meanwhile is shown."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        print(copy.read(), end="", flush=True)
        time.sleep(POLL_S)
    return process.poll() is not None


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # the whole group is gone
        pass
    process.wait()


def run_all(parts: Iterable[Part], out: Path, where: dict[str, Any]) -> dict[str, Result]:
    """Run one part after the other, and write down what there is after each."""
    results: dict[str, Result] = {}
    left_over = 0.0
    for part in parts:
        if missing := part.missing():
            results[part.name] = dict(status="passed over", last_line=how_to_get(missing))
            left_over += part.seconds
        else:
            print(f"\n== {part.name}: {part.asks} At most {part.seconds + left_over:.0f} s.\n", flush=True)
            results[part.name] = run(part, out, part.seconds + left_over)
            left_over += part.seconds - results[part.name]["seconds"]
        print(f"\n== {part.name}: {results[part.name]['status']}. {results[part.name]['last_line']}", flush=True)
        write_json(out / "results.json", dict(where=where, parts=results))
        (out / "table.md").write_text(table(where, results) + "\n")
    return results


def how_to_get(modules: Iterable[str]) -> str:
    packages = " ".join(PACKAGES.get(module, module) for module in modules)
    return f"missing: {packages}; pip install {packages}, or bring wheels: pip install --no-index --find-links DIR ..."


def card() -> dict[str, Any]:
    """What `benchmarks.card` says; asked in a process of its own, so that this one never holds the card."""
    command = [sys.executable, "-m", "benchmarks.card"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else dict(gpu=None)


def table(where: dict[str, Any], results: dict[str, Result]) -> str:
    """First what the numbers belong to, then each part's end and its rows, beside what was predicted of them."""
    lines = [("card", name, value, "") for name, value in _facts(_while_at_work(where, results))]
    for name, result in results.items():
        seconds = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
        lines.append((name, result["status"] + seconds, result["last_line"], ""))
        rows = result.get("found", {}).get("rows", [])
        lines += [(name, row["case"], figures(row), compared(where.get("gpu"), row)) for row in rows]
        anchors = result.get("found", {}).get("anchors", [])
        lines += [(name, f"others: {anchor['who']}, {anchor['what']}", figures(anchor), "") for anchor in anchors]
    note = f"*: measured and predicted are {TOO_FAR} times apart or more (benchmarks/predictions.py)"
    return f"{markdown(('part', 'what', 'found', 'predicted, measured over it'), lines)}\n\n{note}"


def _while_at_work(where: dict[str, Any], results: dict[str, Result]) -> dict[str, Any]:
    """The environment that a part found: the clocks of an idle card say little."""
    return next((r["found"] for r in results.values() if r.get("found", {}).get("clocks")), where)


def _facts(where: dict[str, Any]) -> Iterable[tuple[str, str]]:
    clocks = where.get("clocks") or {}
    yield "name", str(where.get("gpu"))
    for name, value in clocks.items():
        yield name, "not told" if value is None else f"{value:g}"
    yield "driver", str(where.get("driver"))
    yield "CUDA, cuDNN, NCCL", f"{where.get('cuda')}, {where.get('cudnn')}, {where.get('nccl')}"
    yield "cores", str(where.get("cores"))
    yield "versions", ", ".join(f"{name} {value}" for name, value in where.get("versions", {}).items() if value)
    yield "commit", str(where.get("commit"))


def plan(parts: Iterable[Part]) -> str:
    lines = [
        (part.name, f"{part.seconds:.0f}", part.asks, " ".join(PACKAGES.get(m, m) for m in part.missing()) or "-")
        for part in parts
    ]
    return markdown(("part", "seconds at most", "asks", "missing here"), lines)


def main(argv: list[str] | None = None) -> int:
    known = {part.name: part for part in PARTS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="for what is found (default: runs/gpu)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in known]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    parts = [known[name] for name in args.parts or known]
    where = card()
    if where["gpu"] is None:
        print(f"No CUDA device here, so nothing is run. On a card, one after the other:\n\n{plan(parts)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_all(parts, args.out.resolve(), where)
    print(f"\n{table(where, results)}\n\n{args.out}: what each part printed and found")
    return int(any(result["status"] not in ("passed", "passed over") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
