"""`make gpu` as far as it runs without a card: its plan, its budgets, and its clocks."""

import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import card, gpu
from benchmarks.card import host_laps
from benchmarks.first_hour.__main__ import QUESTIONS
from benchmarks.gpu import GRACE_S, PARTS, ROOT, Part, run, run_all
from benchmarks.results import figures, markdown, write_json
from benchmarks.sdpa import NOT_TOLD, chosen_backend
from helpers.waiting import PATIENCE_S, finished


def fake(name: str, script: str, seconds: float = PATIENCE_S, needs: tuple[str, ...] = ("json",)) -> Part:
    """A part whose rows go to `sys.argv[1]`."""
    return Part(name, "does it?", seconds, needs, ("-c", "import json, os, signal, sys, time\n" + script, "{json}"))


MODELS = "step", "tune", "training", "decoding", "encoder"  # parts that want more than the kernels do
ROWS = "json.dump({'rows': [{'case': 'a case', 'us': 1234.5}]}, open(sys.argv[1], 'w'))\n"


# ---- without a card


def test_without_a_card_it_says_what_it_would_do(tmp_path: Path):
    """`make gpu` with a bare Python: no environment is made, nothing is downloaded, and it ends well."""
    make = shutil.which("make")
    command = [make, "gpu", f"PYTHON={sys.executable}"] if make else [sys.executable, "-m", "benchmarks.gpu"]
    paths = os.pathsep.join(filter(None, sys.path))
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", PYTHONPATH=paths)
    done = finished(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert "No CUDA device here, so nothing is run" in done.stdout
    for part in PARTS:
        assert f"| {part.name} " in done.stdout and f"| {part.seconds:.0f} " in done.stdout and part.asks in done.stdout
    assert "pip" not in done.stdout and "venv" not in done.stdout.replace(sys.executable, "")


def test_the_plan_is_nine_minutes_and_asks_every_question():
    assert sum(part.seconds for part in PARTS) + GRACE_S <= 9 * 60
    assert [part.name for part in PARTS] == ["kernels", *MODELS[:3], *QUESTIONS, "ops", *MODELS[3:]]
    # kernels and questions need torch and triton alone, with what tests them
    for part in PARTS:
        extra = {"numpy", "pytest"} if part.name == "kernels" else set()
        extra |= {"numpy", "pydantic", "yaml"} if part.name in MODELS else set()
        assert set(part.needs) - {"safetensors", "simplejpeg", "PIL", "tqdm"} == {"torch", "triton"} | extra
        assert part.name == "kernels" or part.command[-2:] == ("--json", "{json}")
    assert all((ROOT / "tests/kernels" / name).exists() for name in gpu.NOT_ON_A_CARD)
    assert ("-n" in PARTS[0].command) == (find_spec("xdist") is not None)


def test_large_tensors_are_among_the_kernel_tests():
    """Of several processes one has them all: together they would not fit into a small card."""
    assert "test_large.py" not in gpu.NOT_ON_A_CARD and "tests/kernels" in PARTS[0].command
    assert find_spec("xdist") is None or PARTS[0].command[PARTS[0].command.index("--dist") + 1] == "loadgroup"
    assert 'pytest.mark.xdist_group("large"),' in (ROOT / "tests/kernels/test_large.py").read_text()


def test_the_plan_names_what_is_missing():
    plan = gpu.plan([fake("here", ""), fake("away", "", needs=("json", "yaml_of_nobody"))])
    assert "| here | 600" in plan and plan.splitlines()[2].endswith("| -              |")
    assert plan.splitlines()[3].endswith("| yaml_of_nobody |")


# ---- what a part needs


# a finder at the door: the modules that parts may not need cannot be imported
BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + name)
sys.meta_path.insert(0, Absent())
import {module}
"""


@pytest.mark.parametrize(
    "module, absent",
    [
        ("benchmarks.gpu", ("torch", "triton", "numpy", "pydantic", "yaml")),
        ("benchmarks.first_hour.__main__", ("pydantic", "yaml", "tyro", "simplejpeg", "deepspeed", "nvidia", "PIL")),
        ("benchmarks.step.__main__", ("tyro", "simplejpeg", "deepspeed", "nvidia", "PIL", "safetensors")),
        ("benchmarks.tune", ("tyro", "simplejpeg", "deepspeed", "nvidia", "PIL", "safetensors")),
        ("benchmarks.kernels.__main__", ("pydantic", "yaml", "tyro", "simplejpeg", "deepspeed", "nvidia", "PIL")),
        ("benchmarks.training", ("tyro", "deepspeed", "nvidia", "skimage", "tensorboard")),
        ("benchmarks.encoder", ("tyro", "deepspeed", "nvidia", "PIL", "simplejpeg", "safetensors", "tqdm")),
    ],
)
def test_parts_need_no_more_than_they_name(module: str, absent: tuple[str, ...]):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", BARE.format(module=module, absent=absent)]
    done = finished(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr


# ---- the conductor, with parts of one line


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Results are on disk after each part, rows of one that failed too."""
    file = tmp_path / "results.json"
    looks = f"assert list(json.load(open({str(file)!r}))['parts']) == ['away', 'bad']\n"
    parts = [
        fake("away", "print('never')", needs=("json", "yaml_of_nobody")),
        fake("bad", ROWS + "print('it broke'); sys.exit(3)"),
        fake("good", looks + ROWS + "print('all is well')"),
    ]
    where = dict(gpu="H1", driver="1.2", versions=dict(torch="9", triton=None))
    results = run_all(parts, tmp_path, where)
    assert [result["status"] for result in results.values()] == ["passed over", "failed", "passed"]
    assert "missing: yaml_of_nobody; pip install yaml_of_nobody" in results["away"]["last_line"]
    assert results["bad"]["exit_code"] == 3 and results["bad"]["found"]["rows"][0]["us"] == 1234.5
    assert json.loads(file.read_text()) == dict(where=where, parts=results)
    assert (tmp_path / "bad.txt").read_text() == "it broke\n"
    out = capsys.readouterr().out
    assert "it broke" in out and "all is well" in out and "never" not in out
    # the card first, then rows
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("| card ") and "H1" in lines[2]
    assert any("1,234.5 us" in line and "a case" in line for line in lines[5:])


