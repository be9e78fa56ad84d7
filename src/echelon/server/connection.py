"""One connection to the server: its headers come in time and in size, or it is closed.

uvicorn waits for ever for the first byte of a connection, and for the rest of headers that have
begun. A few thousand clients that send a byte a second would hold all connections of a server.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

logger = logging.getLogger(__name__)

Reason = Literal["too_many", "slow_headers", "large_headers"]

STATUSES: dict[Reason, HTTPStatus] = {
    "too_many": HTTPStatus.SERVICE_UNAVAILABLE,
    "slow_headers": HTTPStatus.REQUEST_TIMEOUT,
    "large_headers": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
}
"""Why a connection is refused, and the status it gets."""

LINGER_S = 2.0
"""A connection with something still to come is closed this long after its answer, unless the client
closes first: closed at once, the client's system would throw the answer away unread."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may do.

    Attributes:
        max_connections: connections at once. The usual 512 requests inside have one each, and
            half as many may be idle; all are fewer than the 1,024 files that a process may
            usually open.
        header_timeout_s: seconds in which the headers of a request must come.
        max_header_bytes: longest headers, the first line included.
    """

    max_connections: int = 768
    header_timeout_s: float = 10.0
    max_header_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        for name in ("max_connections", "header_timeout_s", "max_header_bytes"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, f"{getattr(self, name)} is not positive", "Give more.")


class Connection(HttpToolsProtocol):
    """uvicorn's connection within limits.

    The time for headers runs from the first moment, and on a connection that is used again from
    the first byte of each request; it does not begin anew with each byte.

    Args:
        *args: uvicorn's.
        limits: what it may do.
        refused: called with why it was refused.
        **kwargs: uvicorn's.
    """

    def __init__(
        self, *args: Any, limits: ConnectionLimits, refused: Callable[[Reason], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._tell = refused
        self._over = False
        self._in_headers = True
        self._header_bytes = 0
        self._due: asyncio.TimerHandle | None = None
        self._rest_due: asyncio.TimerHandle | None = None

    # What the transport and the application tell.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse("too_many", "This server has as many connections as it may. Try later.")
        else:
            self._start_clock()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come, or of several."""
        if self._over:
            return
        if self._in_headers:
            self._header_bytes += len(data)
            self._start_clock()
        super().data_received(data)
        if self._in_headers and self._header_bytes > self._limits.max_header_bytes:
            self._refuse_large()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_clock()
        if self._rest_due is not None:
            self._rest_due.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """A request was answered; a body that is not wanted any more may still come, but soon.

        A client that meant to use the connection again would be hung up on otherwise.
        """
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._rest_due = self.loop.call_later(LINGER_S, self._end)

    # What the parser tells.

    def on_message_begin(self) -> None:
        """A request begins, perhaps right behind the one before."""
        self._start_clock()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The headers are whole: let the request in, unless they are too large."""
        self._stop_clock()
        self._in_headers = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse_large()
        elif not self._over:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body has come."""
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; what comes now is the next one's headers."""
        self._in_headers = True
        self._header_bytes = 0
        if self._rest_due is not None:
            self._rest_due.cancel()
            self._rest_due = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if not self._over:
            super().on_message_complete()

    # Inside.

    def _start_clock(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(self._limits.header_timeout_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _too_slow(self) -> None:
        self._due = None
        if self._answering:
            self._start_clock()  # the headers are a next request's: let this one have its answer
            return
        seconds = self._limits.header_timeout_s
        self._refuse("slow_headers", f"The headers did not come within {seconds:g} s.")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_large(self) -> None:
        most = self._limits.max_header_bytes
        self._refuse("large_headers", f"The headers are longer than {most} bytes.")

    def _refuse(self, reason: Reason, words: str) -> None:
        """Answer without asking the application, and end."""
        self._tell(reason)
        logger.info("Connection refused: %s", words, extra={"facts": {"reason": reason}})
        if self._answering:
            self.transport.close()  # no answer may be mixed into another
        else:
            self.transport.write(_answer(STATUSES[reason], words))
        self._end()

    def _end(self) -> None:
        """Listen to nothing more, and close when the client has, or soon."""
        self._over = True
        self._stop_clock()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _answer(status: HTTPStatus, words: str) -> bytes:
    body = json.dumps({"message": words, "detail": words}).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["retry-after: 1"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
