"""The HTTP server process: address, TLS, signals and a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from echelon.errors import InvalidInput
from echelon.server.app import make_app
from echelon.server.connection import TURNED_AWAY, Connection, Shared
from echelon.server.listener import Acceptor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.server.context import ServerContext

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than the idle timeout of usual load balancers (60 s), so that they never send a request
into a connection that is being closed."""

OTHER_FILES = 64 + TURNED_AWAY
"""Open files besides connections, with a reserve: pipes and sockets of workers, standard streams,
files of the log and the event loop, and connections that get the answer that there are too many."""

GRACE_S = 5
"""Seconds after the drain for workers to end and responses to be written."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen (port 0 takes a free one), and PEM files of a certificate and its key."""

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None

    def bind(self) -> socket.socket:
        """Bind a socket that does not listen: connections are refused until the model is loaded."""
        bound = None
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, where = found[0]
            bound = socket.socket(family, kind, protocol)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
        except OSError as error:
            if bound is not None:
                bound.close()
            problem = f"{self.host}:{self.port} cannot be used ({error.strerror})"
            raise InvalidInput("--port", problem, "Choose another.") from None
        return bound

    def tls_context(self) -> ssl.SSLContext | None:
        """The certificate and its key, read and checked; None without."""
        if self.certificate is None:
            if self.key is not None:
                raise InvalidInput("--tls-key", "has no certificate", "Give --tls-cert too.")
            return None
        for flag, path in (("--tls-cert", self.certificate), ("--tls-key", self.key)):
            if path is not None:
                try:
                    Path(path).read_bytes()
                except (OSError, ValueError) as error:
                    # The name is not shown: it may be the key itself, given in its place.
                    words = getattr(error, "strerror", None) or "no file can have this name"
                    problem = f"cannot be used ({words})"
                    raise InvalidInput(flag, problem, "Name a file in PEM.") from None
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            # Without a password OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise self._unusable(error) from None
        return context

    def _unusable(self, error: ssl.SSLError) -> InvalidInput:
        """Name the wrong file, as far as OpenSSL reports it."""
        cert, key = self.certificate, self.key or self.certificate
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"{key} is not the key of {cert}"
            return InvalidInput("--tls-key", problem, "Give the one it was made with.")
        words = error.reason or "no certificate or key in PEM, or the key is encrypted"
        problem = f"{cert} with {key} cannot be used ({words})"
        remedy = "Give PEM files of a certificate and its key, without a password."
        return InvalidInput("--tls-cert", problem, remedy)


class HttpServer(uvicorn.Server):
    """uvicorn, which logs its address and exits with code 0 after a graceful shutdown.

    uvicorn itself raises the signal again after the drain, so that the exit code reports a failure,
    and cuts the connections of requests that are late.
    """

    def __init__(
        self, config: uvicorn.Config, context: ServerContext, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(config)
        self.unread = 0  # responses that were not sent since their clients did not read
        self._context = context
        self._shared = Shared(context.limits, context.connection_refused, tls)
        self._listeners: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the model, then listen."""
        await super().startup([])  # it would not count connections whose handshake goes on
        self._context.metrics.watch_connections(self.server_state.connections)
        make = partial(
            Connection,
            self._shared,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._listeners = [Acceptor(bound, self._shared, make) for bound in sockets or ()]
        if sockets:
            host, port = sockets[0].getsockname()[:2]
            scheme = "https" if self._shared.tls else "http"
            url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            logger.info("Serving at %s (open it to try); the API is described at %s/docs", url, url,
                        extra={"fields": {"url": url}})  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer admitted requests within the time to drain."""
        for listener in self._listeners:
            listener.close()
        ours = {c for c in self.server_state.connections if isinstance(c, Connection)}
        ending = asyncio.create_task(self._end_after_drain(ours))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            self.unread = sum(connection.cut_off for connection in ours)

    async def _end_after_drain(self, ours: set[Connection]) -> None:
        """Disconnect clients that send or read too slowly; waiting requests get 503."""
        await asyncio.sleep(self._context.limits.drain_s)
        for connection in ours.intersection(self.server_state.connections):
            if not connection.waits:
                connection.abort()
        await asyncio.gather(self._context.end_now(), asyncio.sleep(GRACE_S))
        for connection in ours.intersection(self.server_state.connections):
            connection.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C start the shutdown; a second Ctrl-C makes it immediate."""
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(context: ServerContext, address: Address, *, exposed: bool) -> None:
    """Serve until SIGTERM or Ctrl-C; log a warning if the address is exposed to other machines.

    Raises:
        InvalidInput: the address or the certificate cannot be used.
        EchelonError: the service could not start.
    """
    tls = address.tls_context()
    bound = address.bind()
    if exposed:
        logger.warning("%s", _warning(context, address))
    raise_file_limit(context.limits.max_connections)
    config = uvicorn.Config(
        make_app(context),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(context.limits.drain_s) + 2 * GRACE_S,
    )
    server = HttpServer(config, context, tls)
    try:
        server.run(sockets=[bound])
    except SystemExit:  # uvicorn's way to report a failed start
        if context.failure is None:
            raise
    finally:
        bound.close()
        if context.traces is not None:
            context.traces.close()
    if context.failure is not None:
        raise context.failure
    _log_end(context.late, server.unread)


def _log_end(late: int, unread: int) -> None:
    """Log whether all accepted requests were answered."""
    if not late and not unread:
        logger.info("Ended; all requests were answered.")
        return
    logger.warning(
        "Ended; %d requests got 503 because --drain-s was over, and %d responses were not sent "
        "because their clients did not read them.",
        late,
        unread,
        extra={"fields": {"late": late, "unread": unread}},
    )


def raise_file_limit(connections: int) -> None:
    """Raise the limit of open files to what connections need, or raise InvalidInput."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if resource.RLIM_INFINITY in (soft, hard) or needed <= soft:
        return
    if needed > hard:
        problem = f"{connections} connections need {needed} open files, the limit is {hard}"
        remedy = "Lower it, or raise the limit (ulimit -n)."
        raise InvalidInput("--max-connections", problem, remedy)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _warning(context: ServerContext, address: Address) -> str:
    words = f"Listening on {address.host}: other machines may reach this server"
    if not len(context.access.keys):
        words += ", and no API key is needed (--api-keys)"
    if context.access.hosts.names is None:
        words += "; requests for any host name are answered (--allowed-hosts)"
    if address.certificate is None:
        words += "; connections are not encrypted (--tls-cert)"
    return f"{words}."
