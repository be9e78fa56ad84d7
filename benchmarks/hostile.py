"""Hostile clients: bodies that cost more than they weigh, broken HTTP, connections that only stay.

Used by attacks.py, fuzz.py, soak.py and by the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    import ssl
    import subprocess
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import TextIO

    Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MEGABYTE = 10**6
PATIENCE_S = 60.0
"""Seconds for which a client waits for anything."""

OK = 200
TRUE_5XX = {503, 504, 507}
"""Statuses of a server that says truly that it is full, late, or out of memory."""

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def port_of(server: subprocess.Popen[Any], log: TextIO) -> int:
    """The port of `echelon serve --port 0`, once its log names it."""
    while server.poll() is None:
        log.seek(0)
        for line in log:
            if '"url"' in line:
                return int(json.loads(line)["url"].rpartition(":")[2])
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the server did not start: {log.read()}")


@dataclass(frozen=True, slots=True)
class Payload:
    """A body, and the path that it is sent to."""

    name: str
    body: bytes
    path: str = "/v1/rerank"


def payloads(scale: int = 1) -> Iterator[Payload]:
    """Bodies that a server must answer or refuse without harm; ``scale`` makes them larger."""

    def rerank(name: str, documents: Any, **more: Any) -> Payload:
        body = {"query": "q", "documents": documents, **more}
        return Payload(name, json.dumps(body, ensure_ascii=False).encode())

    names = [f"n{i}" for i in range(10_000 * scale)]
    yield rerank("one name repeated", [{"a": "x" * 20_000}], rank_fields=["a"] * 20_000 * scale)
    yield rerank("names × documents", [{"n1": "x"}] * 10_000 * scale, rank_fields=names)
    yield rerank("a document of 5 MB", ["rain falls " * (450_000 * scale)])
    yield rerank("documents of 2 MB", ["rain falls " * 180_000] * 3 * scale)
    yield rerank("one word of 5 MB", ["x" * 5 * MEGABYTE * scale])
    yield rerank("spaces", [" " * 5 * MEGABYTE * scale])
    yield rerank("x and spaces", ["x " * 8 * MEGABYTE * scale])
    yield rerank("unknown signs", ["𓀀" * (MEGABYTE * scale)])
    yield rerank("Chinese without spaces", ["天气很好" * (400_000 * scale)])
    yield rerank("a long query", ["x"], query="rain " * (MEGABYTE * scale))
    yield rerank("chunks", ["rain falls " * 450_000], max_tokens_per_doc=10**9 * scale)
    yield rerank("many small documents", ["x"] * 10_000 * scale)
    yield rerank("empty documents", [""] * 3 * MEGABYTE * scale)
    yield rerank("empty lists", [[]] * 3 * MEGABYTE * scale)
    yield rerank("fields", [{f"k{i}": i for i in range(300_000 * scale)}])
    yield rerank("mostly ASCII", ["x" * 20 * MEGABYTE + "🙂"])
    deep = 100_000 * scale
    nested = b'{"query":"q","documents":' + b"[" * deep + b"]" * deep + b"}"
    yield Payload("nested lists", nested)
    number = b'{"query":"q","documents":["x"],"top_n":' + b"9" * MEGABYTE * scale + b"}"
    yield Payload("a long number", number)
    lists = {"text_1": ["x"] * 10_000 * scale, "text_2": ["y"] * 10_000 * scale}
    yield Payload("two lists", json.dumps(lists).encode(), "/score")


def post(path: str, body: bytes, headers: str = "", host: str = "localhost") -> bytes:
    """A request as it goes over the wire; ``headers`` are lines that each end in CRLF."""
    lines = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{headers}"
    return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextlib.asynccontextmanager
async def connection(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Connection]:
    """One connection, which is cut at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchange(port: int, request: bytes, patience_s: float = PATIENCE_S) -> bytes:
    """What a server answers to bytes, until it closes, or until a whole answer has come."""
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with connection(port) as (reader, writer), asyncio.timeout(patience_s):
            writer.write(request)
            while not complete(answer) and (part := await reader.read(2**16)):
                answer += part
    return answer


def is_failure(status: int) -> bool:
    """Whether a status says that the server failed, and not that it is full or late."""
    return status >= 500 and status not in TRUE_5XX  # noqa: PLR2004 - HTTP's own


def complete(answer: bytes) -> bool:
    """Whether an answer has as many bytes as it says."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(found) and length is not None and len(body) >= int(length[1])


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 where there is none."""
    found = _STATUS.match(answer)
    return int(found[1]) if found else 0


# Connections that only stay.


async def silent(_: Connection) -> None:
    """Send nothing."""


