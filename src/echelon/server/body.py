"""Bodies of requests: read within their limits, checked before they are decoded, and their memory.

Work on bytes only; :mod:`echelon.server.protocols` gives them a meaning.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import Request

    from echelon.server.limits import ServerLimits

T = TypeVar("T")

SMALL_BYTES = 256 * 2**10
SMALL_OUTLINE = 16 * 2**10
"""A body with at most as many bytes, and as many without its strings and spaces, is parsed on the
event loop, in a few milliseconds. A thread would cost a small request more than others gain."""

SCAN_BYTES = 64 * 2**10
"""Bytes that are scanned at a time, a millisecond or two: other threads take turns in between."""

RETRY_S = 1.0
"""Seconds after which a client may try again when the memory is used up."""


# Memory of all requests.


class BodyMemory:
    """Memory of the bodies, texts and responses of all requests, at most ``max_bodies_mb``.

    Where it is used up, the largest body that is still being read is given up, so that half-sent
    bodies keep out only larger ones.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.used_bytes = 0
        self._limits = limits
        self._lock = Lock()  # bodies are read on the event loop, large ones parsed in a thread
        self._reading: dict[MemoryShare, asyncio.Timeout] = {}

    def share(self) -> MemoryShare:
        """The share of a new request, still empty."""
        return MemoryShare(self)

    def resize(self, share: MemoryShare, size: int) -> None:
        """Give a share another size; see :meth:`MemoryShare.resize`."""
        if size > self._limits.max_bodies_bytes:
            value = f"{size:_} bytes of memory for its texts"
            raise self._limits.exceeded("max_bodies_mb", "body", value)
        if share in self._reading and self._excess(share, size) > 0:
            self._make_room(share, size)
        with self._lock:
            if share.given_up or (size > share.bytes and self._excess(share, size) > 0):
                raise self._limits.full("max_bodies_mb", "memory for bodies and texts", RETRY_S)
            self._set(share, size)

    def begin_reading(self, share: MemoryShare, timer: asyncio.Timeout) -> None:
        """A body is read from now on; the timer is its time limit. Called on the event loop."""
        self._reading[share] = timer

    def end_reading(self, share: MemoryShare) -> None:
        """The body was read."""
        self._reading.pop(share, None)

    def free(self, share: MemoryShare) -> None:
        """Take a share back."""
        with self._lock:
            self._set(share, 0)
            share.given_up = True  # a thread may still parse for a request that was cancelled

    def _excess(self, share: MemoryShare, size: int) -> int:
        return self.used_bytes - share.bytes + size - self._limits.max_bodies_bytes

    def _set(self, share: MemoryShare, size: int) -> None:
        self.used_bytes += size - share.bytes
        share.bytes = size

    def _make_room(self, share: MemoryShare, size: int) -> None:
        """Give up larger bodies that are being read, the largest first."""
        for other in sorted(self._reading, key=lambda one: one.bytes, reverse=True):
            if other.bytes <= size or self._excess(share, size) <= 0:
                return
            timer = self._reading.pop(other)
            if not timer.expired():
                timer.reschedule(0)
            self.free(other)