# time jumps when the part says that it is ready, so that no slow machine changes what is seen
@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    ready = tmp_path / "ready"

    def monotonic() -> float:
        return time.monotonic() + 1000 * ready.exists()

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    return f"open({str(ready)!r}, 'w').close()\n"


def test_a_part_that_is_late_is_asked_to_end(jump: str, tmp_path: Path):
    script = f"try:\n    {jump}    time.sleep({PATIENCE_S})\nexcept KeyboardInterrupt:\n    print('so far')\n    {ROWS}"
    found = run(fake("late", script), tmp_path, seconds=PATIENCE_S, grace=60)
    assert found["status"] == "out of time" and found["last_line"] == "so far"
    assert found["found"]["rows"][0]["us"] == 1234.5


DEAF = f"""
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    open(sys.argv[1] + ".child", "w").write(str(child))
    %s
time.sleep({PATIENCE_S})
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for_end(pid: int) -> bool:
    for _ in range(PATIENCE_S):
        if not is_alive(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_a_part_that_is_deaf_is_ended_with_its_children(jump: str, tmp_path: Path):
    found = run(fake("deaf", DEAF % jump.strip()), tmp_path, seconds=PATIENCE_S, grace=0.2)
    assert found["status"] == "out of time" and found["exit_code"] == -9
    assert wait_for_end(int((tmp_path / "deaf.json.child").read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_an_interrupt_leaves_nobody_behind(jump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def sleep(_: float) -> None:
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.time, "sleep", sleep)
    monkeypatch.setattr(gpu.time, "monotonic", time.monotonic)
    with pytest.raises(KeyboardInterrupt):
        run(fake("deaf", DEAF % jump.strip()), tmp_path, seconds=PATIENCE_S)
    assert wait_for_end(int((tmp_path / "deaf.json.child").read_text()))


def test_time_that_is_left_over_goes_to_what_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    allowed: dict[str, float] = {}
    took = dict(quick=10.0, late=110.0, last=1.0)

    def pretend(part: Part, out: Path, seconds: float) -> dict:
        allowed[part.name] = seconds
        return dict(status="passed", seconds=took[part.name], last_line="")

    monkeypatch.setattr(gpu, "run", pretend)
    parts = [fake("away", "", 30, needs=("yaml_of_nobody",)), *(fake(name, "", 40) for name in took)]
    run_all(parts, tmp_path, {})
    assert allowed == dict(quick=70, late=100, last=30)


@pytest.mark.parametrize("script, code", [(ROWS, 0), (ROWS + "sys.exit(1)", 1)], ids=["passed", "failed"])
def test_it_ends_well_if_all_that_ran_did(script: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "PARTS", (fake("away", "", needs=("yaml_of_nobody",)), fake("only", script)))
    clocks = dict(sm_mhz=1980.0, power_limit_w=None)
    monkeypatch.setattr(gpu, "card", lambda: dict(gpu="H1", clocks=clocks))
    assert gpu.main(["--out", str(tmp_path / "new" / "folder")]) == code
    table = (tmp_path / "new" / "folder" / "table.md").read_text()
    assert "1980" in table and "not told" in table and "passed over" in table
    with pytest.raises(SystemExit):
        gpu.main(["weather"])


# ---- what they share


def test_the_host_is_hidden_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch):
    """The card is busy for 2 ms at least, whatever its clock, when the first mark is set; no call waits in between."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            said.append("mark")
            self.at = float(said.count("work"))

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def sleep(cycles: int) -> None:
        assert cycles / 3.2e9 >= 2e-3
        said.append("sleep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    assert card.cuda_laps(lambda: said.append("work"), 2) == [1, 1]
    assert said == ["sleep", "mark", "work", "mark", "work", "mark", "wait"]
    assert card.cuda_clock(lambda: said.append("work")) == 1000


def test_clocks_are_those_of_the_card_in_use(monkeypatch: pytest.MonkeyPatch):
    one = "GPU-aa, 580.1, 1980, 1980, 2619, 2619, 700.00, 31"
    other = "GPU-bb, 580.1, [N/A], 1410, 1593, 1593, [Not Supported], 40"
    monkeypatch.setattr(card, "_output", lambda *_: [one, other])
    driver, clocks = card._driver_and_clocks("bb")
    assert driver == "580.1" and clocks is not None and clocks["sm_mhz"] is None and clocks["max_sm_mhz"] == 1410
    assert clocks["power_limit_w"] is None and clocks["temperature_c"] == 40
    assert card._driver_and_clocks("of nobody") == (None, None)
    # what nvidia-smi says of a single card is of that one, however it writes the identity
    monkeypatch.setattr(card, "_output", lambda *_: [one])
    assert card._driver_and_clocks("of nobody")[0] == "580.1"
    monkeypatch.setattr(card, "_output", lambda *_: [])
    assert card._driver_and_clocks("") == (None, None)


def test_a_backend_that_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    q = torch.randn(1, 2, 4, 16)
    assert chosen_backend(q, q, q).isupper()
    assert chosen_backend(q, q, no_such_argument=q) == NOT_TOLD
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert chosen_backend(q, q, q) == NOT_TOLD


def test_laps_are_end_to_end():
    began = time.perf_counter()
    laps = host_laps(lambda: time.sleep(0.01), 3)
    whole = 1e3 * (time.perf_counter() - began)
    assert len(laps) == 3 and min(laps) >= 10 and sum(laps) <= whole


def test_rows_are_lines_and_files(tmp_path: Path):
    row = dict(case="a", us=1234.56, tflop_per_s=None, peak_mib=7, error="no | more")
    assert figures(row) == "1,234.6 us, 7 MiB, no | more"
    assert markdown(("x", "what"), [("1", "a | b")]) == "| x | what  |\n| - | ----- |\n| 1 | a / b |"
    file = tmp_path / "new" / "rows.json"
    for value in ([1], [1, 2]):
        write_json(file, value)
        assert json.loads(file.read_text()) == value and os.listdir(file.parent) == ["rows.json"]
