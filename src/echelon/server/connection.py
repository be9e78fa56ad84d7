"""An HTTP connection: what a client may send and must read, in which time; wrong input gets JSON.

uvicorn waits without limit for the first byte of a connection, for the rest of headers that have
begun, and for a client that does not read. It keeps trailers of any size, loses the body of a
request that asks for another protocol, and does not answer a client that has ended its sending.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from echelon.server.refusals import response
from echelon.server.sending import SendProgress, in_parts

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import Callable

    from echelon.server.limits import ServerLimits
    from echelon.server.refusals import Reason

logger = logging.getLogger(__name__)

LINGER_S = 2.0
"""Seconds after its response until the connection of a client that still sends is closed, unless
the client closes first. Closed at once, the client's system would drop the unread response."""

PIPELINED = 32
"""Requests that may wait behind another of their connection. A packet can hold thousands."""

MAX_HEADERS = 256
"""Headers of a request; browsers send some thirty. Each takes 150 bytes of memory and more."""

SMALL_CHUNK_BYTES = 64
CHUNKS = 1000
"""Chunks of a body that may be small; of the others, the average may not be. Each costs the time of
a call, and a packet can hold tens of thousands."""

PATIENCE_S = 1.0
"""Seconds that the server waits for a client before the connection may make room for another."""

TURNED_AWAY = 64
"""Connections beyond the maximum that get a response at a time; others are closed at once."""

PROBES_S = (0.05, 0.15, 1.0)
"""Seconds after the client's end of sending at which it is written to, see :meth:`eof_received`."""

TOO_MANY = "This server has reached its maximum of connections. Try later."


