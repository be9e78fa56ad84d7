"""The only file that knows the HTTP client."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from echelon.stress.ledger import Kind
    from echelon.stress.shapes import Shape

KEEP_ALIVE_S = 4.0
"""A connection idle for longer is not used again: usual servers close theirs after 5 s, and a
request sent into that very moment would be lost through no fault of theirs."""

REFUSED = {429, 503}

MOST_SETTLING, PAUSE_S = 20, 0.5

MOST_WORDS = 200
"""Letters of a server's message that are repeated."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is tested.

    Attributes:
        url: the route.
        shape: the dialect spoken there.
        model: what requests call the model; None is the dialect's usual name.
        headers: sent with each request.
        timeout_s: seconds after which nobody waits for an answer any more.
        max_connections: connections at once; 0 means as many as there are requests.
    """

    url: str
    shape: Shape
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0
    max_connections: int = 0


class Reply(NamedTuple):
    """What became of one request: see :class:`echelon.stress.ledger.Record`.

    Attributes:
        kind: in one word.
        status: HTTP status; 0 where there was none.
        detail: what went wrong, for people.
        own_fault: this machine could not send it.
    """

    kind: Kind
    status: int = 0
    detail: str = ""
    own_fault: bool = False


def route_of(url: str, shape: Shape, path: str | None = None) -> str:
    """The address of the route: ``url`` itself where it ends with the path, else both joined.

    Raises:
        InvalidInput: no address over HTTP.
    """
    told = "Give an address such as http://localhost:8080."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidInput("URL", f"{url!r} is no address ({error})", told) from error
    if parts.scheme not in {"http", "https"}:
        problem = f"{url!r} does not begin with http:// or https://"
        raise InvalidInput("URL", problem, told)
    if not parts.hostname or port == 0:
        raise InvalidInput("URL", f"{url!r} names no host or no port", told)
    if parts.query or parts.fragment:
        raise InvalidInput("URL", f"{url!r} has a query or a fragment", told)
    wanted = shape.path if path is None else f"/{path.lstrip('/')}"
    base = url.rstrip("/")
    return base if path is None and base.endswith(wanted) else base + wanted


class Client:
    """Connections to a target, reused. To be used as an asynchronous context."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        _raise_file_limit()
        target = self.target
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=target.max_connections, keepalive_timeout=KEEP_ALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(total=target.timeout_s),
            headers={**target.headers, "Content-Type": "application/json"},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, body: bytes, documents: int) -> Reply:
        """Send one request and judge its answer; never raises for what a server may do."""
        if self._session is None:
            raise RuntimeError("the client is not open. This is a bug.")
        try:
            async with self._session.post(
                self.target.url, data=body, allow_redirects=False
            ) as response:
                status, answer = response.status, await response.read()
        except TimeoutError:
            return Reply("timeout", 0, f"no answer within {self.target.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return _failed(error)
        if status in REFUSED:
            return Reply("refused", status, _words(status, answer))
        if status != 200:  # noqa: PLR2004 - HTTP's own
            return Reply("error", status, _words(status, answer))
        wrong = self.target.shape.check(answer, documents)
        return Reply("answered", status) if wrong is None else Reply("wrong", status, wrong)


def _words(status: int, answer: bytes) -> str:
    said = " ".join(answer.decode("utf-8", "replace").split())
    return f"status {status}: {said[:MOST_WORDS]}" if said else f"status {status}"


def _failed(error: aiohttp.ClientError | OSError) -> Reply:
    number = getattr(error, "errno", None)
    if number in {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS}:
        told = f"this machine has no more connections ({error})"
        return Reply("error", 0, told, own_fault=True)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Reply("error", 0, f"its certificate is not trusted ({error.certificate_error})")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Reply("error", 0, "its host name is not known")
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return Reply("error", 0, "the connection was closed before the answer")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Reply("error", 0, error.os_error.strerror or str(error.os_error))
    return Reply("error", 0, str(error) or type(error).__name__)


async def try_out(client: Client, body: bytes, documents: int) -> None:
    """One request before all others, so that a wrong address is told at once.

    A server that is full, or slow to load, is not wrong: the test itself will say so.

    Raises:
        InvalidInput: the server cannot be reached, or does not speak the dialect.
    """
    reply = await client.ask(body, documents)
    url, name = client.target.url, client.target.shape.name
    if reply.kind == "error" and reply.status == 0:
        remedy = "Start the server, or check scheme, host and port."
        if "certificate" in reply.detail:
            remedy = "Let SSL_CERT_FILE name the certificate of its authority."
        raise InvalidInput("URL", f"{url} cannot be reached: {reply.detail}", remedy)
    if reply.kind == "wrong":
        problem = f"{url} does not answer as {name} does: {reply.detail}"
        raise InvalidInput("URL", problem, "Check --dialect.")
    if reply.kind == "error":
        raise InvalidInput("URL", f"{url} answers {reply.detail}", _remedy(reply.status))


def _remedy(status: int) -> str:
    match status:
        case 401 | 403:
            return "Put its key into the environment as ECHELON_API_KEY, or use --header."
        case 404 | 405:
            return "Check the address, --dialect and --path; some servers want their --model."
        case 400 | 413 | 422:
            return "Check --dialect, --model, --documents and --tokens."
        case _:
            return "See the server's log."


def _raise_file_limit() -> None:
    """As many open connections as the system grants; the usual limit of 1,024 is soon reached."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def settle(
    client: Client, body: bytes, documents: int, *, within_s: float, stop: asyncio.Event
) -> None:
    """Ask again and again until an answer comes in time: the server's queue is empty again.

    Gives up after :data:`MOST_SETTLING` tries: whatever is wrong, the next run will show it.
    """
    loop = asyncio.get_running_loop()
    for _ in range(MOST_SETTLING):
        if stop.is_set():
            return
        began = loop.time()
        reply = await client.ask(body, documents)
        took_s = loop.time() - began
        if reply.kind == "answered" and took_s <= within_s:
            return
        await asyncio.sleep(PAUSE_S)