async def half_headers(connected: Connection) -> None:
    """Begin headers and never end them."""
    connected[1].write(b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nX-")


async def half_body(connected: Connection) -> None:
    """Announce a body and send a part of it."""
    connected[1].write(post("/v1/rerank", b"x" * 1000)[:-500])


async def unread(connected: Connection) -> None:
    """Ask for large answers and read none of them."""
    connected[0]._transport.pause_reading()  # type: ignore[attr-defined]  # noqa: SLF001 - else asyncio reads on
    connected[1].write(b"GET /pages/plotly.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8)


STAYING: dict[str, Callable[[Connection], Any]] = {
    "silent": silent,
    "half headers": half_headers,
    "half a body": half_body,
    "unread": unread,
}
"""What a client does that then only stays, by its name."""


async def stay(port: int, kind: str, count: int, seconds: float) -> tuple[int, int]:
    """Hold ``count`` connections of a kind for some seconds.

    Returns:
        How many were accepted, and how many of them the server had closed by then.
    """
    async with contextlib.AsyncExitStack() as stack:
        held = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connected = await stack.enter_async_context(connection(port))
                await STAYING[kind](connected)
                held.append(connected)
        await asyncio.sleep(seconds)
        return len(held), sum(await asyncio.gather(*map(closed, held)))


async def closed(connected: Connection) -> bool:
    """Whether the server has closed a connection, of which what has come is read."""
    reader = connected[0]
    with contextlib.suppress(RuntimeError):
        reader._transport.resume_reading()  # type: ignore[attr-defined]  # noqa: SLF001 - see unread
    try:
        async with asyncio.timeout(5):
            while await reader.read(2**20):
                pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


async def endless_trailers(port: int, megabytes: int) -> int:
    """Send a body in chunks and then trailers without end; bytes that the server took."""
    sent, line = 0, b"X-Trailer: " + b"x" * 8000 + b"\r\n"
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with connection(port) as (_, writer), asyncio.timeout(PATIENCE_S):
            head = b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\n"
            head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + b"2\r\n{}\r\n0\r\n")
            while sent < megabytes * MEGABYTE:
                writer.write(line)
                sent += len(line)
                await writer.drain()
    return sent


# Fuzzing: requests that are nearly right.

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**63, -(2**63), 10**400, "", "\u0000", "\ud800", "é" * 300, "🙂",
    [], [None], [[]], [""], ["x", None], {}, {"text": 1}, {"text": "x"}, {"a": {"b": []}}, "-1",
    "NaN", " ", "\u202e", "<script>alert(1)</script>", "../../etc/passwd", "%0a", [1e308] * 3,
)  # fmt: skip
"""Values for fields that do not expect them."""


def often(chance: random.Random, percent: int) -> bool:
    """True in so many of a hundred cases."""
    return chance.randrange(100) < percent


def mutated(example: dict[str, Any], chance: random.Random) -> bytes:
    """A body that differs from an example in a few fields, or in a few bytes."""
    body = json.loads(json.dumps(example))
    for _ in range(chance.randint(1, 3)):
        _change_field(body, chance)
    encoded = json.dumps(body, ensure_ascii=often(chance, 50)).encode("utf-8", "surrogatepass")
    return broken(encoded, chance) if often(chance, 40) else encoded


def _change_field(body: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice([*body, "extra", "top_n", "timeout_ms", "priority", "rank_fields"])
    match chance.randrange(4):
        case 0:
            body.pop(name, None)
        case 1 if isinstance(body.get(name), list) and body[name]:
            body[name][chance.randrange(len(body[name]))] = odd_value(chance)
        case 2 if isinstance(body.get(name), list):
            body[name] = body[name] * chance.choice((2, 50, 3000))
        case _:
            body[name] = odd_value(chance)


def odd_value(chance: random.Random) -> Any:
    """One of the odd values, which may be changed."""
    return copy.deepcopy(chance.choice(ODD_VALUES))


def broken(data: bytes, chance: random.Random) -> bytes:
    """Bytes of which some were changed, removed, repeated, or put in."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randint(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + chance.randint(1, 40)]
            case _:
                changed[at:at] = chance.choice(ODD_BYTES)
    return bytes(changed)


ODD_BYTES = (
    b"\r\n", b"\n", b"\x00", b"\xff\xfe", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b" ",
    b"Content-Length: 5\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"\t", b"0\r\n\r\n",
    b"Content-Encoding: gzip\r\n", b"GET / HTTP/1.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)  # fmt: skip
"""Bytes that mean something to a parser of HTTP."""


def fuzzed(
    examples: list[tuple[str, dict[str, Any]]], chance: random.Random, headers: str = ""
) -> bytes:
    """One request: a body that is nearly right, or HTTP that is nearly right.

    Args:
        examples: paths, each with a body that is right.
        chance: makes every run the same for the same seed.
        headers: lines that every request has.
    """
    path, example = chance.choice(examples)
    if often(chance, 60):
        return post(path, mutated(example, chance), headers)
    request = post(path, json.dumps(example).encode(), f"{headers}X-Request-Timeout-Ms: 5000\r\n")
    if often(chance, 30):
        request = request.replace(path.encode(), chance.choice(ODD_PATHS).encode(), 1)
    return broken(request, chance)


ODD_PATHS = (
    "/", "/health/", "/metrics%0a", "//rerank", "/v1/../v1/rerank", "/docs/assets/../../x", "*",
    "/pages/%2e%2e/app.py", "/v1/rerank?x=%00", "http://localhost/rerank", "/" + "a" * 3000, "/é",
)  # fmt: skip
