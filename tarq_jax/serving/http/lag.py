"""How long requests wait before the event loop notices them."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

PERIOD = 0.01  # seconds between samples
SAMPLES = 5  # latest samples, of which the smallest counts: a single pause is not a backlog


class Lag:
    """Watches the event loop that it is made in.

    Attributes:
      seconds: how late events in this loop are handled at present.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Starts watching; `clock` gives seconds at the pace of the loop's own, see `Batcher`."""
        self.seconds, self._clock = 0.0, clock
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Stops watching."""
        self._task.cancel()

    async def _watch(self) -> None:
        samples = deque([0.0], SAMPLES)
        while True:
            due = self._clock() + PERIOD
            await asyncio.sleep(PERIOD)
            samples.append(max(self._clock() - due, 0.0))
            self.seconds = min(samples)
