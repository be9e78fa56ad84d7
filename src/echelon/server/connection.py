"""An HTTP connection that is closed when its headers are late or too long.

uvicorn waits without limit for the first byte of a connection, and for the rest of headers that
have begun. A few thousand clients that send a byte a second could hold all connections of a server.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from echelon.server.limits import ServerLimits

logger = logging.getLogger(__name__)

Reason = Literal["too_many", "slow_headers", "large_headers"]

STATUSES: dict[Reason, HTTPStatus] = {
    "too_many": HTTPStatus.SERVICE_UNAVAILABLE,
    "slow_headers": HTTPStatus.REQUEST_TIMEOUT,
    "large_headers": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
}
"""Reasons to refuse a connection, and the status of the response."""

LINGER_S = 2.0
"""Seconds after its response until the connection of a client that still sends is closed, unless
the client closes first. Closed at once, the client's system would drop the unread response."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits.

    The time for headers counts from the start of the connection, and for later requests from their
    first byte; further bytes do not extend it.
    """

    def __init__(
        self,
        *args: Any,
        limits: ServerLimits,
        on_refused: Callable[[Reason], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._on_refused = on_refused
        self._ended = False
        self._in_headers = True
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None

    # Called by the transport and the application.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Accept the connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            words = "This server has reached its maximum of connections. Try later."
            self._refuse("too_many", words)
        else:
            self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of one or more requests."""
        if self._ended:
            return
        if self._in_headers:
            self._header_bytes += len(data)
            self._start_header_timer()
        super().data_received(data)
        if self._in_headers and self._header_bytes > self._limits.max_header_bytes:
            self._refuse_large()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers: the client has gone."""
        self._stop_header_timer()
        if self._body_timer is not None:
            self._body_timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """After a response, give the client two seconds to send the rest of an unread body.

        Without them, a client that wants to reuse the connection would be cut off.
        """
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._body_timer = self.loop.call_later(LINGER_S, self._end)

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Start the timer of a request, which may follow directly behind another."""
        self._start_header_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Pass the request on, unless its headers are too long."""
        self._stop_header_timer()
        self._in_headers = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse_large()
        elif not self._ended:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body on."""
        if not self._ended:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the headers of the next request."""
        self._in_headers = True
        self._header_bytes = 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if not self._ended:
            super().on_message_complete()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._too_slow)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if self._answering:
            self._start_header_timer()  # these are headers of a next request: answer this one first
            return
        seconds = self._limits.header_timeout_s
        self._refuse("slow_headers", f"The headers did not arrive within {seconds:g} s.")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_large(self) -> None:
        limit = self._limits.max_header_bytes
        self._refuse("large_headers", f"The headers are longer than {limit} bytes.")

    def _refuse(self, reason: Reason, words: str) -> None:
        """Respond without the application, and end the connection."""
        self._on_refused(reason)
        logger.info("Connection refused: %s", words, extra={"fields": {"reason": reason}})
        if self._answering:
            self.transport.close()  # a second response must not mix into the first
        else:
            self.transport.write(_response(STATUSES[reason], words))
        self._end()

    def _end(self) -> None:
        """Ignore further data; close when the client closes, at the latest after two seconds."""
        self._ended = True
        self._stop_header_timer()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _response(status: HTTPStatus, words: str) -> bytes:
    body = json.dumps({"message": words, "detail": words}).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["retry-after: 1"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
