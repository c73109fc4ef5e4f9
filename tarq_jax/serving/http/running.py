"""Runs the application on a socket until a signal ends it."""

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn

from tarq_jax.serving.http.app import make_app
from tarq_jax.serving.http.logs import log
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.http.protocol import Protocol

KEEP_ALIVE = 75  # seconds; longer than proxies before a service usually keep idle connections
LAST = 1.0  # seconds that a thread has for its work after all requests have been answered
SWITCH = 0.001  # seconds a thread may hold the interpreter: loading a version must not delay requests


class Server(uvicorn.Server):
    """A server that answers for a while after SIGTERM, and ends with exit code 0 instead of by the signal.

    Attributes:
      app: the application that it runs.
      failure: the error of the first artefact, if this was refused.
    """

    def __init__(self, artefact: Path, options: Options, *, drain: float = 0.0, log_requests: bool = False):
        """Takes arguments as `serve` does; listens only when it runs."""
        app = make_app(artefact, options, on_failure=self.fail, log_requests=log_requests)
        super().__init__(uvicorn.Config(
            app, http=Protocol, lifespan="on", ws="none", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(options.limits.seconds) + 1))
        self.failure: Exception | None = None
        self.app, self._drain, self._end = app, drain, math.inf
        self._signal: int | None = None

    def fail(self, error: Exception) -> None:
        """Makes the server end, since there is nothing to serve."""
        self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal; uvicorn's own handler would let the signal end the process after the shutdown."""
        if self._signal is not None:  # ends without waiting for loading or computing: nothing has to be saved
            log("ends", signal=signal.Signals(sig).name)
            os._exit(0)
        self._signal = sig

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; uvicorn asks ten times a second."""
        if self._signal is not None and not self.app.state.draining:
            self.app.state.draining = True
            self._end = time.monotonic() + (self._drain if self._signal == signal.SIGTERM else 0.0)
            log("drains", signal=signal.Signals(self._signal).name)
        return await super().on_tick(counter) or time.monotonic() >= self._end


def serve(artefact: Path, options: Options, listener: socket.socket, *, drain: float,
          log_requests: bool) -> None:
    """Serves until a signal arrives, and `drain` seconds longer if it is SIGTERM.

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
    _leave()


def _leave() -> None:
    """Ends the process if a thread still loads or computes: Python would wait for it, perhaps for minutes."""
    others = [thread for thread in threading.enumerate()
              if thread is not threading.current_thread() and not thread.daemon]
    for thread in others:
        thread.join(LAST)
    if any(thread.is_alive() for thread in others):
        logging.shutdown()
        os._exit(0)  # nothing has to be saved
