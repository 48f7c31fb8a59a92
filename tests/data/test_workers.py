"""Processes that make batches: whatever becomes of one is heard of, at once, where the next item is asked for."""

import os
import resource
import signal
import subprocess
import sys
from multiprocessing import active_children

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from fastbeit.data.workers import load_items
from fastbeit.errors import DataError, RunError, WorkerError
from fastbeit.train.stop import Stop
from helpers.waiting import PATIENCE_S, started

if not hasattr(signal, "SIGCHLD"):
    pytest.skip("Windows ends processes otherwise", allow_module_level=True)


class Items(Dataset):
    """Makes an item of its key, by a function."""

    def __init__(self, make) -> None:
        self.make = make

    def __getitem__(self, key):
        return self.make(key)


def items(make, num_workers: int = 1, count: int = 8):
    return load_items(Items(make), range(count), num_workers)


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert not active_children()


def workers_of(loader) -> list:
    """Its processes, once the first item is there."""
    before = {*active_children()}
    next(loader)
    return [*{*active_children()} - before]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_items_come_in_order_and_errors_as_they_are(num_workers):
    assert [*items(lambda key: torch.full((3,), key), num_workers)][7].tolist() == [7, 7, 7]

    def gone(key):
        if key == 2:
            raise DataError("the disk is gone")
        return key

    found = items(gone, num_workers)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(DataError, match="^the disk is gone$") as caught:
        next(found)
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_ours_is_one_line_and_its_traceback_is_told(num_workers, capfd):
    with pytest.raises(RunError, match="^data of 0 cannot be made, ZeroDivisionError: .*; please report it$"):
        next(items(lambda key: 1 / key, num_workers))
    assert "in <lambda>" in capfd.readouterr().err


def test_a_worker_that_is_killed_is_heard_of_by_who_waits():
    def fall(key):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match="a data worker was killed by signal 9: most likely memory ran out"):
        next(items(fall))


def test_a_worker_that_is_killed_does_not_break_a_step():
    """PyTorch raises wherever the main thread is."""
    loader = items(lambda key: key)
    (worker,) = workers_of(loader)
    before = signal.getsignal(signal.SIGCHLD)
    worker.kill()
    worker.join()  # the handler would raise here
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(WorkerError, match="killed by signal 9"):
        list(loader)


def test_no_shared_memory_is_said_and_not_waited_for():
    def large(key):
        # as where /dev/shm is full: its file cannot have the size that is wanted
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return torch.zeros(10_000)

    with pytest.raises(
        RunError, match=r"^/dev/shm is too small .*: --shm-size=8g .*\(data.num_workers=0\) \("
    ) as caught:
        next(items(large))
    assert caught.value.exit_code == 74


def test_what_cannot_be_handed_over_is_said():
    with pytest.raises(RunError, match=r"^what a data worker made cannot be handed over: .*; please report it$"):
        next(items(lambda key: lambda: key))


def test_too_few_files_are_said():
    def many(key):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        return torch.zeros(10)

    with pytest.raises(RunError, match=r"too few files: raise `ulimit -n`, or take no workers"):
        next(items(many))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_the_wait_for_a_worker_that_hangs(tmp_path, number):
    """As on a disk that does not answer; the worker ends too."""
    os.mkfifo(tmp_path / "pipe")

    def hang(key):
        os.kill(os.getppid(), number)
        return (tmp_path / "pipe").read_bytes()

    loader = items(hang)
    with Stop() as stop:
        assert [*stop.until_wanted(loader)] == [] and stop.wanted


def test_signals_to_the_whole_group_are_the_trainer_s():
    loader = items(lambda key: key)
    (worker,) = workers_of(loader)
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert [*loader] == [*range(1, 8)]


HANGS = """
import os, sys
from fastbeit.data.workers import load_items

class Items:
    def __getitem__(self, key):
        print(os.getpid(), flush=True)
        return open(sys.argv[1]).read()

next(load_items(Items(), range(9), 1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_worker_that_hangs_ends_with_a_killed_trainer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGS, str(tmp_path / "pipe")]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs([worker], timeout=PATIENCE_S)
        for one in alive:
            one.kill()
    assert not alive
