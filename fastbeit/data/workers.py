"""Batches and other items made by processes of their own, in order; they end with the training process."""

import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from fastbeit.cores import num_cores
from fastbeit.errors import DataError


class _Answer(Dataset):
    """Hands a `DataError` over as a value: an exception would reach the training process as the text of a traceback."""

    def __init__(self, items: Dataset) -> None:
        self.items = items

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.items[key]
        except DataError as err:
            return err


def load_items(items: Dataset, keys: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """The item of each key, in order, made by processes of their own."""
    # more processes than cores would only take turns
    num_workers = min(num_workers, num_cores())
    loader = DataLoader(
        _Answer(items),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        prefetch_factor=2 if num_workers else None,
    )
    # the loop alone holds the iterator: however it ends, the workers end with it
    for answer in _start(loader):
        if isinstance(answer, DataError):
            raise answer
        yield answer


def _start(loader: DataLoader) -> Iterator[Any]:
    # workers are born with SIGTERM held back, until they know what to make of it
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)
    mask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        return iter(loader)
    finally:
        mask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _begin_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process; the training process decides what they mean
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey, args=[os.getppid()], daemon=True).start()


def _obey(parent: int) -> None:
    """End by a SIGTERM of the training process, and of nobody else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
