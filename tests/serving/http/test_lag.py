"""The lag of an event loop, in virtual time."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

from test_batching import VirtualLoop

from tarq_jax.serving.http.lag import Lag


def test_a_backlog_is_seen_and_a_pause_is_not():
    async def main():
        loop = asyncio.get_running_loop()
        lag = Lag(loop.time)
        await asyncio.sleep(1.0)
        quiet = lag.seconds
        loop.now += 0.5
        await asyncio.sleep(0.02)
        paused = lag.seconds
        for _ in range(40):  # each iteration of the loop takes 50 ms
            loop.now += 0.05
            await asyncio.sleep(0)
        behind = lag.seconds
        await asyncio.sleep(0.1)
        recovered = lag.seconds
        lag.close()
        return quiet, paused, behind, recovered

    loop = VirtualLoop()
    quiet, paused, behind, recovered = loop.run_until_complete(main())
    loop.close()
    assert max(quiet, paused, recovered) < 1e-9 and 0.03 < behind < 0.2
