"""What the doctor says of a package: whatever its import does, a line."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.health import packages
from fastbeit.health.finding import Finding
from fastbeit.health.packages import package, stale_locks

CPU = torch.device("cpu")


def look(name: str) -> Finding:
    return package(name, Config(), CPU)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes modules that can be imported in this test alone."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(path: str, text: str = "") -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_is_there_runs_in_its_version():
    assert look("numpy") == Finding("numpy", "runs", sys.modules["numpy"].__version__)
    assert look("torch").state == look("safetensors").state == "runs"


def test_what_is_not_there_is_absent_and_it_is_told_how_to_get_it():
    found = look("apex")
    assert (found.state, found.why, found.fix) == (
        "absent",
        "not installed",
        "only optim.name=apex_adam and apex_lamb want it, built from its source: docs/optimizers.md",
    )


@pytest.mark.parametrize(
    "text, why",
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise OSError('libcudart.so.13:\\n  no such file')", "OSError: libcudart.so.13: no such file"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_import_that_raises_is_told_in_one_line(text: str, why: str, site):
    site("apex/__init__.py", text)
    found = look("apex")
    assert (found.state, found.why) == ("wrong", why)


def test_a_folder_of_wandbs_is_no_package(site):
    site("wandb/run-1/log.txt")
    found = look("wandb")
    assert (found.state, found.fix) == ("wrong", "pip install wandb; only log.wandb wants it")
    site("wandb/__init__.py", "__version__ = '0.31.0'\ndef init(): ...")
    del sys.modules["wandb"]
    assert look("wandb") == Finding("wandb", "runs", "0.31.0")


def test_the_unrelated_apex_is_told_from_nvidias(site):
    site("apex/__init__.py")
    found = look("apex")
    assert found.state == "wrong" and "unrelated package" in found.why and found.fix == "pip uninstall apex"


def test_nvidias_apex_runs_when_its_extensions_were_built(site):
    site("apex/__init__.py", "__version__ = '0.1'")
    site("apex/optimizers/__init__.py", "class FusedAdam: ...")
    assert "built without its CUDA extensions" in look("apex").why
    site("amp_C.py")
    sys.path_importer_cache.clear()
    assert look("apex") == Finding("apex", "runs", "0.1")


def test_an_old_release_is_told():
    assert packages.too_old("torch", "2.10.1+cu128") == ("older than 2.11", "")
    assert packages.too_old("torch", "2.11.0") is None
    assert packages.too_old("torch", "3.0") is None
    # of DeepSpeed the third number counts
    assert packages.too_old("deepspeed", "0.19.7") == ("older than 0.19.8", "")
    assert packages.too_old("deepspeed", "0.19.8+cpu") is None
    assert packages.too_old("deepspeed", "0.20") is None
    assert packages.too_old("wandb", "0.1") is None


def test_what_is_too_old_is_what_pyproject_refuses():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, least in packages.LEAST.items():
        wanted = f"{name}>={'.'.join(map(str, least))}"
        assert re.search(rf"\"{re.escape(wanted)}[;\"]", project), wanted
        assert f"{wanted}'" in packages.HOW_TO_GET[name]


def test_a_lock_that_nobody_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two are there; one is a minute old: somebody compiles."""
    old, new = tmp_path / "py311_cu130/fused_adam/lock", tmp_path / "py311_cu130/cpu_adam/lock"
    for lock, age_s in ((old, 601), (new, 60)):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (10_000 - age_s, 10_000 - age_s))
    assert stale_locks(tmp_path, 10_000) == [old]
    assert stale_locks(tmp_path / "nowhere", 10_000) == []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert packages.extensions_folder() == tmp_path
    wrong = packages._deepspeed(None, Config(), CPU)  # by now both are old
    assert wrong and wrong[1] == f"delete '{new}', '{old}'"


def test_xformers_is_tried_at_the_shapes_of_the_run(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(packages, "check_attention", lambda *args: asked.append(args) or "no kernel")
    assert packages._xformers(None, Config(), CPU) == ("no kernel", "")
    assert asked == [("xformers", CPU, torch.float32, 197, 12, 64)]
