"""How long requests wait before the event loop notices them."""

import asyncio
from collections import deque

PERIOD = 0.01  # seconds between samples
SAMPLES = 5  # latest samples, of which the smallest counts: a single pause is not a backlog


class Lag:
    """Watches the event loop that it is made in.

    Attributes:
      seconds: how late events in this loop are handled at present.
    """

    def __init__(self) -> None:
        """Starts watching."""
        self.seconds = 0.0
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Stops watching."""
        self._task.cancel()

    async def _watch(self) -> None:
        loop, samples = asyncio.get_running_loop(), deque([0.0], SAMPLES)
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            samples.append(max(loop.time() - due, 0.0))
            self.seconds = min(samples)
