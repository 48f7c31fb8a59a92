"""What `pip install .` brings, in an environment without triton, DALI and deepspeed, as on a Mac."""

import os
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.tiny import make_parts, write_config
from helpers.waiting import finished

ROOT = Path(__file__).parent.parent
ABSENT = {"triton", "deepspeed"}  # of what fastbeit, and PyTorch for CUDA, ask for; DALI nobody asks for but [gpu]


def needed(name: str, extras: frozenset[str], found: dict[str, frozenset[str]]) -> None:
    """Add a distribution, and what it asks for, to `found`."""
    name = canonicalize_name(name)
    if name in ABSENT or (name in found and extras <= found[name]):
        return
    found[name] = extras | found.get(name, frozenset())
    for text in distribution(name).requires or []:
        asked = Requirement(text)
        if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed(asked.name, frozenset(asked.extras), found)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A folder of packages: the wheel as it is unpacked, and links to what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    finished([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "packages")
    found: dict[str, frozenset[str]] = {}
    needed("fastbeit", frozenset(), found)
    for name in found.keys() - {"fastbeit"}:
        for first in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            if not (folder / "packages" / first).exists():
                (folder / "packages" / first).symlink_to(distribution(name).locate_file(first))
    return folder / "packages"


@pytest.fixture
def python(clean):
    """Runs Python with those packages alone."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def python(*args: object):
        return finished([sys.executable, "-S", *map(str, args)], env={**kept, "PYTHONPATH": str(clean)}, cwd=clean)

    return python


def test_nothing_of_this_environment_is_seen(python, clean):
    code = "import fastbeit, importlib.util as u; print(fastbeit.__file__, *map(u.find_spec, ['triton', 'deepspeed']))"
    assert python("-c", code).stdout.split() == [str(clean / "fastbeit/__init__.py"), "None", "None"]
    assert "No module named 'nvidia" in python("-c", "import nvidia.dali").stderr


def test_the_command_says_what_it_does(python):
    said = python("-m", "fastbeit", "--help")
    assert said.returncode == 0 and "fastbeit pretrain CONFIG" in said.stdout, said.stderr
    said = python("-m", "fastbeit", "pretrain", "--help")
    assert said.returncode == 0 and "--engine.name" in said.stdout, said.stderr


def test_the_kernels_serve_their_references_and_name_what_is_missing(python):
    code = """if True:
        import torch, fastbeit_kernels
        from fastbeit_kernels import cross_entropy
        logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
        print(f"{cross_entropy(logits, labels)[0]:.4f}")
        cross_entropy(logits, labels, backend="triton")
    """
    said = python("-c", code)
    assert said.stdout == "1.3863\n" and "pip install 'triton>=3.6'" in said.stderr


def test_configs_are_found_by_name_from_any_directory(python, clean):
    assert not (clean / "configs").exists()
    said = python("-m", "fastbeit", "plan", "beit_large_in1k", "--gpus=8", "--gpu=h100", "--optim.batch_size", "1024")
    assert said.returncode == 0 and "batch" in said.stdout, said.stderr
    packed = sorted(path.name for path in (clean / "fastbeit" / "configs").rglob("*"))
    assert packed == sorted(path.name for path in (ROOT / "configs").rglob("*"))


def test_the_source_distribution_makes_the_same_wheel(tmp_path, clean):
    hatch = [sys.executable, "-m", "hatchling", "build"]
    finished([*hatch, "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    finished([*hatch, "-t", "wheel", "-d", tmp_path], cwd=source, check=True)
    (wheel,), (ours,) = tmp_path.glob("*.whl"), clean.parent.glob("*.whl")
    contents = [{one.filename: one.CRC for one in zipfile.ZipFile(path).infolist()} for path in (wheel, ours)]
    assert contents[0] == contents[1] and "fastbeit/configs/beit_base_in1k.yaml" in contents[0]


def test_a_cpu_pre_trains(python, tmp_path):
    parts = [f"{key}={value}" for key, value in make_parts(tmp_path).items()]
    command = "-m", "fastbeit", "pretrain", write_config(tmp_path / "tiny.yaml"), *parts, "optim.steps=2"
    said = python(*command, f"out={tmp_path / 'run'}", "engine.name=single", "data.num_workers=1")
    assert said.returncode == 0 and (tmp_path / "run/checkpoints/step-000002").exists(), said.stderr
    for setting, wanted in (
        ("kernels.backend=triton", "pip install 'triton>=3.6'"),
        ("data.pipeline=dali", "pip install 'fastbeit[gpu]'"),
    ):
        said = python(*command, f"out={tmp_path / 'other'}", setting)
        assert said.returncode == 2 and wanted in said.stderr and "Traceback" not in said.stderr, said.stderr


def test_the_doctor_says_what_is_absent_and_how_to_get_it(python):
    said = python("-m", "fastbeit", "doctor", "kernels.loss=triton")
    assert said.returncode == 2 and "kernels.loss=triton: triton is not installed; pip install" in said.stderr
    rows = {line.split()[0]: line for line in said.stdout.splitlines()}
    for name, wanted in (("triton", "'triton>=3.6'"), ("deepspeed", "deepspeed>=0.19"), ("nvidia.dali", "nvidia-dali")):
        assert " absent " in rows[name] and wanted in rows[name]
