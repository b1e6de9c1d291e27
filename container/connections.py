"""How long a connection may stay without a request, and what is said when there are too many."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0  # what a phone on a bad line needs many times over
TOLD_EVERY_S = 10.0
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = structlog.get_logger()


class Connection(H11Protocol):
    """HTTP/1.1 over a connection that is closed where a header is not whole in time.

    It has `HEADER_S` from the opening of the connection, or from its own first bytes on one that was kept. uvicorn's
    own limit is for connections that were answered and then sent nothing at all.
    """

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._close_after(HEADER_S)

    def data_received(self, data: bytes) -> None:
        """Waits no more where a request has begun to be answered; else until a time that later bytes do not move."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stay_open()
        elif self._closing is None:
            header_begun = self.conn.trailing_data[0]  # else it was the rest of a body that nobody read
            self._close_after(HEADER_S if header_begun else self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._stay_open()
        super().connection_lost(exc)

    def _close_after(self, limit_s: float) -> None:
        self._closing = self.loop.call_later(limit_s, self.timeout_keep_alive_handler)

    def _stay_open(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


class TooManyConnections:
    """An event loop's exception handler: tells now and then that no connection can be accepted.

    The loop itself writes a traceback for each attempt, thousands a second.
    """

    def __init__(self) -> None:
        self._silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tells of what the loop met."""
        failure = context.get("exception")
        if not (isinstance(failure, OSError) and failure.errno in EXHAUSTED and "socket" in context):
            loop.default_exception_handler(context)
        elif loop.time() >= self._silent_until:
            self._silent_until = loop.time() + TOLD_EVERY_S
            log.error("accept_failed", reason=str(failure))
