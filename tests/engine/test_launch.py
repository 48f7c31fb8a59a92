"""Who started a training: what is read of it, and that each of them really starts one."""

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from fastbeit.engine.launch import Place, find_place
from fastbeit.errors import RunError
from helpers import finetuned
from helpers.ranks import deepspeed, free_port, launched, srun
from helpers.tiny import make_parts, write_config

# the fourth of six tasks: four on the first node, two on the second
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "3",
}
PORT = 10_000 + 4711 * 16 % 20_000 + 2
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
}


def test_a_process_that_nobody_started_is_alone():
    assert find_place({}) == find_place({"WORLD_SIZE": "1"}) == Place()
    assert find_place({"LOCAL_WORLD_SIZE": "2"}) == Place(local_size=2)


def test_a_rank_of_a_launcher():
    place = Place(1, 4, 1, 2, "host", 29_400)
    assert find_place(TORCHRUN) == place and place.variables() == TORCHRUN
    of_deepspeed = {("LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name): value for name, value in TORCHRUN.items()}
    assert find_place(of_deepspeed) == place
    assert find_place({**STEP, **TORCHRUN}) == place, "srun torchrun: torchrun's are those of the rank"


def test_a_task_of_slurm():
    assert find_place(STEP) == Place(3, 6, 3, 4, "node07", PORT)
    last = {**STEP, "SLURM_PROCID": "5", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    assert find_place(last) == Place(5, 6, 1, 2, "node07", PORT)
    of_the_job = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}
    assert find_place({**of_the_job, "SLURM_JOB_NODELIST": "a1"}).master_addr == "a1"
    chosen = find_place({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "6"})
    assert (chosen.master_addr, chosen.master_port) == ("10.0.0.1", 29_500)


def test_a_task_takes_the_one_gpu_that_slurm_shows_it():
    assert find_place(STEP, num_gpus=1).local_rank == 0
    assert find_place(STEP, num_gpus=4).local_rank == 3


def test_ports_of_jobs_and_steps_on_one_node_are_apart():
    jobs = [
        find_place({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(900_000, 901_000)
        for step in range(3)
    ]
    assert len(set(jobs)) == len(jobs) and min(jobs) >= 10_000 and max(jobs) < 30_000


# what an allocation sets where there is one process; SLURM_NTASKS and SLURM_PROCID are the job's
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(JOB, id="batch script"),
        pytest.param({**JOB, "SLURM_STEP_ID": "4294967291"}, id="batch script with a step's number"),
        # `salloc` starts its shell with the environment of the job
        pytest.param({**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "16"}, id="salloc"),
        pytest.param({**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="srun --pty bash"),
    ],
)
def test_one_process_in_an_allocation_waits_for_nobody(env):
    assert find_place(env) == find_place(env, on_terminal=True) == Place()


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node7", "node7"),
        ("localhost,node2", "localhost"),
        ("node[01-03,07],gpu5", "node01"),
        ("node[007]", "node007"),
        ("gpu5,node[01-03]", "gpu5"),
        ("a[1-2]b", "a1b"),
        ("rack[3,5]-node[10-12]", "rack3-node10"),
        ("gpu-a.cluster.edu,x", "gpu-a.cluster.edu"),
    ],
)
def test_the_first_host(nodes, first):
    assert find_place({**STEP, "SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize("nodes", ["node[", "node[1-", "node[a-b]", "node[]", ",node1", "node1,", "a b", "node[1-2]]"])
def test_a_list_of_nodes_that_cannot_be_read_is_refused(nodes):
    words = f"^SLURM_STEP_NODELIST='{re.escape(nodes)}', wanted hosts such as 'node.*; set MASTER_ADDR to the first"
    with pytest.raises(RunError, match=words):
        find_place({**STEP, "SLURM_STEP_NODELIST": nodes})


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"SLURM_STEP_NUM_TASKS": None},
            "^SLURM_STEP_NUM_TASKS is not set, but SLURM_STEP_ID=2 is; unset it",
        ),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "^SLURM_STEP_NUM_TASKS='two', wanted a number from 1 on"),
        ({"SLURM_STEP_ID": "x"}, "^SLURM_STEP_ID='x', wanted a number"),
        ({"SLURM_PROCID": None}, "^SLURM_PROCID is not set, but SLURM_STEP_NUM_TASKS=6 is; start it by srun, or unset"),
        ({"SLURM_PROCID": "6"}, "^SLURM_PROCID='6', wanted a number below SLURM_STEP_NUM_TASKS=6"),
        ({"SLURM_LOCALID": ""}, "^SLURM_LOCALID is empty, but"),
        ({"SLURM_LOCALID": "4"}, "^SLURM_LOCALID='4', wanted a number below 4, the number of tasks on this node"),
        ({"SLURM_NODEID": "2"}, "^SLURM_NODEID='2', wanted a number below 2, the number of nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4x2"}, r"^SLURM_STEP_TASKS_PER_NODE='4x2', wanted numbers such as '8\(x2\),4'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, r"'4\(x2\)' is 8 tasks, but SLURM_STEP_NUM_TASKS=6"),
        ({"SLURM_JOB_ID": None}, "^SLURM_JOB_ID is not set"),
        ({"SLURM_JOB_ID": "x"}, "^SLURM_JOB_ID='x', wanted a number"),
        ({"SLURM_STEP_NODELIST": None}, "^SLURM_STEP_NODELIST is not set; .* or set MASTER_ADDR to the first host"),
        ({"MASTER_PORT": "65536"}, "^MASTER_PORT='65536', wanted a number below 65536"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE=2, but by SLURM's variables it is 6; unset WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "^LOCAL_RANK=0, but by SLURM's variables it is 3; unset LOCAL_RANK"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_by_name(changed, words):
    env = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    with pytest.raises(RunError, match=words) as caught:
        find_place(env)
    assert caught.value.exit_code == 2


def test_a_shell_among_tasks_is_told_how_to_go_on():
    with pytest.raises(RunError, match="^this is a terminal, but SLURM_STEP_NUM_TASKS=6.*env -u SLURM_STEP_ID"):
        find_place(STEP, on_terminal=True)
    assert find_place({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, True) == Place()
    assert find_place({**STEP, **TORCHRUN}, on_terminal=True).rank == 1


# ---- real trainings


def alone(*_: str) -> list[list[str]]:
    return [[sys.executable, "-m"]]


def hostfile(folder: Path) -> list[list[str]]:
    """Two machines, each with a `deepspeed` of its own; without --no_ssh the first would start the other by ssh."""
    hosts = folder / "hosts"
    hosts.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    here = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [["deepspeed", "--hostfile", str(hosts), "--node_rank", str(n), *here, "--module"] for n in range(2)]


def torchruns(folder: Path) -> list[list[str]]:
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "a job", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    return [
        ["torchrun", "--nnodes", "2", "--node-rank", str(n), "--nproc-per-node", "1", *meet, "-m"] for n in range(2)
    ]


def two_nodes_of_slurm(folder: Path) -> list[list[str]]:
    return [srun("--nodes", "2", "--ntasks-per-node", "1")]


@pytest.fixture(scope="module")
def losses_by(tmp_path_factory):
    """Runs three steps, by commands that start together, one a machine; gives the loss of each step."""
    folder = tmp_path_factory.mktemp("launch")
    parts = [f"{key}={value}" for key, value in make_parts(folder).items()]
    config = write_config(folder / "tiny.yaml")

    def losses_by(launcher: Callable[[Path], list[list[str]]], *settings: str) -> list[float]:
        out = folder / launcher.__name__
        run = ["fastbeit", "pretrain", str(config), *parts, f"out={out}", "optim.steps=3", *settings]
        commands = [[*start, *run] for start in launcher(folder)]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(launched, commands))
        return losses(out)

    return losses_by


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "event" not in line]


@pytest.fixture(scope="module")
def by_one(losses_by) -> list[float]:
    return losses_by(alone)


@pytest.mark.parametrize(
    "launcher, engine",
    [
        pytest.param(two_nodes_of_slurm, "deepspeed", id="srun"),
        pytest.param(hostfile, "deepspeed", id="deepspeed"),
        pytest.param(torchruns, "ddp", id="torchrun", marks=pytest.mark.long),
    ],
)
def test_two_machines_train_as_one_process(losses_by, by_one, launcher, engine):
    by_two = losses_by(launcher, f"engine.name={engine}")
    # fp32 sums in another order over 3 steps of AdamW at a large learning rate
    assert len(by_one) == 3 and by_two == pytest.approx(by_one, abs=1e-4)


def tokenizer_training(folder: Path) -> list[str]:
    settings = ["data.image_size=32", "data.num_workers=0", "model.n_hid=8", "model.n_init=16", "model.vocab_size=24"]
    settings += ["optim.batch_size=8", "optim.lr=1e-5"]
    return ["tokenizer", "train", "--data", make_parts(folder)["data.index"], *settings]


def finetuning(folder: Path) -> list[str]:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(finetuned.CONFIG))
    index = finetuned.index_of(folder, {"a": 4, "b": 4})
    # mixes are of a rank's own images
    return ["finetune", str(folder / "tiny.yaml"), f"data.index={index.location}", "augment.mix_prob=0"]


@pytest.mark.long
@pytest.mark.parametrize("verb", [tokenizer_training, finetuning])
def test_the_deepspeed_launcher_starts_ddp(verb, tmp_path):
    command = ["fastbeit", *verb(tmp_path), "optim.steps=3", "log.every=1", "engine.device=cpu"]
    for name, start in {"one": [sys.executable, "-m"], "two": deepspeed()}.items():
        out = ["-o", str(tmp_path / name)] if verb is tokenizer_training else [f"out={tmp_path / name}"]
        launched([*start, *command, *out])
    # fp32 sums in another order, over 3 steps
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
