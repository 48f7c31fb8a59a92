"""The ways in for others: the images, and the job script with stand-ins for SLURM's commands."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from helpers.tiny import make_photos, run
from helpers.waiting import PATIENCE_S, finished, started, wait_until

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "slurm.sbatch"
DOCKER, APPTAINER = ((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def"))
BASE = re.compile(r"^(?:FROM|From:) (\S+)$", re.M)
SCONTROL = """#!/bin/bash
echo "$*" >>"$STUBS/scontrol"
"""
# writes down its command and ends with `$CODE`
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$STUBS/srun"
exit "$CODE"
"""


def constraints() -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {name.lower(): version for name, version in lines}


def test_both_images_have_one_base_and_it_has_the_cuda_of_the_constraints():
    (base,), (other,) = BASE.findall(DOCKER), BASE.findall(APPTAINER)
    assert base == other
    cuda = re.match(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-", base)
    assert cuda and f"nvidia-dali-cuda{cuda[1]}{cuda[2]}" in constraints()


@pytest.mark.parametrize("text", [DOCKER, APPTAINER], ids=["docker", "apptainer"])
def test_images_install_what_pyproject_and_constraints_name(text):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"-c /opt/src/constraints.txt '/opt/src\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys() and "gpu" in extras
    pythons = set(re.findall(r"python(3\.\d+)", text))
    assert len(pythons) == 1 and pythons < set(re.findall(r":: (3\.\d+)$", "\n".join(project["classifiers"]), re.M))
    assert SpecifierSet(project["requires-python"]).contains(f"{pythons.pop()}.0")
    assert "==" not in text, "a version of its own, beside constraints.txt"


def test_both_images_have_the_same_packages():
    packages = [re.findall(r"--no-install-recommends (.*?)(?: \\)?$", text, re.M) for text in (DOCKER, APPTAINER)]
    assert packages[0] == packages[1] and len(packages[0]) == 1


def test_apptainer_copies_what_a_wheel_is_made_of():
    copied = re.findall(r"^    (\S+) /opt/src/(\S+)$", APPTAINER, re.M)
    assert all((ROOT / source).exists() and source == target for source, target in copied)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {name.split("/")[0] for name in [*hatch["packages"], *hatch["force-include"]]}
    wanted |= {"pyproject.toml", "constraints.txt", build["project"]["readme"], *build["project"]["license-files"]}
    assert wanted == {source for source, _ in copied}


def test_docker_does_not_run_as_root_and_says_how_much_memory_it_wants():
    users = re.findall(r"^USER (\S+)$", DOCKER, re.M)
    assert users == ["fastbeit"] and "useradd --create-home --uid 1001 fastbeit" in DOCKER
    assert re.search(r"^#     docker run .*--shm-size \d+g ", DOCKER, re.M)


def test_the_script_is_bash():
    assert finished(["bash", "-n", str(SCRIPT)]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("bash -n has passed; shellcheck is not installed")
    done = finished([shellcheck, str(SCRIPT)])
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment in which SLURM's commands are stubs."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "STUBS": str(tmp_path),
        "OUT": str(tmp_path / "a run"),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }


def requeued(folder: Path) -> str:
    return (folder / "scontrol").read_text() if (folder / "scontrol").exists() else ""


def test_it_starts_the_documented_command(tmp_path, slurm):
    env = {**slurm, "CODE": "0", "CONFIG": "c.yaml", "INDEX": "/d/t.idx"}
    done = subprocess.run([SCRIPT, "optim.epochs=300", "seed=1"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    documents = (ROOT / "docs" / "distributed.md").read_text()
    (documented,) = re.findall(r"^    srun (--cpus-per-task.*) \.\.\.$", documents, re.M)
    for name, value in {"=C ": "=8 ", "CONFIG": "c.yaml"}.items():
        assert name in documented
        documented = documented.replace(name, value)
    settings = [f"out={tmp_path / 'a run'}", "data.index=/d/t.idx", "optim.epochs=300", "seed=1"]
    assert (tmp_path / "srun").read_text().splitlines() == [*shlex.split(documented), *settings]
    assert not requeued(tmp_path)


@pytest.mark.parametrize("code", [75, 0, 1, 137], ids=["saved", "done in time", "an error", "a task was killed"])
def test_a_run_that_has_saved_and_no_other_goes_back_into_the_queue(tmp_path, slurm, code):
    assert finished(["bash", str(SCRIPT)], env={**slurm, "CODE": str(code)}, cwd=tmp_path).returncode == code
    assert requeued(tmp_path) == "requeue 4711\n" * (code == 75)


def test_real_ranks_are_stopped_and_requeued(tmp_path, slurm):
    """As SLURM does it: the signal goes to the tasks, not to the script."""
    stand_in = ROOT / "tests" / "helpers" / "srun.py"
    (tmp_path / "bin" / "srun").write_text(
        f'#!/bin/bash\necho $$ >"$STUBS/pid"\nexec "{sys.executable}" "{stand_in}" "$@"\n'
    )
    (tmp_path / "bin" / "fastbeit").write_text(f'#!/bin/bash\nexec "{sys.executable}" -m fastbeit "$@"\n')
    (tmp_path / "bin" / "fastbeit").chmod(0o755)
    make_photos(tmp_path / "photos", 16)
    assert run("index", str(tmp_path / "photos"), "-o", str(tmp_path / "t.idx")).returncode == 0
    kept = {name: value for name, value in os.environ.items() if name not in slurm}
    here = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "INDEX": str(tmp_path / "t.idx"), "OMP_NUM_THREADS": "1"}
    env = {**kept, **slurm, **here, "CONFIG": "configs/debug_cpu.yaml", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "a run" / "log.jsonl"
    command = ["bash", SCRIPT, "data.num_workers=1", "optim.steps=100000", "log.save_every=100000"]
    with started(command, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT) as job:
        wait_until(job, lambda: log.exists() and '"step": 2' in log.read_text())
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert job.communicate(timeout=PATIENCE_S)[1].count("stopped at step") == 1
    assert job.returncode == 75 and requeued(tmp_path) == "requeue 4711\n"
    assert list((tmp_path / "a run" / "checkpoints").iterdir())


def test_the_scheduler_signals_the_script_early_enough_for_what_the_documents_say():
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=TERM@90\n" in text and "#SBATCH --requeue\n" in text
    assert "90 s before" in (ROOT / "docs" / "exit-codes.md").read_text()