class MemoryShare:
    """Memory that one request uses; the end of its ``with`` block frees it."""

    __slots__ = ("_memory", "bytes", "given_up")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.bytes = 0
        self.given_up = False

    def resize(self, size: int) -> None:
        """Take as many bytes from now on; from any thread.

        Raises:
            TooLarge: they are more than all requests may have together.
            Overloaded: others use the memory.
        """
        self._memory.resize(self, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._memory.free(self)

    async def read(self, http: Request, limits: ServerLimits) -> bytearray:
        """The whole body of a request.

        Raises:
            TooLarge: it is longer than allowed; what comes after that is not read.
            SlowClient: it did not come in time.
            Overloaded: bodies of other requests use the memory.
            ClientDisconnect: the client went away.
        """
        announced = http.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limits.max_body_bytes:
            raise limits.exceeded("max_body_mb", "body", f"{int(announced):_} bytes")
        body = bytearray()  # not a list of parts: of two bytes each, they would take 40 a part
        try:
            async with asyncio.timeout(limits.body_timeout_s) as timer:
                self._memory.begin_reading(self, timer)
                async for part in http.stream():
                    size = len(body) + len(part)
                    if size > limits.max_body_bytes:
                        raise limits.exceeded("max_body_mb", "body", f"{size:_} bytes or more")
                    self.resize(size)
                    body += part
        except TimeoutError:
            self.resize(self.bytes)  # raises Overloaded where the body was given up
            raise limits.too_slow("body_timeout_s", "The body") from None
        finally:
            self._memory.end_reading(self)
        return body


def return_freed_memory() -> None:
    """Have glibc return large texts to the system when they are freed.

    By default it keeps what a thread frees, up to 64 MiB a thread, once texts of 32 MiB were freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 128 * 2**10)  # glibc's own first value, which now stays


_M_MMAP_THRESHOLD = -3


# Large bodies leave the event loop.


class ParserThread:
    """Parses large bodies in one thread: one after another, so that their memory never adds up."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="echelon-parse")

    async def run(self, body: bytes | bytearray, limits: ServerLimits, parse: Callable[[], T]) -> T:
        """Check the structure of a body and parse it: here if it is small, else in the thread.

        Raises:
            TooLarge: see :func:`check_structure`.
        """
        if len(body) <= SMALL_BYTES and check_structure(body, limits, SMALL_OUTLINE):
            return parse()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, check_structure, body, limits)
        return await loop.run_in_executor(self._thread, parse)

    def close(self) -> None:
        """End the thread after the body that it parses."""
        self._thread.shutdown(wait=False, cancel_futures=True)


# The structure of a body, before objects are made of it.


def check_structure(
    body: bytes | bytearray, limits: ServerLimits, most_bytes: float = math.inf
) -> bool:
    """Check the depth of JSON, in which the root has depth 1, and its values, with the root.

    Exact for JSON. Whether it is JSON at all is for the decoder to say.

    Args:
        body: the JSON.
        limits: its limits.
        most_bytes: stop after more bytes outside of strings, spaces not counted; return False then.

    Raises:
        TooLarge: it exceeds ``max_json_depth`` or ``max_json_values``.
    """
    depth, values, held = 0, 1, b""
    for outline in _outlines(body):
        most_bytes -= len(outline)
        if most_bytes < 0:
            return False
        part = held + outline
        # Whether a container is empty is known with the next character.
        held = part[-1:] if part.endswith((b"[", b"{")) else b""
        part = part[: len(part) - len(held)]
        opening = part.count(b"[") + part.count(b"{")
        deepest = depth + opening
        if deepest > limits.max_json_depth:
            deepest = depth + _deepest(part)
        depth += opening - part.count(b"]") - part.count(b"}")
        # A container has as many values as commas and one more, unless it is empty.
        values += part.count(b",") + opening - part.count(b"[]") - part.count(b"{}")
        if deepest > limits.max_json_depth:
            raise limits.exceeded("max_json_depth", "body", f"{deepest:_} levels")
        if values > limits.max_json_values:
            raise limits.exceeded("max_json_values", "body", f"{values:_} values")
    return True


_SPACES = b" \t\r\n"
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Opening brackets are a level down, 1; closing ones a level up, -1 as int8."""


def _deepest(part: bytes) -> int:
    """The level of the deepest bracket, counted from the level at the begin of the part."""
    steps = np.frombuffer(part.translate(_STEPS, _NO_BRACKETS), dtype=np.int8)
    return int(steps.cumsum().max(initial=0))


def _outlines(body: bytes | bytearray) -> Iterator[bytes]:
    """The body part by part without spaces; of every string only a quotation mark remains."""
    start, in_string = 0, False
    while start < len(body):
        part = bytes(body[start : start + SCAN_BYTES])
        backslashes = len(part) - len(part.rstrip(b"\\"))
        if backslashes % 2 and len(part) == SCAN_BYTES:
            part = part[:-1]  # it belongs to the next character
        start += len(part)
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')  # in turn outside and inside of strings
        outside = pieces[in_string::2]
        in_string ^= len(pieces) % 2 == 0
        yield (b'"'.join(outside) + b'"' * in_string).translate(None, _SPACES)
