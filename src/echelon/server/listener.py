"""Accepts connections: counted from then on, also during the TLS handshake, which has a time limit.

uvicorn counts a connection only when its handshake is over, and its event loop may stop to listen
for ever when the process has no file descriptor left.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import TYPE_CHECKING

from echelon.server.sending import BUFFER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.server.connection import Connection, Shared

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait in the system until they are accepted."""

AT_ONCE = 16
"""Connections that are accepted before others have their turn."""

RETRY_S = 0.1
"""Seconds until the next try where the system could not accept a connection."""

TLS_CLOSE_S = 3600.0
"""Seconds for the end of a TLS connection, its last bytes included. Without effect: a connection
watches itself that the client reads, also after its end."""


class Acceptor:
    """Accepts the connections of one socket until it is closed.

    Args:
        bound: the socket, which does not listen yet.
        make: a new connection, not yet open.
    """

    def __init__(
        self, bound: socket.socket, shared: Shared, make: Callable[[], Connection]
    ) -> None:
        self._socket = bound
        self._shared = shared
        self._make = make
        self._opening: set[asyncio.Task[None]] = set()
        bound.settimeout(0)
        # Most of an unread response waits here, where it is seen, and not in the system's memory.
        lowest_unsent = getattr(socket, "TCP_NOTSENT_LOWAT", None)  # Linux and macOS
        if lowest_unsent is not None:
            bound.setsockopt(socket.IPPROTO_TCP, lowest_unsent, BUFFER_BYTES)
        bound.listen(BACKLOG)
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Accept no more connections."""
        self._accepting.cancel()

    async def _accept(self) -> None:
        loop, failing = asyncio.get_running_loop(), False
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._socket)
                self._take(accepted)
                for _ in range(AT_ONCE - 1):
                    self._take(self._socket.accept()[0])
            except BlockingIOError:  # that was all
                failing = False
            except (OSError, MemoryError) as error:  # such as no free file descriptor
                if not failing:
                    logger.warning("No connection can be accepted now: %s.", error)
                failing = True
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(0)  # the others have their turn

    def _take(self, accepted: socket.socket) -> None:
        accepted.settimeout(0)
        connection = self._make()
        if not connection.enter():
            accepted.close()
            return
        opening = asyncio.create_task(self._open(accepted, connection))
        connection.opening = opening
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket, connection: Connection) -> None:
        """Do the TLS handshake if there is one, then begin with HTTP."""
        tls, limit_s = self._shared.tls, self._shared.limits.handshake_timeout_s
        times = {"ssl_handshake_timeout": limit_s, "ssl_shutdown_timeout": TLS_CLOSE_S}
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=tls, **(times if tls else {})
            )
        except ConnectionAbortedError:
            connection.count("slow_handshake", f"The TLS handshake took more than {limit_s:g} s.")
        except ssl.SSLError as error:
            connection.count("bad_handshake", f"The TLS handshake failed ({error.reason}).")
        except OSError:
            pass  # the client has gone
        finally:
            connection.opening = None
            if connection.transport is None:  # uvloop reports no error where the client has gone
                connection.leave()
