"""The handlers of a service's requests."""

import asyncio
import gc
import hmac
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tarq_jax.serving.http.batching import Refused, whole_seconds
from tarq_jax.serving.http.lag import Lag
from tarq_jax.serving.http.logs import log
from tarq_jax.serving.http.metrics import Metrics
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.http.queries import NotJson, described, read_query
from tarq_jax.serving.http.versions import NAME, Busy, Version, Versions

FAILURES = 3  # batches in a row that fail, after which the service is not ready
HUNG = 10  # time-outs for which a batch has run when the service no longer counts as alive


class Json(JSONResponse):
    """An answer in JSON; may contain NumPy arrays."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class Service:
    """The handlers of requests and the state that they share; made within a running event loop.

    Attributes:
      root: folder of artefacts that /swap may name.
      executor: the one thread that computes.
      versions: the version that is served, and how it is swapped.
    """

    def __init__(self, root: Path, options: Options, metrics: Metrics):
        """Loads nothing.

        Args:
          root: folder of artefacts that /swap may name.
          options: see `Options`.
          metrics: metrics that it updates.
        """
        self.root, self._options, self._metrics = root, options, metrics
        self.executor = ThreadPoolExecutor(1, "scorer")
        self.versions = Versions(options, metrics, self.executor)
        self._in_flight, self._lag = 0, Lag()

    def close(self) -> None:
        """Lets the threads end, without waiting, and the garbage collector look at all objects again."""
        self._lag.close()
        self.executor.shutdown(wait=False)
        self.versions.close()
        gc.unfreeze()

    async def score(self, request: Request) -> Response:
        """POST /score."""
        self._authorize(request, "/score")
        if self._in_flight >= self._options.queue:  # bodies are held in memory
            self._current().batcher.count()
            raise Refused("full", 1.0)
        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            return await self._score(request)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()

    async def _score(self, request: Request) -> Response:
        arrived = time.monotonic() - self._lag.seconds
        self._current().batcher.check(arrived)  # before the body is read
        body = await self._body(request)
        received = time.monotonic() - self._lag.seconds  # the budget does not count a slow upload
        version = self._current()
        try:
            query = read_query(body, version.scorer.schema, self._options.limits)
        except ValueError as error:
            raise _invalid(error) from None
        try:
            async with asyncio.timeout(arrived + self._options.limits.seconds - time.monotonic()):
                ranking = await version.batcher.submit(query, received)
        except TimeoutError:
            raise HTTPException(504, f"not answered within {self._options.limits.seconds} seconds") from None
        except ValueError as error:  # of this query; an error of a whole batch is no ValueError
            raise _invalid(error) from None
        request.state.version = version.name
        self._metrics.answered(ranking, time.monotonic() - arrived)
        return Json(described(version.name, ranking))

    async def swap(self, request: Request) -> Response:
        """POST /swap."""
        if not self._options.swaps:
            raise HTTPException(403, "this service does not swap, expected another to be deployed")
        if self._options.tokens["/swap"] is None:
            raise HTTPException(403, "the service was started without a token, expected one: --token_file "
                                "or --swap_token_file")
        self._authorize(request, "/swap")
        body = await self._body(request)
        try:
            artefact, index = read_swap(body)
            version = await self.load(self.root / artefact, self.root / index if index else None)
        except (ValueError, OSError) as error:
            raise _invalid(error) from None
        except Busy:
            raise HTTPException(409, "another version is being loaded, expected one at a time") from None
        return Json(version.description)

    async def load(self, artefact: Path, index: Path | None = None) -> Version:
        """`Versions.swap`, counted and logged."""
        start = time.monotonic()
        try:
            version = await self.versions.swap(artefact, index)
        except Busy:
            raise
        except Exception as error:
            self._metrics.swap("refused")
            log("refused version", artefact=artefact, index=index, error=str(error))
            raise
        self._metrics.swap("taken")
        log("serves version", **version.description, largest_batch=version.batcher.largest,
            batch_ms={size: round(1e3 * seconds, 2) for size, seconds in version.seconds.items()},
            budget_ms=round(1e3 * version.batcher.least_budget, 2),
            seconds=round(time.monotonic() - start, 2))
        return version

    async def healthz(self, request: Request) -> Response:
        """GET /healthz."""
        self._check_running(HUNG * self._options.limits.seconds)  # only a restart can help
        return Json({"alive": True})

    async def readyz(self, request: Request) -> Response:
        """GET /readyz."""
        if request.app.state.draining:
            raise HTTPException(503, "the service is about to end")
        await self.check()
        return Json(self._current().description)

    async def check(self) -> None:
        """Raises HTTPException (503) if no version is warm, or the device has failed or hangs."""
        version = self._current()
        self._check_running(self._options.limits.seconds)
        if version.batcher.failures >= FAILURES:
            await self._retry(version)

    def _check_running(self, most: float) -> None:
        running = self.versions.current.batcher.running if self.versions.current else 0.0
        if running > most:
            raise HTTPException(503, f"a batch has run for {running:.1f} seconds, expected at most {most:g}",
                                headers={"retry-after": "1"})

    async def _retry(self, version: Version) -> None:
        """Tries a request of its own, as others may not send any until it is ready; 503 if it fails."""
        try:
            async with asyncio.timeout(self._options.limits.seconds):
                await version.batcher.submit(version.trial)
        except Exception as error:
            raise HTTPException(503, f"at least {FAILURES} batches in a row failed, see the log",
                                headers={"retry-after": "1"}) from error

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return Json(self._current().openapi)

    def _current(self) -> Version:
        version = self.versions.current
        if version is None:
            raise HTTPException(503, "no version is warm yet", headers={"retry-after": "1"})
        return version

    def _authorize(self, request: Request, path: str) -> None:
        token = self._options.tokens[path]
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
            raise HTTPException(401, "the header 'authorization' is missing or wrong, expected 'Bearer' and "
                                "the token", headers={"www-authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits; a body that is too large is not kept."""
        limits = self._options.limits
        declared = request.headers.get("content-length", "")
        received = bytearray()
        try:
            async with asyncio.timeout(limits.seconds):
                async for chunk in request.stream():
                    received += chunk
                    if max(len(received), int(declared) if declared.isdecimal() else 0) > limits.body:
                        raise HTTPException(413, f"body has more than {limits.body} bytes, expected at most "
                                            "as many")
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {limits.seconds} seconds",
                                headers={"connection": "close"}) from None
        return bytes(received)


