"""How long requests wait before the event loop comes to see them."""

import asyncio
from collections import deque

PERIOD = 0.01  # seconds between samples
SAMPLES = 5  # of which the smallest counts: a pause is no backlog


class Lag:
    """Watches the event loop that it is made in.

    Attributes:
      seconds: by which everything in this loop is late of late.
    """

    def __init__(self) -> None:
        """Starts to watch."""
        self.seconds = 0.0
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Watches no longer."""
        self._task.cancel()

    async def _watch(self) -> None:
        loop, samples = asyncio.get_running_loop(), deque([0.0], SAMPLES)
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            samples.append(max(loop.time() - due, 0.0))
            self.seconds = min(samples)
