"""One way in which all ranks end a look, however each of them fares."""

import contextlib
from collections.abc import Iterator

from fastbeit.engine.ranks import World
from fastbeit.errors import RunError
from fastbeit.train.stop import Stop, StopWanted


@contextlib.contextmanager
def together(world: World, stop: Stop) -> Iterator[None]:
    """What a rank meets in this context all ranks hear of at its end, before any waits for another.

    Raises:
        StopWanted: a rank was asked to stop.
        RunError: of the first rank that met one.
    """
    error = None
    try:
        with contextlib.suppress(StopWanted), stop.interrupts():
            yield
    except RunError as err:
        error = err
    now = world.agree(stop=stop.wanted, save=False, bad=[], error=error)
    if now.error:
        raise now.error
    if now.stops:
        raise StopWanted
