"""Which pipeline a job takes: decided once, kept, said, and the same on all ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.data import loader
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError, RunError
from fastbeit.jobs.pretrain import pretrain
from fastbeit.jobs.train_tokenizer import train_tokenizer
from fastbeit.train import pipeline as choosing
from fastbeit.train.pipeline import Choice, settle_pipeline
from helpers import caches
from helpers.tiny import SETTINGS, make_parts, write_config
from helpers.waiting import finished

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NO_DALI = "No module named 'nvidia'"


@pytest.fixture
def dali(monkeypatch):
    """Says why DALI cannot be imported; None: it can."""

    def dali(problem: str | None) -> None:
        monkeypatch.setattr(choosing, "why_no_dali", lambda: problem)

    dali(None)
    return dali


def settled(device=CPU, run=None, tokens=None, *settings: str) -> Choice:
    config, choice = settle_pipeline(configure(Config, list(settings)), World(0, 1, device), run, tokens)
    assert config.data.pipeline == choice.name
    return choice


def test_auto_is_torch_and_says_what_else_there_is(dali):
    assert str(settled(CPU)) == "pipeline: torch (auto: no CUDA device)"
    assert str(settled(CUDA)) == "pipeline: torch (auto; data.pipeline=dali decodes on the GPU)"
    dali(NO_DALI)
    assert str(settled(CUDA)) == "pipeline: torch (auto: no DALI, No module named 'nvidia')"


def test_a_card_that_is_not_used_counts_for_nothing(dali, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(settled(CPU)) == "pipeline: torch (auto: engine.device=cpu)"


@pytest.mark.parametrize("name", ["torch", "dali", "pillow"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_name_is_taken(dali, name, device):
    assert str(settled(device, None, None, f"data.pipeline={name}")) == f"pipeline: {name} (as data.pipeline says)"


def test_what_a_library_lacks_is_said(monkeypatch):
    def fail(name: str) -> None:
        raise OSError("libdali.so: cannot open shared object file")

    monkeypatch.setattr(loader.importlib, "import_module", fail)
    assert loader.why_no_dali() == "libdali.so: cannot open shared object file"


# ---- what was begun


def saved(folder: Path, **data: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def test_a_run_keeps_what_it_began_with(dali, tmp_path):
    run = saved(tmp_path / "run", pipeline="dali")
    assert str(settled(CPU, run)) == f"pipeline: dali (auto: as the run in '{run}' began)"
    dali(NO_DALI)
    with pytest.raises(ConfigError, match=rf"as the run in '{run}' began\), but No module .*; .*begin another run"):
        settled(CUDA, run)


@pytest.mark.parametrize("kind", [Config, TokenizerTrainConfig])
def test_a_run_from_before_there_was_a_choice_was_by_torch(dali, tmp_path, kind):
    config, choice = settle_pipeline(configure(kind, []), World(0, 1, CUDA), saved(tmp_path / "run"), None)
    assert choice.name == config.data.pipeline == "torch"


@pytest.mark.parametrize("content", [None, "- a\n- list\n", "data: 3\n"], ids=["nothing", "a list", "no section"])
def test_a_directory_that_holds_no_run_decides_nothing(dali, tmp_path, content):
    if content:
        (tmp_path / "config.yaml").write_text(content)
    assert settled(CUDA, tmp_path).name == "torch"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}


def said_of(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("pipeline: ")]


def test_a_run_says_and_writes_its_pipeline_and_goes_on_with_it(parts, tmp_path, capfd):
    out = tmp_path / "run"
    settings = {"out": out, "optim.steps": 2}
    for more, said in (
        ({"data.pipeline": "pillow"}, "pipeline: pillow (as data.pipeline says)"),
        ({}, f"pipeline: pillow (auto: as the run in '{out}' began)"),
    ):
        assert pretrain(caches.configured({**parts, "data.num_crops": 0}, **settings, **more), ["fastbeit"]) == 0
        assert said_of(capfd.readouterr().err) == [said]
        assert yaml.safe_load((out / "config.yaml").read_text())["data"]["pipeline"] == "pillow"
    other = caches.configured({**parts, "data.num_crops": 0}, **{**settings, "data.pipeline": "torch"})
    with pytest.raises(RunError, match="data.pipeline was pillow, now torch"):
        pretrain(other, ["fastbeit"])
    # by itself it is torch here, and that is what is written
    fresh = caches.configured({**parts, "data.num_crops": 0}, **{**settings, "out": tmp_path / "fresh"})
    assert pretrain(fresh, ["fastbeit"]) == 0
    (said,) = said_of(capfd.readouterr().err)
    assert said.startswith("pipeline: torch (auto: ") or torch.cuda.is_available()
    name = said.split()[1]
    assert yaml.safe_load((tmp_path / "fresh/config.yaml").read_text())["data"]["pipeline"] == name


def test_tokens_decide_for_the_run_that_reads_them_and_for_the_job_that_goes_on_with_them(parts, tmp_path, capfd):
    folder = tmp_path / "tokens"
    assert caches.make(parts, folder, data__pipeline="pillow") == 0
    assert "pipeline: pillow (as data.pipeline says)" in capfd.readouterr().out
    assert caches.make(parts, folder) == 0
    said = f"pipeline: pillow (auto: as the tokens in '{folder}' were made)"
    assert said in capfd.readouterr().out
    run = caches.configured(parts, data__tokens=folder, out=tmp_path / "run", optim__steps=2)
    assert pretrain(run, ["fastbeit"]) == 0
    assert said_of(capfd.readouterr().err) == [said]
    # what is not finished decides as well
    (folder / "tokens.json").rename(folder / "plan.json")
    assert settled(CUDA, None, folder).name == "pillow"
    # a run that names another does not change its pipeline for them: they are refused by name
    other = caches.configured(parts, data__tokens=folder, out=tmp_path / "other", data__pipeline="torch")
    (folder / "plan.json").rename(folder / "tokens.json")
    with pytest.raises(RunError, match="data.pipeline is pillow there, torch here"):
        pretrain(other, ["fastbeit"])


def test_a_tokenizers_training_has_a_pipeline_too(parts, tmp_path, capfd):
    settings = ["model.n_hid=8", "model.n_init=8", "model.vocab_size=16", "model.group_count=2", "data.image_size=16"]
    settings += ["optim.steps=1", "optim.batch_size=4", "data.num_workers=0", "data.pipeline=pillow"]
    config, index = configure(TokenizerTrainConfig, settings), Path(parts["data.index"])
    assert train_tokenizer(config, index, None, tmp_path / "dvae", ["fastbeit"]) == 0
    assert said_of(capfd.readouterr().err) == ["pipeline: pillow (as data.pipeline says)"]
    assert yaml.safe_load((tmp_path / "dvae/config.yaml").read_text())["data"]["pipeline"] == "pillow"


# ---- ranks

RANKS = """
import json, sys
import torch
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.config.running import EngineConfig
from fastbeit.engine.ranks import World, start_world
from fastbeit.errors import RunError
from fastbeit.process import leave
from fastbeit.train import pipeline

