"""Clients that go, crawl or lie, keys that ask too much, and the end: the others never notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket

import pytest
from raw_clients import START
from served import LiveFake
from services import GUARD_S
from streams import PATH, Stream, asked, check, client_of, counted, readiness, streaming

PACE = {"pace_s": 0.00002}
BODY = json.dumps(asked(0)).encode()


@pytest.fixture(scope="module")
def live():
    limits = {"header_timeout_s": 0.5, "body_timeout_s": 0.5}
    with LiveFake(scorer=PACE, limits=limits) as server:
        yield server
        assert server.end(signal.SIGTERM) == 0


def head(length: int) -> bytes:
    return f"{START}Content-Length: {length}\r\n\r\n".encode()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=GUARD_S)


def logged(server, status: int) -> list[str]:
    """Ids of the requests whose end was logged so."""
    lines = [line for line in list(server.lines) if isinstance(line, dict)]
    return [line["request_id"] for line in lines if line.get("status") == status]


async def has_logged(server, status: int, count: int) -> None:
    while len(logged(server, status)) < count:  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.005)


def test_a_client_that_goes_takes_its_work_along(live):
    long = {"query": "gone", "documents": [f"{i} " + "d" * 90 for i in range(3000)]}
    body = json.dumps(long).encode()

    async def main():
        before = len(logged(live, 499))
        scored = live.metric("echelon_documents_total")
        async with streaming(live) as stream:
            for gone in (1, 2, 3):
                with connect(live) as client:
                    client.sendall(head(len(body)) + body)
                    await counted(live, "echelon_waiting_pairs", 1000)
                await counted(live, 'echelon_requests_total{outcome="cancelled"}', gone)
            await stream.more(12)
            assert live.metric("echelon_waiting_pairs") < 1000
        assert live.metric("echelon_documents_total") == scored + 8 * stream.answered
        await has_logged(live, 499, before + 3)

    asyncio.run(main())


def crawl(server, first: bytes) -> bytes:
    """The reply to a client that sends a byte now and then."""
    with connect(server) as client:
        client.settimeout(0.05)
        client.sendall(first)
        while True:
            try:
                return client.recv(12)
            except TimeoutError:
                client.sendall(b"a")


def test_clients_that_send_a_byte_now_and_then(live):
    """Some in their headers and some in their bodies, all get an error; the others continue."""

    async def main():
        async with streaming(live) as stream:
            starts = [b"POST /v1/rerank HTTP/1.1\r\nX: ", head(9999) + b"{"] * 10
            answered = stream.answered
            replies = await asyncio.gather(*(asyncio.to_thread(crawl, live, s) for s in starts))
            assert stream.answered > answered
        assert replies == [b"HTTP/1.1 408"] * 20
        assert live.metric('echelon_connections_refused_total{reason="slow_headers"}') == 10
        await has_logged(live, 408, 10)

    asyncio.run(main())


@pytest.mark.parametrize("part", [len(head(len(BODY))) - 10, len(head(len(BODY))) + 30])
def test_requests_that_are_cut_in_half(live, part):
    async def main():
        gone = len(logged(live, 499))
        async with streaming(live) as stream:
            for _ in range(20):
                with connect(live) as client:
                    client.sendall((head(len(BODY)) + BODY)[:part])
            await stream.more(12)
        if part > len(head(len(BODY))):
            await has_logged(live, 499, gone + 20)
        while live.metric("echelon_connections") > 1:  # noqa: ASYNC110 - another process counts
            await asyncio.sleep(0.005)
        assert live.metric("echelon_requests_inside") == 0

    asyncio.run(main())


# The end.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shutdown_answers_all_accepted_requests(workers):
    async def main(server):
        async with asyncio.timeout(GUARD_S):
            stream = Stream(server, clients=12)
            await stream.more(24)
            stream.ending = True
            server.process.send_signal(signal.SIGTERM)
            await stream.end()
            with pytest.raises(OSError, match="refused"):
                connect(server)
            return stream

    with LiveFake(scorer={"pace_s": 0.0001}, service={"workers": workers}) as server:
        stream = asyncio.run(main(server))
        assert server.wait() == 0
        assert set(logged(server, 200)) == stream.ids
        statuses = {line["status"] for line in server.lines if "status" in line}
        assert statuses == {200}
        assert server.lines[-1]["message"] == "Ended; all requests were answered."


def test_a_worker_that_dies_during_the_shutdown():
    async def main(server):
        async with asyncio.timeout(GUARD_S):
            stream = Stream(server, clients=12)
            await stream.more(24)
            stream.ending = True
            server.process.send_signal(signal.SIGTERM)
            server.workers[0].kill()
            await stream.end()
            return stream

    with LiveFake(scorer={"pace_s": 0.0001}) as server:
        stream = asyncio.run(main(server))
        assert server.wait() == 0
        assert set(logged(server, 200)) == stream.ids
        assert server.lines[-1]["message"] == "Ended; all requests were answered."


def test_the_shutdown_does_not_wait_for_slow_clients():
    """Silent connections, headers half come, bodies half come: none of them holds the server."""
    with LiveFake(limits={"body_timeout_s": 0.3, "drain_s": 50.0}) as server:
        with contextlib.ExitStack() as stack:
            for start in (b"", b"POST / HT", head(99), head(99) + b"{"):
                stack.enter_context(connect(server)).sendall(start)
            assert server.end(signal.SIGTERM) == 0
        assert server.lines[-1]["message"] == "Ended; all requests were answered."


# Keys.


def test_a_key_over_its_limit_waits_alone_and_no_key_is_shown(tmp_path):
    slow, fast, wrong = (f"{word}-key-no-hex-xyz" for word in ("slow", "fast", "wrong"))
    (tmp_path / "keys").write_text(
        f"{slow} name=team-slow rate=0.001/s burst=8\n{fast} name=team-fast rate=90000/s\n", "utf-8"
    )

    async def main(server):
        async with asyncio.timeout(GUARD_S), client_of(server) as client:
            for slow_gets in (200, 429, 429):
                for key, status in ((fast, 200), (slow, slow_gets), (wrong, 401)):
                    headers = {"Authorization": f"Bearer {key}"}
                    response = await client.post(PATH, json=asked(1), headers=headers)
                    assert response.status_code == status
                    assert key not in response.text
                    if status == 200:
                        check(response, 1)
                    if status == 429:
                        assert int(response.headers["Retry-After"]) > 900
            text = (await client.get("/metrics")).text
            assert 'echelon_rate_limited_total{key="team-slow"} 2.0' in text
            assert "no-hex-xyz" not in text
        await readiness(server, 200)

    with LiveFake(keys=str(tmp_path / "keys")) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0
        lines = json.dumps(server.lines)
    assert lines.count('"key": "team-slow"') == lines.count('"key": "team-fast"') == 3
    assert "no-hex-xyz" not in lines
