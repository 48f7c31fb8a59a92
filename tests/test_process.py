"""The command as a process: outputs that fail cost nothing, and nothing holds up its end."""

import os
import subprocess
import sys

import pytest

from helpers.waiting import finished

TALKS = """
import sys
from fastbeit.process import keep_outputs_harmless, leave
keep_outputs_harmless()
file = open(sys.argv[1], "w")
for i in range(3000):
    print("a line of the command", i)
    print("a line beside it", i, file=sys.stderr)
file.write("its work")
file.close()
leave(7)
"""


def test_a_reader_that_is_gone_costs_nothing(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", TALKS, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=write, stderr=write) as process:
        assert process.wait() == 7
    os.close(write)
    assert (tmp_path / "file").read_text() == "its work"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file on a full disk is made by Linux")
def test_a_log_on_a_full_disk_costs_nothing(tmp_path):
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen([sys.executable, "-c", TALKS, str(tmp_path / "file")], stdout=full, stderr=full) as process,
    ):
        assert process.wait() == 7
    assert (tmp_path / "file").read_text() == "its work"


def test_outputs_that_were_closed_do_not_end_in_a_file_of_ours(tmp_path):
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", TALKS, str(tmp_path / "file")]
    assert finished(shell).returncode == 7
    assert (tmp_path / "file").read_text() == "its work"


def test_what_is_said_arrives(tmp_path):
    done = finished([sys.executable, "-c", TALKS, str(tmp_path / "file")])
    assert done.stdout.splitlines()[-1] == "a line of the command 2999"
    assert done.stderr.splitlines()[-1] == "a line beside it 2999"


STUCK = """
import os, sys, threading, torch
from concurrent.futures import ThreadPoolExecutor
from fastbeit.process import leave
torch.set_num_threads(1)
ones, begun = torch.ones(64, 64), threading.Barrier(3)

def multiply():
    begun.wait()
    while True:
        ones.mm(ones)

for _ in range(2):
    threading.Thread(target=multiply, daemon=True).start()
begun.wait()
pipe = os.pipe()
ThreadPoolExecutor(1).submit(os.read, pipe[0], 1)
{end}
"""


@pytest.mark.parametrize("code", [0, 75])
def test_threads_of_libraries_neither_abort_nor_hold_up_the_end(code):
    """Python ends a thread that asks for it after its end, through the library's own frames, which aborts; it waits for
    a pool's thread that reads what never comes. The first was seen of gloo's threads."""
    done = finished([sys.executable, "-c", STUCK.format(end=f"leave({code})")])
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"), [(["--version"], 0, ""), (["pretrian"], 2, "pretrian"), (["index"], 2, "usage")]
)
def test_the_command_ends_with_its_code(args, code, said):
    done = finished([sys.executable, "-m", "fastbeit", *args])
    assert done.returncode == code and said in done.stderr
