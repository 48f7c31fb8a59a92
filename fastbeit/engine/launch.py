"""Who started this process, and where it stands among those that were started with it: by the environment alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastbeit.errors import USAGE, RunError

# SLURM numbers the steps of srun from 0; above stand a batch script (0xfffffffb) and salloc's shell (0xfffffffa)
NUM_STEPS = 0xFFFFFFF0
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # for SLURM; below 32768, where Linux begins to give ports out by itself
STEPS_A_JOB = 16  # that have a port of their own before the next job's begin
HOST = r"(?:[^][,\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"  # of a node list: a[1-2,4]b
TASKS = r"(\d+)(?:\(x(\d+)\))?"  # 8(x2): eight on each of two nodes


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine, which is the number of its GPU
    local_size: int = 1
    master_addr: str = ""  # where rank 0 waits for the others; empty: nobody started this process as a rank
    master_port: int = 0

    def variables(self) -> dict[str, str]:
        """As torchrun sets them; PyTorch and DeepSpeed read them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def find_place(env: Mapping[str, str], on_terminal: bool = False, num_gpus: int = 0) -> Place:
    """By what torchrun or `deepspeed` has set, else by what SLURM's srun has, else alone.

    A launcher wins over SLURM, because `srun torchrun` sets both.

    Args:
        env: the environment.
        on_terminal: somebody types into this process; srun gives a terminal to the first task at most.
        num_gpus: GPUs that this process sees.

    Raises:
        RunError: variables that do not fit together, or a shell among SLURM's tasks (2).
    """
    if "RANK" not in env and _is_task_of_many(env):
        return _of_slurm(env, on_terminal, num_gpus)
    return _of_launcher(env)


def _of_launcher(env: Mapping[str, str]) -> Place:
    alone = {"RANK": None, "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given = [name for name, value in alone.items() if env.get(name) not in (None, value)]
    if "RANK" not in env and not given:
        return Place(local_size=_local_size(env, 1))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        others = [other for other in given if other != name]
        _text(env, name, others, "start it by torchrun, deepspeed or srun, or unset it to run alone")
    port = _port(env)
    size = _number(env, "WORLD_SIZE", 1)
    rank = _number(env, "RANK", 0, size, f"WORLD_SIZE={size}")
    if size > 1:
        remedy = "start it by torchrun, deepspeed or srun, or set it to the number of this process on its machine"
        _text(env, "LOCAL_RANK", ["RANK"], remedy)
    return Place(rank, size, _number(env, "LOCAL_RANK", 0), _local_size(env, size), env["MASTER_ADDR"], port)


def _local_size(env: Mapping[str, str], size: int) -> int:
    # by torchrun, by deepspeed
    told = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(name)]
    return _number(env, told[0], 1) if told else size


# ---- SLURM: https://slurm.schedmd.com/srun.html, "Output environment variables"


def _is_task_of_many(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, and others with it.

    A batch script and the shell of `salloc` have SLURM_PROCID=0 and the SLURM_NTASKS of their job, though there is one
    process. Only a step of srun has a number of its own, and says of how many tasks it is. `srun --pty bash` is a step
    of one.
    """
    if not env.get("SLURM_STEP_ID") or _number(env, "SLURM_STEP_ID", 0) >= NUM_STEPS:
        return False
    _text(env, "SLURM_STEP_NUM_TASKS", ["SLURM_STEP_ID"], "unset it to run alone")
    return _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1


def _of_slurm(env: Mapping[str, str], on_terminal: bool, num_gpus: int) -> Place:
    size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    if on_terminal:
        raise RunError(
            f"this is a terminal, but SLURM_STEP_NUM_TASKS={size}: of several tasks `srun --pty` gives the first a "
            "shell, and the others end; `srun fastbeit ...` starts them all, `env -u SLURM_STEP_ID fastbeit ...` runs "
            "alone",
            USAGE,
        )
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"):
        _text(env, name, ["SLURM_STEP_NUM_TASKS"], "start it by srun, or unset SLURM_STEP_ID to run alone")
    rank = _number(env, "SLURM_PROCID", 0, size, f"SLURM_STEP_NUM_TASKS={size}")
    tasks = _tasks_per_node(env, size)
    local_size = tasks[_number(env, "SLURM_NODEID", 0, len(tasks), f"{len(tasks)}, the number of nodes")]
    local_rank = _number(env, "SLURM_LOCALID", 0, local_size, f"{local_size}, the number of tasks on this node")
    if num_gpus == 1:
        local_rank = 0  # --gpus-per-task: each task sees its own GPU alone, as number 0
    for name, value in {"WORLD_SIZE": size, "LOCAL_RANK": local_rank}.items():
        if env.get(name, str(value)) != str(value):
            raise RunError(f"{name}={env[name]}, but by SLURM's variables it is {value}; unset {name}", USAGE)
    port = _port(env) if env.get("MASTER_PORT") else _port_of_step(env)
    return Place(rank, size, local_rank, local_size, env.get("MASTER_ADDR") or _first_host(env), port)


def _tasks_per_node(env: Mapping[str, str], size: int) -> list[int]:
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = env[name]
    if not re.fullmatch(f"{TASKS}(?:,{TASKS})*", text):
        raise RunError(f"{name}='{text}', wanted numbers such as '8(x2),4'; srun sets it", USAGE)
    counts = [int(count) for count, times in re.findall(TASKS, text) for _ in range(int(times or 1))]
    if sum(counts) != size:
        raise RunError(
            f"{name}='{text}' is {sum(counts)} tasks, but SLURM_STEP_NUM_TASKS={size}; srun sets them", USAGE
        )
    return counts


def _first_host(env: Mapping[str, str]) -> str:
    """Where task 0 runs: the first name of a list such as `node[01-03,07],gpu5`."""
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if env.get(name)), None)
    if name is None:
        raise RunError("SLURM_STEP_NODELIST is not set; start it by srun, or set MASTER_ADDR to the first host", USAGE)
    match = re.fullmatch(f"({HOST})(?:,{HOST})*", env[name])
    if not match:
        raise RunError(
            f"{name}='{env[name]}', wanted hosts such as 'node[01-03,07],gpu5'; set MASTER_ADDR to the first of them",
            USAGE,
        )
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", match[1])


def _port_of_step(env: Mapping[str, str]) -> int:
    """The same for all tasks of a step, and another for the jobs that share a node with it."""
    job, step = (_number(env, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job * STEPS_A_JOB + step) % NUM_PORTS


# ---- reading


def _port(env: Mapping[str, str]) -> int:
    return _number(env, "MASTER_PORT", 0, 1 << 16, "65536")


def _text(env: Mapping[str, str], name: str, others: list[str], remedy: str) -> str:
    """What must be there, because others are."""
    if not env.get(name):
        found = f"{name} is {'empty' if name in env else 'not set'}"
        raise RunError(f"{found}{''.join(f', but {other}={env[other]} is' for other in others)}; {remedy}", USAGE)
    return env[name]


def _number(env: Mapping[str, str], name: str, least: int, end: int | None = None, called: str = "") -> int:
    text = env.get(name, str(least))
    if not text.isdecimal() or int(text) < least or (end is not None and int(text) >= end):
        wanted = f"a number from {least} on" if end is None else f"a number below {called}"
        raise RunError(f"{name}='{text}', wanted {wanted}; launchers set it", USAGE)
    return int(text)
