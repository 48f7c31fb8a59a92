"""Signals, as wishes that the loop reads."""

import signal
import threading
from typing import Any


class Stop:
    """Signals, as wishes that the loop reads: SIGTERM and SIGINT stop, SIGUSR1 saves."""

    def __init__(self) -> None:
        self.wanted = False
        self.save_wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in self._signals():
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signals(self) -> list[int]:
        # another thread than the main one may not listen, and Windows knows no SIGUSR1
        if threading.current_thread() is not threading.main_thread():
            return []
        return [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]

    def _hear(self, number: int, frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self.wanted and number == signal.SIGINT:
                raise KeyboardInterrupt  # asked twice: now
            self.wanted = True
        else:
            self.save_wanted = True
