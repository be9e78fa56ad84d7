"""Bodies: their structure is counted exactly, and their memory has one bound for all requests."""

from __future__ import annotations

import asyncio
import json
import threading

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from echelon.errors import InvalidInput, Overloaded, SlowClient, TooLarge
from echelon.server import body as body_module
from echelon.server.body import (
    SMALL_BYTES,
    SMALL_OUTLINE,
    BodyMemory,
    ParserThread,
    check_structure,
)
from echelon.server.limits import ServerLimits

KIB = 2**10
LIMITS = {"max_bodies_mb": 40 / KIB, "max_body_mb": 32 / KIB}
"""40 KiB of all bodies together, 32 KiB of one."""

# Structure.

texts = st.text(st.sampled_from('a"\\[]{},: é\n\x00😀'), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def counted(value, depth=1) -> tuple[int, int]:
    """Values, and levels of containers."""
    if not isinstance(value, list | dict):
        return 1, depth - 1
    inner = [
        counted(one, depth + 1) for one in (value if isinstance(value, list) else value.values())
    ]
    return 1 + sum(n for n, _ in inner), max([depth, *(level for _, level in inner)])


def is_allowed(text, **limits) -> bool:
    try:
        check_structure(text, ServerLimits(**limits))
    except TooLarge:
        return False
    return True


@given(values, st.booleans(), st.sampled_from([None, 1, 3]), st.integers(2, 9))
@example(value=[[], {}, [[]]], ascii_only=False, indent=None, scan_bytes=2)
@example(value=["\\", '"', '\\"[', "]"], ascii_only=False, indent=None, scan_bytes=3)
def test_structure_is_counted_exactly(value, ascii_only, indent, scan_bytes):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8", "surrogatepass"
    )
    count, depth = counted(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "SCAN_BYTES", scan_bytes)  # parts end within strings and escapes
        assert is_allowed(text, max_json_values=count, max_json_depth=max(1, depth))
        if count > 1:
            assert not is_allowed(text, max_json_values=count - 1)
        if depth > 1:
            assert not is_allowed(text, max_json_depth=depth - 1)


@given(st.binary(max_size=60) | st.text('[]{}",\\ 1a').map(str.encode))
def test_what_is_no_json_is_left_to_the_decoder(text):
    assert isinstance(is_allowed(text, max_json_values=8, max_json_depth=4), bool)


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**6, b'[{"a":' * 10**6])
def test_depth_never_reaches_the_decoder(text):
    assert not is_allowed(text)
    deepest = b"[" * 256 + b"]" * 256
    assert is_allowed(deepest, max_json_depth=256)
    msgspec.json.encode(msgspec.json.decode(deepest))  # no RecursionError
    with pytest.raises(InvalidInput, match="max_json_depth: 257 is more than Python can read"):
        ServerLimits(max_json_depth=257)


def test_many_values_are_refused_before_they_are_read_to_the_end():
    text = b'{"query":"q","documents":[' + b'"",' * 300_000 + b'""]}'
    with pytest.raises(TooLarge, match="values are more than max_json_values=250_000"):
        check_structure(text, ServerLimits())


# Parsing.


def test_large_bodies_are_parsed_one_by_one_in_a_thread():
    here, found, running = threading.get_ident(), {}, set()

    async def parse(parser, name, text):
        def work():
            running.add(name)
            found[name] = threading.get_ident() != here, len(running)
            running.remove(name)

        await parser.run(text, ServerLimits(), work)

    async def main():
        parser = ParserThread()
        bodies = {
            "small": b"[" + b" " * 1000 + b"]",
            "many values": b"[" + b"1," * SMALL_OUTLINE + b"1]",
            "long": b"[" + b" " * SMALL_BYTES + b"]",
            "other": b"[" + b" " * SMALL_BYTES + b"]",
        }
        await asyncio.gather(*(parse(parser, name, text) for name, text in bodies.items()))
        with pytest.raises(TooLarge):
            await parser.run(b"[" * 10**6, ServerLimits(), lambda: found.update(deep=1))
        parser.close()

    asyncio.run(main())
    assert found == dict.fromkeys(found, (True, 1)) | {"small": (False, 1)}
    assert len(found) == 4


# Memory.


class Client:
    """A client that sends its body part by part."""

    def __init__(self, memory, limits):
        self._parts = asyncio.Queue()
        self.share = memory.share()
        scope = {"type": "http", "method": "POST", "headers": []}
        self.reading = asyncio.create_task(self._read(Request(scope, self._parts.get), limits))

    async def _read(self, request, limits):
        with self.share as share:
            body = await share.read(request, limits)
            share.resize(2 * len(body))
            return body

    async def send(self, kib, *, more=True):
        body = b" " * (kib * KIB)
        self._parts.put_nowait({"type": "http.request", "body": body, "more_body": more})
        for _ in range(4):
            await asyncio.sleep(0)

    async def leave(self):
        self._parts.put_nowait({"type": "http.disconnect"})


def run_memory(main, **limits):
    limits = ServerLimits(**LIMITS, **limits)
    memory = BodyMemory(limits)

    async def guarded():
        async with asyncio.timeout(60):
            await main(memory, limits)

    asyncio.run(guarded())
    assert memory.used_bytes == 0


def test_half_sent_bodies_give_way_to_smaller_ones():
    async def main(memory, limits):
        large, middle, small, another = (Client(memory, limits) for _ in range(4))
        await large.send(25)
        await middle.send(15)
        assert memory.used_bytes == 40 * KIB
        await small.send(5)  # the largest is given up, though its client sends nothing more
        with pytest.raises(Overloaded, match=r"max_bodies_mb=.* is used up\. Try again in 1"):
            await large.reading
        assert memory.used_bytes == 20 * KIB
        await another.send(20)
        await another.send(1)  # the largest itself
        with pytest.raises(Overloaded) as caught:
            await another.reading
        assert caught.value.limit == "max_bodies_mb"
        await middle.send(0, more=False)
        assert len(await middle.reading) == 15 * KIB
        await small.send(0, more=False)
        assert len(await small.reading) == 5 * KIB

    run_memory(main)


def test_texts_count_until_the_request_ends():
    async def main(memory, limits):
        first, second = Client(memory, limits), Client(memory, limits)
        with memory.share() as waiting:
            waiting.resize(30 * KIB)
            await first.send(8, more=False)
            with pytest.raises(Overloaded):  # its texts take 16 KiB
                await first.reading
            waiting.resize(1)
            await second.send(8, more=False)
            await second.reading
            with pytest.raises(TooLarge, match="bytes of memory for its texts are more than"):
                waiting.resize(41 * KIB)
        with pytest.raises(Overloaded):
            waiting.resize(1)  # in a thread that goes on for a request that has ended

    run_memory(main)


def test_memory_is_free_whatever_ends_a_body():
    async def main(memory, limits):
        left, slow, long = (Client(memory, limits) for _ in range(3))
        for client in (left, slow):
            await client.send(1)
        await left.leave()
        await long.send(33)
        for client, error in ((left, ClientDisconnect), (long, TooLarge), (slow, SlowClient)):
            with pytest.raises(error):
                await client.reading
        cancelled = Client(memory, limits)
        await cancelled.send(1)
        cancelled.reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled.reading

    run_memory(main, body_timeout_s=0.2)
