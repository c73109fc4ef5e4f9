"""Runs the application on a socket until a signal ends it."""

import math
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn

from tarq_jax.serving.http.app import make_app
from tarq_jax.serving.http.logs import log
from tarq_jax.serving.http.options import Options

KEEP_ALIVE = 75  # seconds; longer than what usually stands before a service keeps idle connections
SWITCH = 0.001  # seconds a thread may hold the interpreter: loading a version must not hold up requests


class Server(uvicorn.Server):
    """Goes on for a while after SIGTERM, and ends with exit code 0 instead of by the signal.

    Attributes:
      app: what it runs.
      failure: why the first artefact was refused.
    """

    def __init__(self, artefact: Path, options: Options, *, drain: float = 0.0, log_requests: bool = False):
        """As `serve`; listens once it runs."""
        app = make_app(artefact, options, on_failure=self.fail, log_requests=log_requests)
        super().__init__(uvicorn.Config(
            app, lifespan="on", ws="none", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=math.ceil(options.limits.seconds) + 1))
        self.failure: Exception | None = None
        self.app, self._drain, self._end = app, drain, math.inf
        self._signal: int | None = None

    def fail(self, error: Exception) -> None:
        """Ends, since there is nothing to serve."""
        self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come; uvicorn's own way would have it end the process in the end."""
        if self._signal is not None:  # at once, whatever is loaded or computed; there is nothing to save
            log("ends", signal=signal.Signals(sig).name)
            os._exit(0)
        self._signal = sig

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now, asked ten times a second."""
        if self._signal is not None and not self.app.state.draining:
            self.app.state.draining = True
            self._end = time.monotonic() + (self._drain if self._signal == signal.SIGTERM else 0.0)
            log("drains", signal=signal.Signals(self._signal).name)
        return await super().on_tick(counter) or time.monotonic() >= self._end


def serve(artefact: Path, options: Options, listener: socket.socket, *, drain: float,
          log_requests: bool) -> None:
    """Serves until a signal comes, and `drain` seconds longer where it is SIGTERM.

    Raises:
      ValueError: the artefact is refused.
    """
    sys.setswitchinterval(SWITCH)
    server = Server(artefact, options, drain=drain, log_requests=log_requests)
    host, port, *_ = listener.getsockname()
    log("listens", host=host, port=port)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    log("ends")
