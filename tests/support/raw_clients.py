"""Clients that speak HTTP byte by byte, over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time

from served import ASKED
from services import GUARD_S

BODY = json.dumps(ASKED).encode()
START = "POST /v1/rerank HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
HEAD = f"{START}Content-Length: {len(BODY)}\r\n".encode()
WHOLE = HEAD + b"\r\n" + BODY


@contextlib.contextmanager
def client_of(server, window: int | None = None):
    """A connection; ``window`` is how many bytes its system takes that are not read."""
    with socket.socket() as client:
        client.settimeout(GUARD_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if window is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        client.connect(("127.0.0.1", server.port))
        yield client


def answer(client) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status(reply: bytes) -> int:
    return int(reply.split()[1]) if reply else 0


def one_answer(client) -> bytes:
    """One answer off a connection that stays."""

    def more() -> bytes:
        part = client.recv(65536)
        assert part, "the server has closed the connection"
        return part

    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += more()
    head, _, body = reply.partition(b"\r\n\r\n")
    (length,) = [ln for ln in head.lower().split(b"\r\n") if ln.startswith(b"content-length")]
    while len(body) < int(length.split()[1]):
        body += more()
    return head + b"\r\n\r\n" + body


def until(condition) -> None:
    guard = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < guard
        time.sleep(0.005)
