"""What ends a process, or hangs, is named, and the rest has its turn."""

from pathlib import Path

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.health import apart
from fastbeit.health.apart import answers_apart, look_at_all, names_of

CPU = torch.device("cpu")


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package for the processes that are started."""

    def write(text: str) -> None:
        (tmp_path / "apex.py").write_text(text)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return write


def test_what_ends_its_process_is_named_and_what_comes_after_is_looked_at(apex):
    apex("import os, sys; print('libfoo is missing', file=sys.stderr); sys.stderr.flush(); os._exit(7)")
    numpy, broken, sdpa = look_at_all(["numpy", "apex", "attention sdpa"], Config(), 8, CPU)
    assert (broken.name, broken.state) == ("apex", "wrong")
    assert broken.why == "it ended the process with 7: libfoo is missing"
    assert [numpy.state, sdpa.name, sdpa.state] == ["runs", "attention sdpa", "runs"]


def test_an_answer_that_is_cut_short_costs_itself_alone(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torn.py").write_text(
        "import os, sys; open(sys.argv[1], 'w').write('{\"a\": 1}\\n{\"a\": '); os._exit(9)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    found, why = answers_apart("torn", {}, CPU, 600)
    assert found == [{"a": 1}] and why.startswith("it ended the process with 9")


def test_what_hangs_is_named(apex, monkeypatch: pytest.MonkeyPatch):
    apex("import time; time.sleep(3600)")
    monkeypatch.setattr(apart, "PATIENCE_S", 5)
    (found,) = look_at_all(["apex"], Config(), 8, CPU)
    assert (found.state, found.why) == ("wrong", "it hangs: no answer in 5 s")


def test_packages_and_operators_are_looked_at():
    assert {"torch", "nvidia.dali", "deepspeed", "loss triton", "attention sdpa"} <= set(names_of(Config()))
