"""Signal handlers: they set flags that the loop reads, and end a wait for data."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
STOPS = ("SIGTERM", "SIGINT", "SIGHUP")  # a scheduler, Ctrl-C, a terminal that is closed


class StopWanted(BaseException):
    """Ends a wait; see `Stop.interrupts`. No `Exception`: decoders take any of those for a damaged image."""


class Stop:
    """Flags that signals set and the loop reads: SIGTERM, SIGINT and SIGHUP stop, SIGUSR1 saves.

    A SIGHUP that was ignored before stays so: whoever starts a run with `nohup` wants that.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.save_wanted = False
        self._is_waited = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in self._signals():
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Inside this context a stop raises `StopWanted` at once, also in a call that waits."""
        # in this order: a signal between the two must not be missed
        self._is_waited = True
        try:
            if self.wanted:
                raise StopWanted
            yield
        finally:
            self._is_waited = False

    def until_wanted(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to where a stop is wanted; it ends a wait for one too."""
        iterator = iter(items)
        while True:
            try:
                with self.interrupts():
                    item = next(iterator)
            except (StopIteration, StopWanted):
                return
            yield item

    def _signals(self) -> list[int]:
        # another thread than the main one may not listen, and Windows knows no SIGHUP and no SIGUSR1
        if threading.current_thread() is not threading.main_thread():
            return []
        numbers = [getattr(signal, name) for name in (*STOPS, "SIGUSR1") if hasattr(signal, name)]
        return [n for n in numbers if not (_name(n) == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN)]

    def _hear(self, number: int, frame: object) -> None:
        if _name(number) in STOPS:
            if self.wanted and number == signal.SIGINT:
                raise KeyboardInterrupt  # asked twice: now
            self.wanted = True
            if self._is_waited:
                self._is_waited = False
                raise StopWanted
        else:
            self.save_wanted = True


def _name(number: int) -> str:
    return signal.Signals(number).name
