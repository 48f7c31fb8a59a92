"""Kill -9 at any step and start again: the same samples, crops and bytes; and memory that does not grow."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image

from fastbeit.data.index.scan import build_index
from helpers.batch_digests import BATCH_SIZE, write_digests
from helpers.tiny import make_parts, make_photos, photo_folder, write_config
from helpers.waiting import PATIENCE_S, finished, started, wait_until

DIGESTS = Path(__file__).parents[1] / "helpers/batch_digests.py"
PIPELINES = [
    {"pipeline": "torch", "num_workers": 2},
    {"pipeline": "torch", "num_workers": 0},
    {"pipeline": "pillow", "num_workers": 1},
    {"pipeline": "dali", "num_workers": 2},
]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """Eleven photos, one of which went bad: steps of six images straddle epochs."""
    folder = tmp_path_factory.mktemp("resume")
    photos = make_photos(folder / "photos", 11)
    build_index(photos, folder / "images.idx", progress=False)
    (photos / "04.jpg").write_bytes((photos / "04.jpg").read_bytes()[:700])
    return folder / "images.idx"


def digests(index: Path, out: Path, options: dict, *numbers: int) -> AbstractContextManager[subprocess.Popen]:
    """Ranks, first and last step, as `batch_digests` wants them; killed in the end, where that has not ended before.

    The training process alone is killed, as by the kernel that runs out of memory.
    """
    command = [sys.executable, str(DIGESTS), str(index), str(out), json.dumps(options), *map(str, numbers)]
    return started(command, start_new_session=True)


def wait_for_lines(process: subprocess.Popen, out: Path, wanted: int) -> None:
    wait_until(process, lambda: out.exists() and out.read_bytes().count(b"\n") >= wanted, pause_s=0.002)


def whole_steps(out: Path, share: int) -> list[list[str]]:
    lines = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [lines[at : at + share] for at in range(0, len(lines) - share + 1, share)]


@pytest.fixture(scope="module")
def uninterrupted(index, tmp_path_factory):
    """Lines of 40 steps by one process without workers; made once a pipeline."""
    made = {}

    def lines(options: dict) -> list[list[str]]:
        name = options["pipeline"]
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "lines"
            write_digests(index, out, {**options, "num_workers": 0}, num_steps=40)
            made[name] = whole_steps(out, BATCH_SIZE)
        return made[name]

    return lines


@pytest.mark.parametrize("options", PIPELINES, ids=lambda options: "{pipeline}-{num_workers}".format(**options))
def test_kill_9_at_any_step(index, uninterrupted, tmp_path, options):
    if options["pipeline"] == "dali":
        pytest.importorskip("nvidia.dali")
    out, steps = tmp_path / "lines", []
    for wanted in (1, 9, 14, 40):
        with digests(index, out, options, 0, 1, len(steps), 40) as process:
            # where exactly it dies is left to the machine; it resumes wherever that was
            wait_for_lines(process, out, wanted * BATCH_SIZE) if wanted < 40 else process.wait(PATIENCE_S)
        steps = whole_steps(out, BATCH_SIZE)
        out.write_text("".join(line for step in steps for line in step))
    assert steps == uninterrupted(options)


@pytest.mark.parametrize("options", PIPELINES[::3], ids=lambda options: options["pipeline"])
def test_two_ranks_are_killed_and_one_goes_on(index, uninterrupted, tmp_path, options):
    if options["pipeline"] == "dali":
        pytest.importorskip("nvidia.dali")
    share, outs = BATCH_SIZE // 2, [tmp_path / "rank0", tmp_path / "rank1"]
    one, other = (digests(index, out, options, rank, 2, 0, 40) for rank, out in enumerate(outs))
    with one as one, other as other:
        for process, out in zip((one, other), outs, strict=True):
            wait_for_lines(process, out, 5 * share)
    steps = [sum(shares, []) for shares in zip(*(whole_steps(out, share) for out in outs), strict=False)]
    rest = tmp_path / "rest"
    with digests(index, rest, options, 0, 1, len(steps), 40) as process:
        assert process.wait(PATIENCE_S) == 0
    assert steps + whole_steps(rest, BATCH_SIZE) == uninterrupted(options)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_any_number_of_ranks_makes_the_same_batches(index, uninterrupted, tmp_path, world_size):
    options = {"pipeline": "pillow", "num_workers": 0}
    outs = [tmp_path / str(rank) for rank in range(world_size)]
    for rank, out in enumerate(outs):
        write_digests(index, out, options, rank, world_size, first_step=20, num_steps=30)
    shares = (whole_steps(out, BATCH_SIZE // world_size) for out in outs)
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == uninterrupted(options)[20:30]


def losses_of(out: Path) -> dict[int, float]:
    """By step; of a run that is still going, too."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    lines = (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return {line["step"]: line["loss"] for line in lines if "event" not in line}


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    wait_until(process, lambda: max(losses_of(out), default=0) >= step)


