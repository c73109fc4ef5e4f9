"""A client of the service that needs only the standard library.

    with Client("http://localhost:8000") as client:
        best = client.score({"history": {"item_id": [17, 4, 256]}}, top_k=500)
"""

import http.client
import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
PATIENCE = 8.0  # seconds, the longest pause between two attempts; up to half of it is added at random


class Answer(NamedTuple):
    """The best candidates of a request, the best first."""

    version: str  # the version that answered
    ids: list[int]
    scores: list[float]
    unknown: list[int]  # candidates that are not served
    skipped: int  # number of history events whose items are unknown


class Wrong(ValueError):
    """The service refused the request as wrong (status 4xx); the message says what is wrong with it."""


class Unavailable(OSError):
    """The service did not answer, although the request may be valid.

    Attributes:
      status: HTTP status.
      retry_after: seconds to wait before another attempt; None if the service does not say.
    """

    def __init__(self, status: int, message: str, retry_after: float | None):
        super().__init__(f"status {status}: {message}")
        self.status, self.retry_after = status, retry_after


class Client:
    """A client with one connection. Use one per thread; close it, or use it as a context manager."""

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 10.0, retries: int = 0):
        """The connection is opened on first use.

        Args:
          url: URL of the service, such as http://localhost:8000.
          token: token that the service requires.
          timeout: seconds of silence from the service after which TimeoutError is raised.
          retries: further attempts if the service is busy (status 503), with growing pauses between them.

        Raises:
          ValueError: `url` is not an HTTP or HTTPS URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in CONNECTIONS or not parts.hostname:
            raise ValueError(f"url is {url!r}, expected http://HOST:PORT or https://HOST:PORT")
        self._connection = CONNECTIONS[parts.scheme](parts.hostname, parts.port, timeout=timeout)
        self._url, self._prefix, self._retries = url, parts.path.rstrip("/"), retries
        self._headers = {"content-type": "application/json"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"

    def score(self, request: Mapping[str, Any], candidates: Sequence[int] | None = None, *,
              top_k: int | None = None) -> Answer:
        """The best candidates of a request, as `tarq_jax.serving.Scorer.score` ranks them.

        The service chooses what is None: it ranks all items, and returns its default number of them.

        Raises:
          Wrong: the request is invalid.
          Unavailable: the service is busy or failed.
          OSError: the service cannot be reached, closed the connection, or is another one.
        """
        asked = {"candidates": candidates, "top_k": top_k}
        return answer_of(self.post("/score", dict(request) | {
            key: value for key, value in asked.items() if value is not None}))

    def swap(self, artefact: str, index: str | None = None) -> dict[str, Any]:
        """Makes the service load another artefact beside its own; returns when that has taken over.

        Raises:
          Wrong: the artefact is refused, and the old one stays in service.
        """
        return self.post("/swap", {"artefact": artefact} | ({"index": index} if index else {}))

    def version(self) -> dict[str, Any]:
        """A description of the version that is served; raises Unavailable while the service is not ready."""
        return self.get("/readyz")

    def wait(self, seconds: float) -> dict[str, Any]:
        """Waits until the service is ready and returns `version`; raises its last error after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self.version()
            except OSError:
                if (left := end - time.monotonic()) <= 0:
                    raise
                time.sleep(min(0.1, left))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path of the service; raises as `score` does."""
        return self._ask("GET", path, None)

    def post(self, path: str, content: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """The answer to `content`, an object or the bytes of its JSON; raises as `score` does."""
        compact = (",", ":")
        body = content if isinstance(content, bytes) else json.dumps(content, separators=compact).encode()
        for attempt in range(self._retries):
            try:
                return self._ask("POST", path, body)
            except Unavailable as error:
                if error.status != 503:
                    raise
                pause = max(error.retry_after or 0.0, 0.05 * 2**attempt)
                time.sleep(min(pause, PATIENCE) * random.uniform(1.0, 1.5))
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        reused = self._connection.sock is not None
        try:
            status, headers, found = self._exchange(method, path, body)
        except ConnectionError:
            if not reused:
                raise
            status, headers, found = self._exchange(method, path, body)  # the old one was closed while idle
        if status == 200:
            return _parsed(found)
        message = _message(found)
        if 400 <= status < 500:
            raise Wrong(message)
        wait = headers.get("retry-after", "")
        raise Unavailable(status, message, float(wait) if wait.isdecimal() else None)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        try:
            self._connection.request(method, self._prefix + path, body, self._headers)
            response = self._connection.getresponse()
            return response.status, response.headers, response.read()
        except http.client.HTTPException as error:
            self._connection.close()
            kind = ConnectionError if isinstance(error, http.client.RemoteDisconnected) else OSError
            raise kind(f"not an answer of HTTP: {error!r}") from None
        except OSError as error:
            self._connection.close()
            raise type(error)(f"{self._url}: {error}") from error

    def close(self) -> None:
        """Closes the connection; the next call opens a new one."""
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answer_of(found: Mapping[str, Any]) -> Answer:
    """The answer in what /score returned; OSError if that is none, as another server may be listening."""
    if found.keys() != set(Answer._fields):
        raise OSError(f"the service answered an object with {sorted(found)}, expected {list(Answer._fields)}")
    return Answer(**found)


def _parsed(found: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(found)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise OSError(f"the service answered {found[:60]!r}, expected a JSON object")
    return parsed


def _message(found: bytes) -> str:
    try:
        return str(json.loads(found)["error"])
    except (ValueError, TypeError, KeyError):
        return found[:200].decode(errors="replace")
