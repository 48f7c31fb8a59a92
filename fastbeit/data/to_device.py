"""Batches on their way to the device that trains: the next is copied while the last is trained on.

The copy goes from pinned memory, by a stream of its own.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbeit.data.batch import Batch

T = TypeVar("T")
MOVED = "images", "token_images", "labels"  # of a batch


def on_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches, on CUDA with views and labels on the device; `sample` and `epoch` stay: the host reads them.

    Two batches are on the device, the one that was given last and the next. Close it, and `batches` is closed.
    """
    if device.type != "cuda":
        try:
            for batch in batches:
                # DALI decodes on a GPU that there is, whoever trains
                yield replace(batch, **{name: getattr(batch, name).cpu() for name in _on_a_gpu(batch)})
        finally:
            batches.close()
        return
    copier = Copier(device)
    try:
        for begun in one_ahead(map(copier.begin, batches)):
            yield copier.end(begun)
    finally:
        batches.close()


def _on_a_gpu(batch: Batch) -> list[str]:
    return [name for name in MOVED if (one := getattr(batch, name)) is not None and one.is_cuda]


def move(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; to CUDA by way of pinned memory, so that nobody waits for the copy."""
    return _pinned(x, device).to(device, non_blocking=True)


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    # the allocator of pinned memory keeps the source until the copy is done
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


class Copier:
    """Copies views by a stream of its own; what `begin` began can be used after `end`, on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            there = {name: self._copy(one) for name in MOVED if (one := getattr(batch, name)) is not None}
            moved, copied = replace(batch, **there), torch.cuda.Event()
            copied.record(self._stream)
        return moved, copied

    def _copy(self, images: Tensor) -> Tensor:
        return images if images.is_cuda else move(images, self._device)  # DALI's lie there already

    def end(self, begun: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, copied = begun
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for images in (getattr(batch, name) for name in MOVED):
            if images is not None:
                # freed while this stream still reads it, its memory must not go to the next copy
                images.record_stream(stream)
        return batch


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Each item, after the next one has been fetched; an error while fetching is raised in that one's turn."""
    iterator, end = iter(items), object()
    item: Any = next(iterator, end)
    while item is not end:
        following, error = end, None
        try:
            following = next(iterator, end)
        except Exception as err:
            error = err
        yield item
        if error is not None:
            raise error
        item = following
