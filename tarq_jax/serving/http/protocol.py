"""HTTP with limits for what the application does not see: headers, trailers, and silence."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 1 << 16  # most bytes of a request that are neither answered nor part of its body
HEAD_SECONDS = 30.0  # most seconds for the headers of a request, or for more bytes after an answer


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself takes headers without end and waits for them without end."""

    def __init__(self, *arguments: Any, **settings: Any):
        """Takes arguments as uvicorn gives them."""
        super().__init__(*arguments, **settings)
        self._head = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits as long for the first request as for further ones."""
        super().connection_made(transport)
        self._wait(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads bytes; too many headers or trailers are answered with 400."""
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"Headers have more than {HEAD_BYTES} bytes.")
        answered = self.cycle is not None and self.cycle.response_complete
        if answered and self._late is None and self.timeout_keep_alive_task is None:
            self._wait(HEAD_SECONDS)  # uvicorn waits no longer once a byte has arrived

    def on_message_begin(self) -> None:
        """The first byte of a request has arrived."""
        super().on_message_begin()
        self._wait(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        """From here on, the application counts bytes and seconds."""
        self._stop()
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Bytes of a body are limited by the application."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Another request may follow."""
        self._head = 0
        super().on_message_complete()

    def _wait(self, seconds: float) -> None:
        self._stop()
        self._late = self.loop.call_later(seconds, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
