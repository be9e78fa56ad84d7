"""The HTTP server under the application: its socket, its signals, its end."""

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
from echelon.server.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.server.context import ServerContext

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Idle connections live longer than those of usual load balancers (60 s), so that these never send
a request into a connection that is just being closed."""

OTHER_FILES = 64
"""Files that a server has open besides its connections, with room: pipes and sockets of some
workers, standard streams, the log's and the event loop's own."""

GRACE_S = 5
"""Beyond the time to drain, for workers to end and answers to be written."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Attributes:
        host: an address or a name.
        port: 0 takes a free one.
        certificate: PEM file with the chain; None serves plain HTTP.
        key: PEM file with its private key.
    """

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None

    def bind(self) -> socket.socket:
        """A socket that is taken but does not listen yet.

        Until the model is loaded, connections are refused at once and nobody waits in vain.

        Raises:
            InvalidInput: the address cannot be taken.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, where = found[0]
            taken = socket.socket(family, kind, protocol)
        except OSError as error:
            raise self._refused(error) from None
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(where)
        except OSError as error:
            taken.close()
            raise self._refused(error) from None
        return taken

    def check_certificate(self) -> None:
        """Refuse a certificate that cannot be served with, before anything is loaded.

        Raises:
            InvalidInput: a file is missing, or they do not belong together.
        """
        if self.certificate is None:
            if self.key is not None:
                raise InvalidInput("--tls-key", "has no certificate", "Give --tls-cert too.")
            return
        for flag, path in (("--tls-cert", self.certificate), ("--tls-key", self.key)):
            if path is not None:
                _readable(flag, path)
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except ssl.SSLError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: ssl.SSLError) -> InvalidInput:
        """Which of the two files is wrong, as far as OpenSSL says."""
        cert, key = self.certificate, self.key or self.certificate
        if error.reason == "KEY_VALUES_MISMATCH":
            return InvalidInput(
                "--tls-key", f"{key} is not the key of {cert}", "Give the one it was made with."
            )
        words = error.reason or "no certificate or key in PEM, or the key is encrypted"
        return InvalidInput(
            "--tls-cert",
            f"{cert} with {key} cannot be used ({words})",
            "Give PEM files of a certificate and its key, without a password.",
        )

    def _refused(self, error: OSError) -> InvalidInput:
        where = f"{self.host}:{self.port}"
        return InvalidInput(
            "--port", f"{where} cannot be taken ({error.strerror})", "Choose another."
        )


class HttpServer(uvicorn.Server):
    """uvicorn, which says where it listens and ends well when it is told to end.

    Its own class raises the signal again once it has drained, so that the exit code says failure,
    and cuts the connections of whoever is not done in time.

    Args:
        config: uvicorn's.
        house: what it serves.
    """

    def __init__(self, config: uvicorn.Config, house: ServerContext) -> None:
        super().__init__(config)
        self._house = house

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the model, then listen."""
        await super().startup(sockets)
        self._house.metrics.watch_connections(self.server_state.connections)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            logger.info("Serving at %s (open it to try); the API is described at %s/docs", url, url,
                        extra={"facts": {"url": url}})  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is inside; who is not done when the time to drain is over gets 503."""
        hurrying = asyncio.create_task(self._hurry())
        try:
            await super().shutdown(sockets)
        finally:
            hurrying.cancel()

    async def _hurry(self) -> None:
        await asyncio.sleep(self._house.rules.drain_s)
        await self._house.hurry()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C begin the end; a second Ctrl-C hurries it."""
        kept = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def _readable(flag: str, path: str) -> None:
    try:
        Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(
            flag, f"{path} cannot be used ({error.strerror})", "Name a file in PEM."
        ) from None


def _no_password() -> str:
    """The answer to an encrypted key, which would otherwise ask the terminal."""
    return ""


def run(house: ServerContext, address: Address, *, exposed: bool) -> None:
    """Serve until told to end.

    Args:
        house: what to serve.
        address: where.
        exposed: other machines reach it: say so.

    Raises:
        InvalidInput: the address or the certificate cannot be used.
        EchelonError: why the service could not start.
    """
    address.check_certificate()
    taken = address.bind()
    if exposed:
        logger.warning("%s", _warning(house, address))
    make_room_for(house.rules.limits.max_connections)
    config = uvicorn.Config(
        make_app(house),
        http=partial(  # type: ignore[arg-type]  # uvicorn calls it and asks nothing else of it
            Connection, limits=house.rules.limits, refused=house.connection_refused
        ),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(house.rules.drain_s) + GRACE_S,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    try:
        HttpServer(config, house).run(sockets=[taken])
    except SystemExit:  # uvicorn's word for a failed start
        if house.failure is None:
            raise
    finally:
        taken.close()
        if house.traces is not None:
            house.traces.close()
    if house.failure is not None:
        raise house.failure
    if house.cut_short:
        logger.warning("Ended; --drain-s was over before everyone inside had a result.")
    else:
        logger.info("Ended; everyone inside was answered.")


def make_room_for(connections: int) -> None:
    """Let this process open as many files as its connections need.

    Raises:
        InvalidInput: it may not.
    """
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if resource.RLIM_INFINITY in (soft, hard) or needed <= soft:
        return
    if needed > hard:
        raise InvalidInput(
            "--max-connections",
            f"{connections} need {needed} open files, and this process may have {hard}",
            "Lower it, or raise the limit (ulimit -n).",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _warning(house: ServerContext, address: Address) -> str:
    words = f"Listening on {address.host}: other machines may reach this server"
    if not len(house.rules.keys):
        words += ", and no API key is asked for (--api-keys)"
    if address.certificate is None:
        words += "; what is sent is not encrypted (--tls-cert)"
    return f"{words}."