@dataclass(frozen=True, slots=True)
class Shared:
    """What the connections of a server share."""

    limits: ServerLimits
    on_refused: Callable[[Reason], None]
    tls: ssl.SSLContext | None = None
    turned_away: set[Connection] = field(default_factory=set)


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits.

    The time for headers counts from the start of the connection, and for later requests from their
    first byte; further bytes do not extend it.

    Attributes:
        opening: the task that does the handshake.
        cut_off: whether it was ended before its response was written.
    """

    def __init__(self, shared: Shared, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.app = partial(in_parts, self.app)
        self.opening: asyncio.Task[None] | None = None
        self.cut_off = False
        self._shared = shared
        self._limits = shared.limits
        self._ended = False
        self._refusal = b""  # the response to what cannot be read, until it is written
        self._waiting_since = self.loop.time()  # for the client: handshake, headers or body
        self._in_headers = True
        self._chunks = self._body_bytes = 0
        self._unread_bytes = 0  # received since headers or a part of a body were complete
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._sending: SendProgress  # since the connection is open

    # Called by the listener.

    def enter(self) -> bool:
        """Count the new connection; False if it is one too many that must be closed at once."""
        if len(self.connections) < self._limits.max_connections or self._displace():
            self.connections.add(self)
            return True
        if self._shared.tls is None and len(self._shared.turned_away) < TURNED_AWAY:
            self._shared.turned_away.add(self)
            return True
        self.count("too_many", TOO_MANY)
        return False

    def _displace(self) -> bool:
        """End the connection whose client is waited for longest, so that silent ones block none."""
        ours = (other for other in self.connections if isinstance(other, Connection))
        longest = min(ours, key=lambda other: other.waiting_since)
        if self.loop.time() - longest.waiting_since < PATIENCE_S:
            return False
        longest.count("displaced", "Its client was waited for, and its place was needed.")
        longest.leave()
        longest.abort()
        return True

    def leave(self) -> None:
        """Stop to count the connection."""
        self.connections.discard(self)
        self._shared.turned_away.discard(self)

    def count(self, reason: Reason, words: str) -> None:
        """Count and log that the server ends the connection."""
        self._shared.on_refused(reason)
        logger.info("Connection ended: %s", words, extra={"fields": {"reason": reason}})

    # Called by the transport and the application.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for headers, unless there are too many connections."""
        super().connection_made(transport)
        self._sending = SendProgress(transport, self._limits.send_timeout_s, self._stuck)
        if self in self._shared.turned_away:
            self.connections.discard(self)
            self._refuse("too_many", TOO_MANY)
        else:
            self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of one or more requests."""
        if self._ended:
            return
        self._unset_keepalive_if_required()
        self._unread_bytes += len(data)
        if self._in_headers:
            self._start_header_timer()
        self._parse(data)
        if self._unread_bytes > self._limits.max_header_bytes:
            self._refuse_large()

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio's
        """Close, or answer a whole request first: whether the connection stays open to write.

        A client that has gone and one that only ended its sending look alike. One that has gone
        replies to anything with a reset, which the second write finds; to the others, the interim
        response says nothing (decision 14).
        """
        if self._shared.tls or not self._answering or self.cycle.more_body:
            return False  # TLS cannot be closed by halves here
        self.cycle.keep_alive = False
        for delay_s in PROBES_S:
            self.loop.call_later(delay_s, self._probe)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers: the client has gone."""
        self.leave()
        self._sending.stop()
        for timer in (self._header_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Give a client that goes on to send a body which was not read two seconds to end it."""
        self._waiting_since = self.loop.time()
        last = not self.pipeline
        super().on_response_complete()
        if self._refusal and last:
            self._respond()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._body_timer = self.loop.call_later(LINGER_S, self._end)

    def resume_writing(self) -> None:
        """Go on with a response: the client has read."""
        self._sending.progressed()
        super().resume_writing()

    # Called by the server and by other connections.

    @property
    def waiting_since(self) -> float:
        """When the server began to wait for the client; infinite while it waits for the server."""
        if self.waits:
            return math.inf
        reading = self._answering and self.cycle.response_started
        return self._sending.since if reading else self._waiting_since

    @property
    def waits(self) -> bool:
        """Whether a whole request waits for the begin of its response."""
        return self._answering and not (self.cycle.more_body or self.cycle.response_started)

    @property
    def owes(self) -> bool:
        """Whether the response to a whole request is not yet sent."""
        begun = self._answering and self.cycle.response_started
        return self.waits or begun or self._sending.waiting_bytes > 0

    def shutdown(self) -> None:
        """End after the response that is due, or now."""
        if self.opening is not None:
            self.abort()
        elif self._ended and not self._refusal:
            self.transport.close()
        else:
            super().shutdown()
            if self.transport.is_closing() and not self.owes:  # TLS waits for the client's end
                self.loop.call_later(LINGER_S, self.transport.abort)

    def abort(self) -> None:
        """Disconnect at once."""
        if self.opening is not None:
            self.opening.cancel()
        if self.transport is not None:
            self.cut_off = self.cut_off or self.owes
            self.transport.abort()

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Start the timer of a request, which may follow directly behind another."""
        self._stop_parser_if_ended()
        self._start_header_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; behind a body they are trailers, which no client of ours needs."""
        self._stop_parser_if_ended()
        if not self._in_headers:
            self._refuse("trailers", "The body has trailers. Send it without.")
        elif len(self.headers) >= MAX_HEADERS:
            self._refuse("large_headers", f"There are more than {MAX_HEADERS} headers.")
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Pass the request on, unless its headers are too long."""
        if self.parser.should_upgrade():
            return
        self._stop_header_timer()
        self._waiting_since = self.loop.time()
        self._in_headers = False
        self._unread_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse_large()
        elif len(self.pipeline) >= PIPELINED:
            words = f"More than {PIPELINED} requests were sent ahead. Wait for responses."
            self._refuse("pipelined", words)
        elif not self._ended:
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Refuse a body of many small chunks."""
        self._stop_parser_if_ended()
        self._chunks += 1
        if self._chunks > CHUNKS + self._body_bytes // SMALL_CHUNK_BYTES:
            self._refuse("small_chunks", "The body has too many small chunks. Send larger ones.")

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body on."""
        self._unread_bytes = 0
        self._body_bytes += len(body)
        if not self._ended:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the headers of the next request."""
        if self.parser.should_upgrade():
            return
        self._in_headers = True
        self._chunks = self._body_bytes = self._unread_bytes = 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if not self._ended:
            super().on_message_complete()

    def _stop_parser_if_ended(self) -> None:
        if self._ended:
            raise EOFError("nothing more is read from this connection")

    def _parse(self, data: bytes) -> None:
        while data and not self._ended:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError as error:
                self._refuse("malformed", f"This is no valid HTTP/1.1 ({error}).")
            else:
                return

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request as it would be without ``Upgrade``, which we ignore, and what follows it.

        The parser takes all that follows the headers for the other protocol. Some clients ask for
        HTTP/2 in this way and send their request as HTTP/1.1 (Java's, ``curl --http2``).
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse("malformed", "CONNECT is for proxies, and this server is none.")
            return b""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % line for line in self.headers if line[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", rest])

    # Timers and refusals.

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._too_slow)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stuck(self) -> None:
        if self._sending.waiting_bytes:
            seconds = self._limits.send_timeout_s
            self.count("slow_reader", f"The client has read nothing for {seconds:g} s.")
        self.abort()

    def _too_slow(self) -> None:
        seconds = self._limits.header_timeout_s
        self._refuse(
            "slow_headers", f"The headers did not arrive within {seconds:g} s (header_timeout_s)."
        )

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _probe(self) -> None:
        """Write what a client ignores that waits for its response."""
        due = self._answering and not self.cycle.response_started and not self.pipeline
        if due and not self.transport.is_closing() and self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse_large(self) -> None:
        limit = self._limits.max_header_bytes
        self._refuse("large_headers", f"The headers are longer than {limit} bytes (max_header_kb).")

    def _refuse(self, reason: Reason, words: str) -> None:
        """Read no more; respond without the application, behind the responses that are due."""
        if self._ended:
            return
        self._ended = True
        self._stop_header_timer()
        self.count(reason, words)
        self._refusal = response(reason, words)
        in_body = self._answering and self.cycle.more_body
        if in_body and self.pipeline:
            self.pipeline.popleft()  # this request, which has not begun
        elif in_body and not self.cycle.response_started:
            self.cycle.disconnected = True
            self.cycle.message_event.set()  # tells the application
            self._respond()
        elif not self._answering:
            self._respond()

    def _respond(self) -> None:
        refusal, self._refusal = self._refusal, b""
        if not self.transport.is_closing():
            self.transport.write(refusal)
            self._end()

    def _end(self) -> None:
        """Ignore further data; close when the client closes, at the latest after two seconds."""
        self._ended = True
        self._stop_header_timer()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
