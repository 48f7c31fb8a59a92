"""Headers of configs say what the planner says, and give commands that can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.memory import main as memory_main
from fastbeit.config.read import load_config
from fastbeit.engine.choices import Fitted
from fastbeit.jobs.plan import Machine, Plan, make_plan
from fastbeit.plural import counted

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
IN1K, IN22K = 1_281_167, 14_197_122  # images
# of each config: images, a kind of GPU and numbers of them, and what the memory is said for
H100S = "h100", (1, 8, 16), ["--ranks", "8"]
HEADERS = {
    "beit_base_in1k": (IN1K, *H100S),
    "beit_large_in1k": (IN1K, *H100S),
    "beit_small": (IN1K, "h100", (1, 8, 16), ["--ranks", "1"]),
    "beit_tiny": (IN1K, "h100", (1, 8, 16), ["--ranks", "1"]),
    "beit_base_in22k": (IN22K, *H100S),
    "beit_large_in22k": (IN22K, *H100S),
    "beit_base_paper": (IN1K, *H100S),
    "beit_huge": (IN22K, *H100S),
    "zero_offload": (IN1K, "rtx4080", (1, 8, 16), ["--ranks", "1", "--cards", "12", "16"]),
}


def planned(name: str, images: int, gpu: str, gpus: int, *settings: str) -> Plan:
    config = load_config(CONFIGS / f"{name}.yaml", list(settings))
    return make_plan(config, Machine(gpus, gpu, 8, images, 110))


def rows(name: str, gpus: int, *settings: str) -> list[Fitted]:
    images, gpu, *_ = HEADERS[name]
    return planned(name, images, gpu, gpus, *settings).engines


def hours_lines(name: str) -> str:
    images, gpu, numbers, _ = HEADERS[name]
    plans = [planned(name, images, gpu, gpus) for gpus in numbers]
    told = [
        f"{counted(p.machine.gpus, 'GPU')} {' and '.join(f'{r.hours:,.0f}' for r in p.runs.values())}" for p in plans
    ]
    return (
        f"# Hours, predicted for {plans[0].card.name}s, with tokens on the fly and with stored tokens:\n"
        f"#   {'; '.join(told)}\n"
        f"#   fastbeit plan configs/{name}.yaml --gpus {min(numbers[-1], 8)} --gpu {gpu} --images {images}\n"
    )


def comments(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", HEADERS)
def test_memory_and_hours_are_the_planners(name: str, capsys: pytest.CaptureFixture[str]):
    path = CONFIGS / f"{name}.yaml"
    assert memory_main(["--plan", str(path), *HEADERS[name][-1]]) == 0
    said = capsys.readouterr().out
    assert said.count("peak") >= 2 and said in path.read_text() and hours_lines(name) in path.read_text()


def test_what_the_largest_takes_with_each_engine():
    for where, gpus in ("Peak on a card of 8", 8), ("Peak on one alone", 1):
        ddp, *zero = [f"{one.engine} {one.peak_bytes / 2**30:.1f}" for one in rows("beit_huge", gpus)]
        assert f"# {where}: {', '.join([f'{ddp} GiB', *zero])}." in (CONFIGS / "beit_huge.yaml").read_text()
    assert all(one.fits for one in rows("beit_huge", 1))
    weeks = planned("beit_huge", IN22K, "h100", 1).runs["stored tokens"].hours / (24 * 7)
    assert round(weeks) == 11 and "takes eleven weeks" in comments("beit_huge")


def test_where_offload_is_needed():
    huge = load_config(CONFIGS / "beit_huge.yaml", []).model
    sizes = [f"model.{key}={getattr(huge, key)}" for key in ("width", "depth", "num_heads", "mlp_width")]
    ddp, *_ = rows("zero_offload", 1)
    *others, offload = rows("zero_offload", 1, *sizes)
    assert ddp.fits and offload.fits and not any(one.fits for one in others)
    comment = comments("zero_offload")
    for one in ddp, offload:
        assert f"micro-batches of {one.micro_batch}, peak {one.peak_bytes / 2**30:.1f} GiB" in comment


@pytest.mark.parametrize("name", HEADERS)
def test_its_commands_can_be_typed(name: str):
    found = re.findall(rf"pretrain configs/{name}\.yaml((?:\s+[a-z._]+=\S+)+)", comments(name))
    assert len(found) == 3
    for settings in found:
        config = load_config(CONFIGS / f"{name}.yaml", shlex.split(settings))
        # over the most ranks, and so over fewer
        assert config.out.startswith("runs/") and config.optim.batch_size % max(HEADERS[name][2]) == 0


@pytest.mark.parametrize("name", HEADERS)
def test_its_commands_are_those_of_the_documents(name: str):
    documents = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    start = r"(?:fastbeit|torchrun|deepspeed) [\s\S]*?pretrain"
    found = re.findall(rf"(?m)^ {{3}}({start}) configs/{name}\.yaml", comments(name))
    alone, node, nodes = (" ".join(command.split()) for command in found)
    assert all(f"{command} CONFIG ..." in documents for command in (alone, node, nodes))
    # DeepSpeed wants a launcher, for one GPU too
    is_deepspeed = load_config(CONFIGS / f"{name}.yaml", []).engine.name == "deepspeed"
    assert alone == ("deepspeed --num_gpus 1 --module fastbeit pretrain" if is_deepspeed else "fastbeit pretrain")
    assert "--nproc-per-node 8" in node and "--nnodes" not in node and "--nnodes 2" in nodes
    assert "--node-rank 1 on the second" in comments(name)


def test_the_models_are_those_of_the_paper():
    base, large = (load_config(CONFIGS / f"beit_{size}_in1k.yaml", []) for size in ("base", "large"))
    longer = {"epochs": 150, "warmup_steps": 10_000, "warmup_epochs": 10}
    for config, name in ((base, "beit_base_in22k"), (large, "beit_large_in22k")):
        other = load_config(CONFIGS / f"{name}.yaml", [])
        assert other == config.model_copy(update={"optim": config.optim.model_copy(update=longer), "log": other.log})
        assert planned(name, IN22K, "h100", 8).num_steps == pytest.approx(1.04e6, rel=1e-3)
    paper = load_config(CONFIGS / "beit_base_paper.yaml", [])
    plain = {"relative_position": "none", "absolute_position": True, "layer_scale": 0}
    assert paper == base.model_copy(update={"model": base.model.model_copy(update=plain)})
    assert planned("beit_base_paper", IN1K, "h100", 8).parameters == 92_089_856
    huge = load_config(CONFIGS / "beit_huge.yaml", []).model
    assert huge.width // huge.num_heads == 64
    assert planned("beit_huge", IN22K, "h100", 8).parameters == pytest.approx(1e9, rel=0.05)


def test_every_config_of_pre_training_is_in_the_table():
    table = (ROOT / "docs" / "planning.md").read_text()
    missing = [path.stem for path in CONFIGS.glob("*.yaml") if f"| `{path.stem}` |" not in table]
    assert not missing
