"""Sending to clients that may not read: bodies in parts, and whether the client reads at all."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BUFFER_BYTES = 32 * 2**10
"""Bytes of a response that wait in this process, and unsent in the system. The rest is written when
the client has read."""

CHECKS = 4
"""How often within its limit a client is checked."""


class SendProgress:
    """Watches that a client takes what is sent to it.

    Args:
        limit_s: seconds after which a client has taken nothing of what waits, or does not let a
            closed connection end.
        on_stuck: called then.

    Attributes:
        since: when a check last found that the client had taken something.
    """

    def __init__(
        self, transport: asyncio.Transport, limit_s: float, on_stuck: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._on_stuck = on_stuck
        self._loop = asyncio.get_running_loop()
        self._bytes = 0  # at the last check
        self.since = self._loop.time()
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._check()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait in this process, or in the system until the client's has taken them."""
        return self._transport.get_write_buffer_size() + _queued(self._transport)

    def progressed(self) -> None:
        """Take note that the client has read; what waits may be as much as before."""
        self._bytes = 0

    def stop(self) -> None:
        """Check no more."""
        self._timer.cancel()

    def _check(self) -> None:
        now, waiting = self._loop.time(), self.waiting_bytes
        stuck = waiting == self._bytes and (waiting > 0 or self._transport.is_closing())
        if not stuck:
            self._bytes, self.since = waiting, now
        self._timer = self._loop.call_later(self._limit_s / CHECKS, self._check)
        if stuck and now - self.since >= self._limit_s:
            self._timer.cancel()
            self._on_stuck()


def _queued(transport: asyncio.Transport) -> int:
    """Bytes in the system that the client's has not confirmed; 0 where it does not tell."""
    connected = transport.get_extra_info("socket")  # none under TLS once the client has gone
    if fcntl is None or connected is None:
        return 0
    answer = bytearray(4)
    try:
        fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, answer)
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


async def in_parts(
    app: Any, scope: Any, receive: Any, send: Callable[..., Awaitable[None]]
) -> None:
    """An ASGI application whose long bodies are sent in parts, the next when one was taken."""

    async def send_parts(message: Any) -> None:
        body = message.get("body", b"")
        last = max(0, len(body) - 1) // BUFFER_BYTES * BUFFER_BYTES
        for start in range(0, last, BUFFER_BYTES):
            part = body[start : start + BUFFER_BYTES]
            await send({**message, "body": part, "more_body": True})
        await send({**message, "body": body[last:]} if last else message)

    await app(scope, receive, send_parts)
