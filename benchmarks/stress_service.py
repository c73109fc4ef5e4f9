"""Artefacts and services for a stress test, and the actions on a service."""

import http.client
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.serving_contenders import Contender
from benchmarks.stress_report import BUSY, REFUSED
from tarq_jax.data import Dataset
from tarq_jax.serving import build
from tarq_jax.serving.artefact import read_index, write_index
from tarq_jax.serving.client import Client, Unavailable, Wrong
from tarq_jax.serving.index import remove
from tarq_jax.serving.method import Method
from tarq_jax.serving.vectors import Storage

TOKEN = "stress"
MEMORY = "process_resident_memory_bytes"  # its name in /metrics
SWAPS = (  # one after the other
    {"artefact": "2"},  # retrained
    {"artefact": "1", "index": "index-1"},  # another model and index
    {"artefact": "1"},  # only another index
    {"artefact": "damaged"},  # refused
    {"artefact": "3"},  # other programs, which must be compiled
)
READY = 120.0  # seconds that a start may take

# Each must be refused with a status from 400 to 499 and an error that says what is wrong.
HOSTILE: tuple[tuple[str, bytes], ...] = (
    ("no JSON", b"{"), ("no object", b"[1, 2]"), ("nothing", b""), ("no UTF-8", b"\xff\xfe"),
    ("history is text", b'{"history": "x"}'), ("ids are text", b'{"history": {"item_id": ["a"]}}'),
    ("id is no integer", b'{"history": {"item_id": [1.5]}}'),
    ("NaN", b'{"history": {"item_id": [NaN]}}'), ("unknown field", b'{"history": {"colour": [1]}}'),
    ("huge id", b'{"history": {"item_id": [99999999999999999999999]}}'),
    ("top_k is 0", b'{"history": {"item_id": [1]}, "top_k": 0}'),
    ("top_k is huge", b'{"history": {"item_id": [1]}, "top_k": 1000000000}'),
    ("history too long", b'{"history": {"item_id": [' + b"1," * 20_000 + b"1]}}"),
    ("too many candidates", b'{"history": {"item_id": [1]}, "candidates": [' + b"1," * 100_000 + b"1]}"),
    ("deeply nested", b"[" * 100_000),
)


class Outcome(NamedTuple):
    """The outcome of an action on a service."""

    detail: str
    outcome: str
    fine: bool  # whether this is the right outcome


def write_artefacts(contender: Contender, dataset: Dataset, folder: Path, history: int) -> None:
    """Writes `1`, `2` (other weights), `3` (half the bytes), `index-1` (no item 1) and `damaged`."""
    method = contender.method
    versions: dict[str, tuple[Method, Storage]] = {
        "1": (method, "float32"), "2": (trained_anew(method), "float32"), "3": (method, "bfloat16"),
        "damaged": (method, "float32")}
    for name, (served, vectors) in versions.items():
        (folder / name).mkdir(parents=True)
        build.write(served, dataset, folder / name, histories=(history,), vectors=vectors)
    (folder / "index-1").mkdir()
    write_index(remove(read_index(folder / "1" / "index"), [1]), folder / "index-1")
    with (folder / "damaged" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")


def trained_anew(method: Method) -> Method:
    """The same method with other weights, as after another day of training."""
    def other(weights: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * 1.01 if leaf.dtype.kind == "f" else leaf, weights)

    return method._replace(user_weights=other(method.user_weights), item_weights=other(method.item_weights),
                           encode_weights=other(method.encode_weights))


class Service:
    """A service in its own process, on loopback; use it as a context manager."""

    def __init__(self, folder: Path):
        """Starts it on artefact `1` in the folder, with default settings, and waits until it is ready.

        Raises:
          OSError: the process ended, or did not become ready.
        """
        self._folder, self._printed = folder, folder / "stderr"
        (folder / "token").write_text(TOKEN)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> float:
        """Starts the process; returns the seconds until it was ready."""
        began = time.perf_counter()
        with self._printed.open("wb") as file:  # a pipe that nobody reads would block the service when full
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tarq_jax.serving.server", f"--artefact={self._folder / '1'}",
                 f"--port={self._port}", f"--token_file={self._folder / 'token'}", "--nolog_requests"],
                stdout=subprocess.DEVNULL, stderr=file)
        while not self._is_ready():
            if not self.alive or time.perf_counter() - began > READY:
                raise OSError(f"the service did not get ready: {self.end()[-500:]}")
            time.sleep(0.05)
        return time.perf_counter() - began

    def _is_ready(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.version())
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def client(self, timeout: float = 10.0) -> Client:
        """A client with the token."""
        return Client(self.url, token=TOKEN, timeout=timeout)

    def memory_mb(self) -> float:
        """Resident memory of the process; nan if the service does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return float("nan")
        finally:
            connection.close()
        return next(float(line.split()[1]) / 1e6 for line in lines if line.startswith(MEMORY))

    def restart(self) -> float:
        """Kills the process with SIGKILL and starts it again; returns the seconds until it was ready."""
        self._process.kill()
        self._process.wait()
        return self.start()

    def end(self) -> str:
        """Sends SIGTERM twice, which skips the draining; returns what the process printed to stderr."""
        for _ in range(2):
            if self.alive:
                self._process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self._printed.read_text(errors="replace")

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def swap(service: Service, number: int) -> Outcome:
    """Asks for the next of `SWAPS`."""
    body = SWAPS[number % len(SWAPS)]
    bad = body["artefact"] == "damaged"
    detail = " with ".join(body.values())
    try:
        with service.client(timeout=READY) as client:
            return Outcome(detail, f"serves {client.swap(**body)['version']}", not bad)
    except Wrong as error:
        return Outcome(detail, f"refused: {str(error)[:80]}", bad)
    except OSError as error:
        return Outcome(detail, str(error)[:80], False)


def send_hostile(service: Service, number: int) -> Outcome:
    """Sends the next of `HOSTILE`; a refusal because the service is busy is right, too."""
    name, body = HOSTILE[number % len(HOSTILE)]
    try:
        with service.client() as client:
            client.post("/score", body)
        return Outcome(name, "answered", False)
    except Wrong as error:
        return Outcome(name, f"{REFUSED}: {str(error)[:80]}", True)
    except Unavailable as error:
        return Outcome(name, BUSY if error.status == 503 else f"status {error.status}", error.status == 503)
    except OSError as error:
        return Outcome(name, repr(error)[:80], False)


def kill(service: Service, number: int) -> Outcome:
    """Ends the process with SIGKILL and starts it again."""
    try:
        return Outcome("SIGKILL", f"ready {service.restart():.1f} s later", True)
    except OSError as error:
        return Outcome("SIGKILL", str(error)[:80], False)


@contextmanager
def repeatedly(action: Callable[[int], None], every: float, most: int | None = None) -> Iterator[None]:
    """Calls the action with 0, 1, ... every `every` seconds in a thread, at most `most` times."""
    stop = threading.Event()

    def work() -> None:
        for number in itertools.count() if most is None else range(most):
            if stop.wait(every):
                return
            action(number)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            future.result()