def read_swap(body: bytes) -> tuple[str, str | None]:
    """The names of an artefact and, if given, of an index in the body of /swap."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise NotJson(f"body cannot be parsed: {error}, expected a JSON object with 'artefact'") from None
    if not isinstance(found, dict):
        raise ValueError(f"body is of type {type(found).__name__}, expected an object with 'artefact'")
    if "artefact" not in found or found.keys() - {"artefact", "index"}:
        raise ValueError(f"body has the keys {str(sorted(found))[:60]}, expected 'artefact' and perhaps "
                         f"'index'")
    for key, name in found.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            shown = repr(name[:60]) if isinstance(name, str) else f"of type {type(name).__name__}"
            raise ValueError(f"{key!r} is {shown}, expected the name of a folder beside the one that is "
                             f"served")
    return found["artefact"], found.get("index")


def _invalid(error: Exception) -> HTTPException:
    return HTTPException(400 if isinstance(error, NotJson) else 422, str(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers requests that the framework or a handler refuses."""
    assert isinstance(error, HTTPException)
    return Json({"error": error.detail}, error.status_code, headers=error.headers)


async def on_refused(request: Request, error: Exception) -> Response:
    """Answers requests that the queue refuses."""
    assert isinstance(error, Refused)
    request.app.state.metrics.refused(error.reason)
    return Json({"error": f"too busy ({error.reason}), try again later"}, 503,
                headers={"retry-after": str(whole_seconds(error.retry_after))})


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client has gone: nobody reads this."""
    return Json({"error": "the client has gone"}, 400)


HANDLERS = {HTTPException: on_http_error, Refused: on_refused, ClientDisconnect: on_disconnect}
