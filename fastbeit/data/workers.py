"""Batches and other items made by processes of their own, in order; they end with the training process.

Whatever becomes of a worker, the training process hears of it where it asks for the next item, as a `RunError`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import DataLoader, Dataset

from fastbeit.cores import num_cores
from fastbeit.errors import CANNOT_WRITE, RunError, WorkerError

# what reaches every process of a terminal or of a job; the training process decides what it means
OF_ALL = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_END = object()
DYING_S = 10  # that a process takes at most from the end of its connections to its own
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class _Answers(Dataset):
    """Hands items over as bytes, or their errors.

    An exception would reach the training process as the text of a traceback. What the queue's own thread cannot send,
    because no shared memory is left, would never reach it: the item is made ready here, its tensors in shared memory.
    """

    def __init__(self, items: Dataset) -> None:
        self.items = items

    def __getitem__(self, key: Any) -> bytes | RunError:
        try:
            return bytes(ForkingPickler.dumps(_made(self.items, key)))
        except RunError as err:
            return err
        except Exception as err:
            if _is_of_handing_over(err):
                return _no_handing_over(err)
            return RunError(f"what a data worker made cannot be handed over: {err!r}; please report it")


def _made(items: Dataset, key: Any) -> Any:
    try:
        return items[key]
    except RunError:
        raise
    except Exception as err:
        traceback.print_exc()
        raise RunError(f"data of {key} cannot be made, {type(err).__name__}: {err}; please report it") from err


def load_items(items: Dataset, keys: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """The item of each key, in order, made by processes of their own.

    Raises:
        RunError: of an item, as it is; no shared memory for it (74).
        WorkerError: a worker has died.
    """
    # more processes than cores would only take turns
    num_workers = min(num_workers, num_cores())
    if not num_workers:
        for key in keys:
            yield _made(items, key)
        return
    loader = DataLoader(
        _Answers(items),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        prefetch_factor=2,
    )
    others = {*multiprocessing.active_children()}
    # this function alone holds the iterator: however it ends, the workers end with it
    answers = _start(loader)
    workers = [*{*multiprocessing.active_children()} - others]
    try:
        while (item := _next(answers, workers)) is not _END:
            if isinstance(item, RunError):
                raise item
            yield item
    finally:
        # all at once: one that reads from a disk that does not answer would hold up the others' end
        for worker in workers:
            worker.terminate()
        del answers  # now, and not when an error that holds this frame is forgotten


def _start(loader: DataLoader) -> Iterator[Any]:
    if not _hears_signals():
        return iter(loader)
    # workers are born with signals held back, until they know what to make of them
    on_death, mask = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, OF_ALL)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # PyTorch's own would raise in the middle of a step, and lose it
        signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)


def _next(answers: Iterator[Any], workers: Sequence[BaseProcess]) -> Any:
    """The next item, or its error, or `_END`. An error is no exception: that would hold the iterator, by this frame."""
    try:
        with _deaths_heard_of(workers):
            answer = next(answers, _END)
            # its tensors are fetched from the worker
            return pickle.loads(answer) if isinstance(answer, bytes) else answer
    except (RunError, RuntimeError, OSError, EOFError) as err:
        # PyTorch makes an error of its own of what is raised while it waits; a connection ends before its process does
        if isinstance(err, OSError | EOFError):
            ending = wait([worker.sentinel for worker in workers], DYING_S)
            for worker in (worker for worker in workers if worker.sentinel in ending):
                worker.join(DYING_S)
        if death := _death(workers):
            return death
        return _no_handing_over(err) if _is_of_handing_over(err) else WorkerError(f"data workers: {err!r}")


@contextlib.contextmanager
def _deaths_heard_of(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """A worker's death raises at once inside this context, also in a call that waits."""
    if not _hears_signals():
        yield
        return
    before = signal.signal(signal.SIGCHLD, lambda *_: _raise_death(workers))
    try:
        _raise_death(workers)
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _hears_signals() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _raise_death(workers: Sequence[BaseProcess]) -> None:
    if death := _death(workers):
        raise death


def _death(workers: Sequence[BaseProcess]) -> RunError | None:
    """What became of a worker that did not end as it should."""
    for code in (worker.exitcode for worker in workers):
        if code == -getattr(signal, "SIGBUS", 0):
            return _no_handing_over("a worker got a bus error")
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            return WorkerError(
                f"a data worker {how}: most likely memory ran out; take fewer workers, or give the job more memory"
            )
    return None


def _is_of_handing_over(err: Exception) -> bool:
    # "/torch_": how PyTorch names its files of shared memory, where the error has no other words for it
    return any(words in str(err) for words in ("shared memory", "/torch_", "Too many open files"))


def _no_handing_over(why: object) -> RunError:
    told = str(why).splitlines()[0]
    if "Too many open files" in told:
        found, remedy = "data workers may open too few files", "raise `ulimit -n`"
    else:
        found, remedy = "/dev/shm is too small for the batches of data workers", "--shm-size=8g for a container"
    return RunError(f"{found}: {remedy}, or take no workers (data.num_workers=0) ({told})", CANNOT_WRITE)


def _begin_worker(parent: int, worker: int) -> None:
    for number in OF_ALL:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # also one that hangs in a read, which would never look
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(0)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey, args=[parent], daemon=True).start()


def _obey(parent: int) -> None:
    """End by a SIGTERM of the training process, and of nobody else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
