"""HTTP with limits for what comes before the body of a request, which the application does not see."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 1 << 16  # most bytes of a request's first line and headers
HEAD_SECONDS = 30.0  # most seconds from a connection, or from a request's first byte, to the end of these


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself takes headers without end and waits for them without end."""

    def __init__(self, *arguments: Any, **settings: Any):
        """Takes arguments as uvicorn gives them."""
        super().__init__(*arguments, **settings)
        self._in_head, self._head = True, 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads bytes; too many before the end of the headers are answered with 400."""
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request has more than {HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """The first byte of a request has arrived."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """The body follows, which the application limits."""
        self._stop()
        self._in_head, self._head = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Another request may follow."""
        self._in_head = True
        super().on_message_complete()

    def _wait(self) -> None:
        self._stop()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