def test_a_run_that_is_killed_goes_on_as_if_it_were_not(tmp_path):
    """Thrice, at whatever step, by the command of the user; each loss is that of the run that nobody killed."""
    settings = [f"{key}={value}" for key, value in make_parts(tmp_path / "parts").items()]
    settings += ["optim.steps=60", "log.save_every=3", "data.num_workers=1", "data.pipeline=torch"]
    command = [sys.executable, "-m", "fastbeit", "pretrain", str(write_config(tmp_path / "tiny.yaml")), *settings]
    finished([*command, f"out={tmp_path / 'whole'}"], check=True)
    out = tmp_path / "killed"
    for step in (5, 20, 35):
        with started([*command, f"out={out}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            wait_for_step(process, out, step)
    finished([*command, f"out={out}"], check=True)
    assert losses_of(out) == losses_of(tmp_path / "whole")


def test_ranks_stop_together_when_the_disk_vanishes(tmp_path):
    parts = make_parts(tmp_path / "parts")
    settings = [f"{key}={value}" for key, value in parts.items()] + ["optim.steps=1000000", "data.num_workers=1"]
    out, photos = tmp_path / "run", tmp_path / "parts/photos"
    command = ["-m", "fastbeit", "pretrain", str(write_config(tmp_path / "tiny.yaml")), *settings, f"out={out}"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with started([*ranks, *command], stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, out, 5)
        photos.rename(tmp_path / "unmounted")
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode and f"'{photos}' is gone, or not mounted; last checkpoint: {out}" in stderr
    (step,) = (int(path.name.split("-")[1]) for path in (out / "checkpoints").iterdir())
    assert step == max(losses_of(out)) < 1000000
    # mounted again, one process takes it up where they stopped
    (tmp_path / "unmounted").rename(photos)
    with started([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as go_on:
        wait_for_step(go_on, out, step + 1)


# ---- memory

EPOCHS = """
import json, os, sys
from pathlib import Path
from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import open_index
from fastbeit.data.loader import make_loader

def memory_mb(pid):
    # of a process and its children; what several share counts once; without files, such as libraries, whose pages are
    # shared with whoever else runs
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return own + sum(map(memory_mb, children))

index = open_index(Path(sys.argv[1]))
data = DataConfig.model_validate({"image_size": 64, **json.loads(sys.argv[2])})
numbers = dict(token_size=(32, 32), batch_size=12, seed=0, rank=0, world_size=1, first_step=0, num_steps=20 * 5)
loader = make_loader(data, index, **numbers)
print(json.dumps([memory_mb(os.getpid()) for step, _ in enumerate(loader) if step % 5 == 4]))
"""


@pytest.mark.parametrize("options", PIPELINES[::3], ids=lambda options: options["pipeline"])
def test_memory_is_flat_over_20_epochs(tmp_path, options):
    if options["pipeline"] == "dali":
        pytest.importorskip("nvidia.dali")
    photo = Image.open(photo_folder() / "coffee.png")
    (tmp_path / "photos").mkdir()
    for i in range(60):
        photo.resize((600 - 7 * i, 400 - 5 * i)).save(tmp_path / f"photos/{i}.jpg")
    build_index(tmp_path / "photos", tmp_path / "images.idx", progress=False)
    command = [sys.executable, "-c", EPOCHS, str(tmp_path / "images.idx"), json.dumps(options)]
    done = finished(command, check=True)
    epochs = json.loads(done.stdout)
    assert len(epochs) == 20
    # 5 % of about 300 MB: an image kept of each ten, of these 1200 of 0.3 MB, would be seen
    assert max(epochs[15:]) < 1.05 * max(epochs[:5]), epochs