world = start_world(EngineConfig(device="cpu"))
# each believes that it has a card, so that DALI alone decides
there = World(world.rank, world.size, torch.device("cuda", 0), world.host_group)
told = []
own = "data.pipeline=" + ("torch" if world.rank else "dali")
for missing, settings in ((1, []), (1, ["data.pipeline=dali"]), (None, [own])):
    pipeline.why_no_dali = lambda: "no DALI" if world.rank == missing else None
    try:
        told.append(pipeline.settle_pipeline(configure(Config, settings), there, None, None)[0].data.pipeline)
    except RunError as err:
        told.append([str(err), err.exit_code])
print(json.dumps(told), file=open(sys.argv[1] + str(world.rank), "w"))
world.leave()
leave(0)
"""


def test_ranks_have_one_pipeline_or_an_error_that_names_them(tmp_path):
    (tmp_path / "choose.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = finished([*torchrun, str(tmp_path / "choose.py"), str(tmp_path / "rank")])
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert one == other
    alike, lacking, apart = one
    assert alike == "torch"
    assert apart == [
        "the ranks chose different pipelines: rank 0: pipeline: dali (as data.pipeline says); rank 1: "
        "pipeline: torch (as data.pipeline says). Set data.pipeline, for all of them",
        2,
    ]
    assert lacking[0].startswith("rank 1: pipeline: dali (as data.pipeline says), but no DALI; pip install")


def test_configs_leave_it_to_the_machine():
    assert "pipeline" not in SETTINGS["data"]
    for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml"):
        assert "pipeline" not in path.read_text()
