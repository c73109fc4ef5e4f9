"""The ASGI application."""

import asyncio
import contextlib
import importlib.resources
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tarq_jax.serving.http.logs import log
from tarq_jax.serving.http.metrics import Metrics
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.http.service import HANDLERS, Json, Service

PAGE = importlib.resources.files(__package__).joinpath("page.html").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
ROUTES = {
    "/score": ("POST", Service.score), "/swap": ("POST", Service.swap), "/healthz": ("GET", Service.healthz),
    "/readyz": ("GET", Service.readyz), "/metrics": ("GET", Service.metrics),
    "/openapi.json": ("GET", Service.openapi)}
PROBES = {"/healthz", "/readyz", "/metrics"}  # counted, not logged: monitors ask for them all the time


async def page(request: Request) -> Response:
    """GET /."""
    return HTMLResponse(PAGE, headers={"content-security-policy": POLICY})


def make_app(
    artefact: Path, options: Options, *, on_failure: Callable[[Exception], None] | None = None,
    log_requests: bool = False,
) -> Starlette:
    """An application that loads and warms `artefact` when it starts; /readyz says when it is ready.

    When its `state.draining` is set, /readyz answers 503 and connections are closed after their next answer.

    Args:
      artefact: folder of the artefact; /swap names other folders beside it.
      options: see `Options`.
      on_failure: called with the error if the first artefact is refused. If None, the start waits until the
        artefact is loaded, and fails with the error.
      log_requests: whether to log a line for each request that is not a probe.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service = app.state.service = Service(artefact.absolute().parent, options, metrics)

        async def first() -> None:
            try:
                await service.load(artefact)
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(error)

        loading = asyncio.create_task(first())
        try:
            if on_failure is None:
                await loading
            yield
        finally:
            loading.cancel()
            service.close()

    def handler(answer: Callable[[Service, Request], Awaitable[Response]]
                ) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            return await answer(request.app.state.service, request)

        return call

    routes = [Route(path, handler(answer), methods=[method]) for path, (method, answer) in ROUTES.items()]
    app = Starlette(routes=[Route("/", page), *routes], lifespan=lifespan, exception_handlers=HANDLERS,
                    middleware=[Middleware(Observed, log_requests=log_requests)])
    app.state.metrics, app.state.draining = metrics, False
    return app


class Observed:
    """Middleware that counts and logs answers, gives each an id, and turns unexpected errors into a 500."""

    def __init__(self, app: ASGIApp, log_requests: bool):
        """Wraps `app`."""
        self._app, self._log = app, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles an ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        state, name = scope["app"].state, uuid.uuid4().hex

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                if state.draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            log("error", logging.ERROR, exc_info=error, request=name, path=scope["path"])
            if status:
                raise
            await Json({"error": f"internal error, request {name}"}, 500)(scope, receive, observed)
        path = scope["path"] if scope["path"] in ROUTES or scope["path"] == "/" else "other"
        state.metrics.request(path, status)
        if self._log and path not in PROBES:
            log("request", request=name, method=scope["method"], path=path, status=status,
                ms=round(1e3 * (time.perf_counter() - start), 2),
                version=scope.get("state", {}).get("version"))
