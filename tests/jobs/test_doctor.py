"""`fastbeit doctor`: a table, the same as JSON, and an exit code that says whether the configuration can run."""

import json
import os
from pathlib import Path

import pytest
import torch

from fastbeit.cli import main
from fastbeit.config.pretrain import Config
from fastbeit.errors import ConfigError
from fastbeit.health.finding import Finding
from fastbeit.jobs import doctor as module
from fastbeit.jobs.doctor import asked_by_name, doctor, num_outputs_of, table
from fastbeit_kernels.backend import HAS_TRITON
from helpers.tiny import make_tokenizer, run, write_config

FOUND = [
    Finding("deepspeed", "absent", why="not installed", fix="pip install it"),
    Finding("nvidia.dali", "wrong", "2.2", "x" * 500),
    Finding("loss triton", "runs", "interpreted, small, float32", "worst relative error 1.0e-07 (out)"),
    Finding("attention sdpa", "runs"),
]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "look_at_all", lambda *args: list(FOUND))


def test_the_command_looks_at_this_machine(tmp_path: Path):
    """As its user runs it, without TRITON_INTERPRET: kernels are interpreted all the same."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    config, output = write_config(tmp_path / "tiny.yaml"), tmp_path / "found.json"
    said = run("doctor", str(config), "kernels.attention=sdpa", "--json", str(output), env=kept)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "all that the configuration asks for by name runs here"
    told = {one["name"]: one for one in json.loads(output.read_text())}
    assert told["torch"]["state"] == told["attention sdpa"]["state"] == told["loss reference"]["state"] == "runs"
    assert {"python", "driver", "CUDA", "deepspeed", "xformers", "nvidia.dali", "apex", "masks triton"} <= told.keys()
    if HAS_TRITON and not torch.cuda.is_available():
        assert told["loss triton"]["version"] == "interpreted, small, float32"
    assert all(line.startswith(name) for name, line in zip(told, said.stdout.splitlines()[1:], strict=False))


@pytest.mark.parametrize(
    "setting, line",
    [
        ("engine.name=deepspeed", "engine.name=deepspeed: not installed; pip install it"),
        ("data.pipeline=dali", "data.pipeline=dali: xxx"),
    ],
)
def test_what_is_asked_for_by_name_and_does_not_run_is_an_exit_code(setting: str, line: str, found, capsys):
    assert main(["doctor"]) == 0
    assert main(["doctor", setting]) == 2
    assert f"fastbeit doctor: {line}" in capsys.readouterr().err


def test_a_kernel_that_a_run_on_a_cpu_refuses_is_an_exit_code(found, monkeypatch: pytest.MonkeyPatch):
    settings = Config.model_validate(dict(engine=dict(device="cpu"), kernels=dict(loss="triton")))
    monkeypatch.setattr("fastbeit_kernels.backend.INTERPRETED", False)
    monkeypatch.setattr("fastbeit_kernels.backend.HAS_TRITON", True)
    with pytest.raises(ConfigError, match='kernels.loss=triton: backend "triton" wants tensors on cuda'):
        doctor(settings, 8, None)
    monkeypatch.setattr("fastbeit_kernels.backend.INTERPRETED", True)
    assert doctor(settings, 8, None) == 0


def test_what_is_asked_for_by_name():
    assert asked_by_name(Config()) == {}
    settings = dict(engine=dict(device="cuda", name="deepspeed"), kernels=dict(backend="triton", attention="eager"))
    settings["log"] = dict(wandb="beit")
    assert asked_by_name(Config.model_validate(settings)) == {
        "CUDA": "engine.device=cuda",
        "deepspeed": "engine.name=deepspeed",
        "wandb": "log.wandb=beit",
        "attention eager": "kernels.attention=eager",
        "masked_embed triton": "kernels.backend=triton",
        "loss triton": "kernels.backend=triton",
        "masks triton": "kernels.backend=triton",
    }


@pytest.mark.parametrize("name, package", [("apex_lamb", "apex"), ("ds_cpu_adam", "deepspeed")])
def test_an_optimizer_of_another_package_asks_for_it(name: str, package: str):
    settings = Config.model_validate(dict(optim=dict(name=name), engine=dict(device="cpu")))
    assert asked_by_name(settings) == {package: f"optim.name={name}"}


def test_the_table_is_aligned_and_its_lines_are_short():
    lines = table(FOUND).splitlines()
    assert len(lines) == len(FOUND) + 1 and max(map(len, lines)) < 260
    starts = {line.index(word) for line, word in zip(lines, ("state", "absent", "DOES", "runs", "runs"), strict=True)}
    assert len(starts) == 1


def test_the_words_are_those_of_the_tokenizers_card(tmp_path: Path):
    def words(path: str, objective: str = "tokens") -> int:
        return num_outputs_of(Config.model_validate(dict(tokenizer=dict(path=path), objective=objective)))

    assert words(str(make_tokenizer(tmp_path / "dvae", seed=0))) == 32
    assert words("") == 1024  # of the bundled one
    assert words(str(tmp_path / "nowhere")) == 8192
    assert words("", "pixels") == 768


def test_a_file_that_cannot_be_written_is_an_exit_code(found, tmp_path: Path):
    assert main(["doctor", "--json", str(tmp_path / "nowhere/x.json")]) == 73
