"""The batches of a training's steps, alike for all ranks."""

import time
from collections.abc import Iterator

from fastbeit.data.batch import Batch
from fastbeit.engine.ranks import World
from fastbeit.errors import RunError
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.meter import Meter
from fastbeit.train.stop import Stop, StopWanted


class Feed:
    """The batches of the steps, one verdict a step: all ranks have the next one, or end together."""

    def __init__(
        self, batches: Iterator[Batch], world: World, stop: Stop, bad_samples: BadSamples, meter: Meter
    ) -> None:
        self._batches = batches
        self._world = world
        self._stop = stop
        self._bad_samples = bad_samples
        self._meter = meter
        self.save_wanted = False  # by somebody, when the last batch was asked for

    def next(self, error: RunError | None = None) -> Batch | None:
        """This rank's batch of the next step; None: somebody was asked to stop.

        Args:
            error: why this rank cannot go on.

        Raises:
            RunError: a rank cannot go on, has no data (66), too many images are bad (65), a data worker died; on all
                ranks in the same step.
        """
        began = time.perf_counter()
        batch, error = (None, error) if error else self._fetch()
        self._meter.waited(time.perf_counter() - began)
        now = self._world.agree(
            stop=self._stop.wanted, save=self._stop.save_wanted, bad=batch.bad if batch else [], error=error
        )
        self.save_wanted = now.saves
        if now.error:
            raise now.error
        self._bad_samples.add(now.bad)
        return None if now.stops else batch

    def _fetch(self) -> tuple[Batch | None, RunError | None]:
        try:
            # a stop must also end the wait for a disk that does not answer
            with self._stop.interrupts():
                return next(self._batches), None
        except RunError as err:
            return None, err
        except StopWanted:
            return None, None
