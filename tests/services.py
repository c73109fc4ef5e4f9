"""A service in a thread of this process, on a loopback address."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tarq_jax.serving.client import Client
from tarq_jax.serving.http.options import Limits, Options
from tarq_jax.serving.http.running import Server
from tarq_jax.serving.http.service import Service

TOKEN = "a-token"
PATIENT = Options(  # refuses no request for its time, even on a busy machine
    limits=Limits(history=8, candidates=40, top_k=20, seconds=30.0), budget=30.0, batch_sizes=(1, 3),
    candidate_sizes=(512,))


class Asked(NamedTuple):
    """The response of a service."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    """A running service."""

    url: str
    server: Server

    @property
    def service(self) -> Service:
        return self.server.app.state.service

    def client(self, **options: Any) -> Client:
        return Client(self.url, **options)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Asked:
        """Sends one request; a dict or list is sent as JSON, bytes and iterators of bytes unchanged."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Asked(answer.status, {name.lower(): value for name, value in answer.headers.items()},
                         answer.read())

    def metric(self, name: str, **labels: str) -> float:
        """The current value of a metric."""
        return self.server.app.state.metrics.registry.get_sample_value(name, labels) or 0.0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Blocks the thread that computes scores."""
        go_on = threading.Event()
        self.service.executor.submit(go_on.wait)
        try:
            yield
        finally:
            go_on.set()


@contextlib.contextmanager
def running(artefact: Path, options: Options = PATIENT) -> Iterator[Running]:
    """A service of an artefact, after warm-up or after it has given up."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(artefact, options, log_requests=True)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    found = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    try:
        wait_for(lambda: server.should_exit or found.metric("tarq_swaps_total", result="taken"))
        yield found
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Waits until the condition holds."""
    for _ in range(round(100 * seconds)):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError(f"nothing within {seconds} seconds")
