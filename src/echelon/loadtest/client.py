"""The HTTP client of a load test, and the requests and answers of each dialect.

Dialects are written from the client's side, without the server's code: they work with the original
servers too, and a mistake of ours is not made twice. Only this module knows the HTTP client.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp

from echelon.errors import InvalidInput
from echelon.messages import Message, tr, translated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echelon.loadtest.summary import Kind

Fields = dict[str, Any]
Writer = Callable[[str, Sequence[str]], Fields]


@dataclass(frozen=True, slots=True)
class ClientProtocol:
    """One dialect.

    Attributes:
        name: as ``--dialect`` takes it.
        model: the model that clients usually name; None leaves it out.
        write: the body's fields for a query and its documents, without the model.
        results: the answer's field with the results; None: the answer is the list itself.
        score: a result's field with the score.
    """

    name: str
    path: str
    model: str | None
    write: Writer
    results: str | None
    score: str

    def body(self, query: str, documents: Sequence[str], model: str | None = None) -> bytes:
        """The body of a request."""
        named = model or self.model
        fields = {} if named is None else {"model": named}
        return json.dumps(fields | self.write(query, documents), ensure_ascii=False).encode()

    def check(self, answer: bytes, documents: int) -> str | None:
        """The problem of an answer; None if it scores each document once, with a finite number."""
        try:
            found = json.loads(answer)
        except ValueError:
            return Message("loadtest.not_json")
        rows = found
        if self.results is not None:
            rows = found.get(self.results) if isinstance(found, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            named = Message("loadtest.no_list_named", {"name": repr(self.results)})
            return named if self.results else Message("loadtest.no_list")
        if len(rows) != documents:
            values = {"results": len(rows), "documents": documents}
            return Message("loadtest.other_count", values)
        indices = [row.get("index") for row in rows]
        if any(type(i) is not int for i in indices) or set(indices) != set(range(documents)):
            return Message("loadtest.wrong_indices")
        scores = [row.get(self.score) for row in rows]
        if not all(type(score) in {int, float} and math.isfinite(score) for score in scores):
            return Message("loadtest.wrong_score", {"name": repr(self.score)})
        return None


def _fields(query: str = "query", documents: str = "documents", **fixed: Any) -> Writer:
    """Fields for a query and its documents under these names, and fixed ones."""
    return lambda text, texts: {query: text, documents: list(texts), **fixed}


def _nim(query: str, documents: Sequence[str]) -> Fields:
    passages = [{"text": document} for document in documents]
    return {"query": {"text": query}, "passages": passages, "truncate": "END"}


_COHERE = _fields()
_COHERE_V1 = _fields(return_documents=False)
_INFINITY = _fields(return_documents=False, raw_scores=False)
_VOYAGE = _fields(return_documents=False, truncation=True)
_TEI = _fields(documents="texts", truncate=True, raw_scores=False, return_text=False)
_VLLM_SCORE = _fields("text_1", "text_2")

_SCORE = "relevance_score"

_ALL = (
    ClientProtocol("cohere", "/v2/rerank", "rerank-v3.5", _COHERE, "results", _SCORE),
    ClientProtocol("cohere-v1", "/v1/rerank", "rerank-v3.5", _COHERE_V1, "results", _SCORE),
    ClientProtocol(
        "jina", "/v1/rerank", "jina-reranker-v2-base-multilingual", _COHERE_V1, "results", _SCORE
    ),
    ClientProtocol("tei", "/rerank", None, _TEI, None, "score"),
    ClientProtocol("vllm", "/rerank", None, _COHERE, "results", _SCORE),
    ClientProtocol("vllm-score", "/score", None, _VLLM_SCORE, "data", "score"),
    ClientProtocol("infinity", "/rerank", "default/not-specified", _INFINITY, "results", _SCORE),
    ClientProtocol("voyage", "/v1/rerank", "rerank-2.5", _VOYAGE, "data", _SCORE),
    ClientProtocol(
        "nim", "/v1/ranking", "nvidia/llama-3.2-nv-rerankqa-1b-v2", _nim, "rankings", "logit"
    ),
)

CLIENT_PROTOCOLS: dict[str, ClientProtocol] = {protocol.name: protocol for protocol in _ALL}


def protocol_of(name: str) -> ClientProtocol:
    """A dialect by its name; :class:`InvalidInput` where there is none of that name."""
    if name not in CLIENT_PROTOCOLS:
        remedy = tr("Use one of {names}.", names=", ".join(CLIENT_PROTOCOLS))
        raise InvalidInput("--dialect", tr("{value} is unknown", value=repr(name)), remedy)
    return CLIENT_PROTOCOLS[name]


KEEP_ALIVE_S = 4.0
"""Seconds after which an idle connection is not used again: usual servers close theirs after 5 s,
and a request sent at that moment would be lost through no fault of theirs."""

REFUSED = {429, 503}

MAX_IDLE_PROBES, PAUSE_S = 20, 0.5

MAX_CHARACTERS = 200
"""Characters of a server's message that are repeated."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test.

    Attributes:
        url: address of the route.
        model: the model's name in requests; None is the dialect's usual name.
        timeout_s: seconds after which a request has failed.
        max_connections: maximum open connections; 0 means one for each request.
    """

    url: str
    protocol: ClientProtocol
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0
    max_connections: int = 0


class Reply(NamedTuple):
    """The outcome of one request.

    Attributes:
        status: HTTP status; 0 where there was none.
        detail: the problem, for people.
        own_fault: whether this machine could not send it.
    """

    kind: Kind
    status: int = 0
    detail: str = ""
    own_fault: bool = False


_LOGIN = re.compile(r"[^/?#]*//[^/?#]*@")


def route_of(url: str, protocol: ClientProtocol, path: str | None = None) -> str:
    """The address of the route: ``url`` itself where it ends with the path, else both joined.

    Raises:
        InvalidInput: no address over HTTP, or one with a password.
    """
    if _LOGIN.match(url):
        problem = tr("holds a name or password, which every result would show")
        raise InvalidInput("URL", problem, tr("Send them in a --header."))
    remedy = tr("Give an address such as http://localhost:8080.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        problem = tr("{url} is not an address ({error})", url=repr(url), error=error)
        raise InvalidInput("URL", problem, remedy) from error
    if parts.scheme not in {"http", "https"}:
        problem = tr("{url} does not begin with http:// or https://", url=repr(url))
        raise InvalidInput("URL", problem, remedy)
    if not parts.hostname or port == 0:
        raise InvalidInput("URL", tr("{url} names no host or no port", url=repr(url)), remedy)
    if parts.query or parts.fragment:
        raise InvalidInput("URL", tr("{url} has a query or a fragment", url=repr(url)), remedy)
    wanted = protocol.path if path is None else f"/{path.lstrip('/')}"
    base = url.rstrip("/")
    return base if path is None and base.endswith(wanted) else base + wanted


class Client:
    """Reused connections to a target, as an asynchronous context."""

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

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, body: bytes, documents: int) -> Reply:
        """Send one request and check its answer; never raises for anything that a server does."""
        if self._session is None:
            raise RuntimeError("the client is not open. This is a bug.")
        try:
            async with self._session.post(
                self.target.url, data=body, allow_redirects=False
            ) as response:
                status, answer = response.status, await response.read()
        except TimeoutError:
            seconds = f"{self.target.timeout_s:g}"
            return Reply("timeout", 0, Message("loadtest.timeout", {"seconds": seconds}))
        except (aiohttp.ClientError, OSError) as error:
            return _failed(error)
        if status != 200:  # noqa: PLR2004 - HTTP's own
            kind: Kind = "refused" if status in REFUSED else "error"
            return Reply(kind, status, _detail(status, answer))
        wrong = self.target.protocol.check(answer, documents)
        return Reply("answered", status) if wrong is None else Reply("wrong", status, wrong)


def _detail(status: int, answer: bytes) -> str:
    message = " ".join(answer.decode("utf-8", "replace").split())
    if not message:
        return Message("loadtest.status", {"status": status})
    values = {"status": status, "message": message[:MAX_CHARACTERS]}
    return Message("loadtest.status_with_message", values)


def _failed(error: aiohttp.ClientError | OSError) -> Reply:
    number = getattr(error, "errno", None)
    if number in {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS}:
        detail = Message("loadtest.own_fault", {"error": str(error)})
        return Reply("error", 0, detail, own_fault=True)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        values = {"error": str(error.certificate_error)}
        return Reply("error", 0, Message("loadtest.certificate", values))
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Reply("error", 0, Message("loadtest.unknown_host"))
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return Reply("error", 0, Message("loadtest.closed_early"))
    if isinstance(error, aiohttp.ClientConnectorError):
        return Reply("error", 0, error.os_error.strerror or str(error.os_error))
    return Reply("error", 0, str(error) or type(error).__name__)


async def check_target(client: Client, body: bytes, documents: int) -> None:
    """Send one request before all others, so that a wrong address is reported at once.

    A server that is full or slow is not an error: the test itself shows it.

    Raises:
        InvalidInput: the server cannot be reached, or does not speak the dialect.
    """
    reply = await client.send(body, documents)
    url, name, why = client.target.url, client.target.protocol.name, translated(reply.detail)
    if reply.kind == "error" and reply.status == 0:
        remedy = tr("Start the server, or check scheme, host and port.")
        if "certificate" in reply.detail:
            remedy = tr("Let SSL_CERT_FILE name the certificate of its authority.")
        problem = tr("{url} cannot be reached: {why}", url=url, why=why)
        raise InvalidInput("URL", problem, remedy)
    if reply.kind == "wrong":
        problem = tr("{url} does not answer as {name} does: {why}", url=url, name=name, why=why)
        raise InvalidInput("URL", problem, tr("Check --dialect."))
    if reply.kind == "error":
        problem = tr("{url} answers {why}", url=url, why=why)
        raise InvalidInput("URL", problem, _remedy(reply.status))


def _remedy(status: int) -> str:
    match status:
        case 401 | 403:
            return tr("Put its key into the environment as ECHELON_API_KEY, or use --header.")
        case 404 | 405:
            return tr("Check the address, --dialect and --path; some servers want their --model.")
        case 400 | 413 | 422:
            return tr("Check --dialect, --model, --documents and --tokens.")
        case _:
            return tr("See the server's log.")


def _raise_file_limit() -> None:
    """Raise the limit of open connections as far as allowed; the usual 1,024 are too few."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


async def wait_until_idle(
    client: Client, body: bytes, documents: int, *, within_s: float, stop: asyncio.Event
) -> None:
    """Send one request at a time until an answer comes in time: the server's queue is empty.

    It stops after :data:`MAX_IDLE_PROBES` requests: the next run shows the problem.
    """
    loop = asyncio.get_running_loop()
    for _ in range(MAX_IDLE_PROBES):
        if stop.is_set():
            return
        began = loop.time()
        reply = await client.send(body, documents)
        took_s = loop.time() - began
        if reply.kind == "answered" and took_s <= within_s:
            return
        await asyncio.sleep(PAUSE_S)
