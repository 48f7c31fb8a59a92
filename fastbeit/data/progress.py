"""How far a job is."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SAY_EVERY_S = 10.0
T = TypeVar("T")


def reported(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The same items, and how many of them are done: a bar, or lines after 1, 3, 7 seconds and then every 10."""
    is_watched, pause_s = sys.stderr.isatty(), 1.0
    began = said = time.perf_counter()
    for done, item in enumerate(tqdm(items, what, total, leave=False, dynamic_ncols=True, disable=not is_watched), 1):
        yield item
        now = time.perf_counter()
        if not is_watched and now - said > pause_s:
            said, pause_s = now, min(2 * pause_s, SAY_EVERY_S)
            left = tqdm.format_interval((now - began) / done * (total - done))
            print(f"{what}: {done:,} of {total:,}  ETA {left}", file=sys.stderr, flush=True)


class Progress:
    """A bar with img/s and the time left, or a line now and then where no terminal looks on."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.total, self.first, self.done, self.bad = total, done, done, 0
        self.began = self.said = time.perf_counter()
        self.bar = tqdm(
            total=total, initial=done, desc=what, unit="img", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, num_images: int, num_bad: int) -> None:
        self.done, self.bad = self.done + num_images, self.bad + num_bad
        self.bar.set_postfix(bad=self.bad, refresh=False)
        self.bar.update(num_images)
        now = time.perf_counter()
        if self.bar.disable and now - self.said > SAY_EVERY_S:
            self.said = now
            rate = (self.done - self.first) / (now - self.began)
            left = tqdm.format_interval((self.total - self.done) / rate)
            print(
                f"{self.done:,}/{self.total:,} img  {self.bad:,} bad  {rate:.0f} img/s  ETA {left}",
                file=sys.stderr,
                flush=True,
            )
