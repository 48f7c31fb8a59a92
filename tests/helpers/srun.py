"""As much of SLURM's srun as a test needs: its variables, signals passed on, and the highest code of a task.

    python tests/helpers/srun.py --nodes N --ntasks-per-node M [--other=option ...] COMMAND ...

All nodes are this machine. The variables and the exit code are those of srun's manual.
"""

import os
import random
import signal
import socket
import subprocess
import sys

from fastbeit.engine.launch import FIRST_PORT, NUM_PORTS, STEPS_A_JOB


def variables(nodes: int, tasks_per_node: int, rank: int, job: int) -> dict[str, str]:
    others = f",node[2-{nodes}]" if nodes > 1 else ""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks_per_node),
        "SLURM_STEP_NODELIST": f"localhost{others}",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks_per_node}(x{nodes})" if nodes > 1 else str(tasks_per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank // tasks_per_node),
        "SLURM_LOCALID": str(rank % tasks_per_node),
    }


def job_with_a_free_port() -> int:
    jobs = NUM_PORTS // STEPS_A_JOB
    while True:
        job = random.randrange(jobs)
        with socket.socket() as sock:
            try:
                sock.bind(("", FIRST_PORT + job * STEPS_A_JOB))
                return job
            except OSError:
                continue


def main(args: list[str]) -> int:
    counts = {"--nodes": "SLURM_NNODES", "--ntasks-per-node": "SLURM_NTASKS_PER_NODE"}
    counts = {option: int(os.environ.get(name, 1)) for option, name in counts.items()}
    while args and args[0].startswith("-"):
        option = args.pop(0)
        if option in counts:
            counts[option] = int(args.pop(0))
    nodes, per_node = counts.values()
    job = job_with_a_free_port()
    tasks = [
        subprocess.Popen(
            args,
            env=os.environ | variables(nodes, per_node, rank, job),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(nodes * per_node)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # to all processes of a task, decoding ones as well
        signal.signal(number, lambda number, _: [os.killpg(task.pid, number) for task in tasks if task.poll() is None])
    return max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
