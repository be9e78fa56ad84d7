"""Connections: headers come in time and in size, and their number is limited."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
import time

import httpx
import pytest
from raw_clients import BODY, HEAD, START, WHOLE, answer, client_of, one_answer, status, until
from served import ASKED, LiveFake

from echelon.errors import InvalidInput
from echelon.server.connection import LINGER_S
from echelon.server.http_server import OTHER_FILES, raise_file_limit


@pytest.fixture(scope="module")
def live():
    connection = {"header_timeout_s": 0.3, "max_connections": 8, "max_header_kb": 2000 / 2**10}
    limits, scorer = {"max_body_mb": 20_000 / 2**20, **connection}, {"pace_s": 0.0001}
    with LiveFake(limits=limits, scorer=scorer) as server:
        yield server


@pytest.fixture(autouse=True)
def alone(live):
    """Connections of the test before have gone: there are only eight places."""
    until(lambda: live.metric("echelon_connections") == 1)  # the one that asks


def drip(client, stop) -> None:
    """A byte of headers now and then, until the connection is closed."""
    with contextlib.suppress(OSError):
        client.sendall(b"POST /v1/rerank HTTP/1.1\r\nX-Slow: ")
        while not stop.wait(0.02):
            client.sendall(b"a")


def test_headers_sent_a_byte_at_a_time_are_refused(live):
    before = live.metric('echelon_connections_refused_total{reason="slow_headers"}')
    stop = threading.Event()
    with client_of(live) as client:
        thread = threading.Thread(target=drip, args=(client, stop))
        thread.start()
        reply = answer(client)
        stop.set()
        thread.join()
    assert status(reply) == 408
    assert b"The headers did not arrive within 0.3 s (header_timeout_s)." in reply
    assert live.metric('echelon_connections_refused_total{reason="slow_headers"}') == before + 1


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"PO", HEAD])
def test_an_idle_connection_is_closed(live, begun):
    with client_of(live) as client:
        client.sendall(begun)
        assert status(answer(client)) == 408


def test_a_further_request_has_its_own_time(live):
    with client_of(live) as client:
        for _ in range(2):
            client.sendall(WHOLE)
            assert status(one_answer(client)) == 200
        client.sendall(b"\r\n")  # not even a request
        assert status(answer(client)) == 408


def test_an_idle_connection_stays_longer_than_headers_may_take(live):
    with client_of(live) as client, client_of(live) as other:
        client.sendall(WHOLE)
        assert status(one_answer(client)) == 200
        assert status(answer(other)) == 408  # its time for headers is over, and began later
        client.sendall(WHOLE)
        assert status(one_answer(client)) == 200


def test_a_slow_body_is_not_judged_by_the_time_for_headers(live):
    with client_of(live) as client, client_of(live) as other:
        client.sendall(HEAD + b"\r\n" + BODY[:5])
        assert status(answer(other)) == 408
        client.sendall(BODY[5:])
        assert status(one_answer(client)) == 200


def test_pipelined_requests_are_answered_in_turn(live):
    with client_of(live) as client:
        client.sendall(WHOLE + WHOLE + HEAD)
        reply = b""
        while reply.count(b"HTTP/1.1 200") < 2:
            reply += client.recv(65536)
        client.sendall(b"\r\n" + BODY)
        while reply.count(b"HTTP/1.1 200") < 3:
            reply += client.recv(65536)


def test_slow_headers_of_the_next_request_do_not_lose_the_answer_before(live):
    body = json.dumps({"query": "q", "documents": [f"{i} " + "d" * 90 for i in range(100)]})
    head = f"{START}Content-Length: {len(body)}\r\n\r\n"
    with client_of(live) as client:  # a second of work, three times as long as headers may take
        client.sendall(f"{head}{body}".encode())
        client.sendall(HEAD)
        reply = answer(client)
    assert reply.count(b"HTTP/1.1 200") == reply.count(b"HTTP/1.1 408") == 1
    assert status(reply) == 200


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"X-Long: " + b"a" * 2000 + b"\r\n\r\n",
        HEAD + b"X-Endless: " + b"a" * 200_000,
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"X-Many: b\r\n" * 200 + b"\r\n" + BODY,
        b"GET /" + b"a" * 200_000,
    ],
)
def test_headers_have_a_size(live, head):
    with client_of(live) as client:
        with contextlib.suppress(OSError):
            client.sendall(head)
        reply = answer(client)
    assert status(reply) == 431
    assert b"longer than 2000 bytes" in reply


def test_headers_of_the_largest_size_come_in(live):
    filler = 2000 - len("/v1/rerank") - len("host") - 1 - 4 - len("content-length") - 2 - 4
    line = b"X: " + b"a" * (filler - 50) + b"\r\n"
    with client_of(live) as client:
        client.sendall(HEAD + line + b"\r\n" + BODY)
        assert status(one_answer(client)) == 200


def test_a_refused_body_cannot_hold_the_connection(live):
    with client_of(live) as client:
        client.sendall(f"{START}Content-Length: 99999\r\n\r\n{{".encode())
        reply = answer(client)
    assert status(reply) == 413
    assert b"99_999 bytes are more than max_body_mb" in reply


def test_a_body_that_comes_behind_its_refusal_costs_no_connection(tmp_path):
    (tmp_path / "keys").write_text("right-key-0123456789 name=team\n", "utf-8")
    with LiveFake(keys=str(tmp_path / "keys")) as server, client_of(server) as client:
        for _ in range(3):
            client.sendall(HEAD + b"Authorization: Bearer wrong\r\n\r\n")
            assert status(one_answer(client)) == 401  # before the body was read
            client.sendall(BODY)
        # It stays, beyond the moment in which the body had to come.
        begun = time.monotonic()
        while time.monotonic() < begun + LINGER_S + 0.3:
            client.sendall(HEAD + b"Authorization: Bearer right-key-0123456789\r\n\r\n" + BODY)
            assert status(one_answer(client)) == 200


def test_the_number_of_connections_is_limited(live):
    body = json.dumps({"query": "q", "documents": [f"{i} " + "d" * 90 for i in range(100)]})
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(client_of(live)) for _ in range(8)]
        for client in held:  # together eight seconds of work
            client.sendall(f"{START}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        with client_of(live) as ninth:
            ninth.sendall(WHOLE)
            reply = answer(ninth)
        assert status(reply) == 503
        assert b"retry-after: 1\r\n" in reply
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["message"].startswith("This server has")
        held[0].close()
        with httpx.Client() as again:
            until(lambda: again.post(f"{live.url}/v1/rerank", json=ASKED).status_code == 200)
    assert live.metric('echelon_connections_refused_total{reason="too_many"}') >= 1


def test_files_for_the_connections(monkeypatch):
    limit = [200, 1000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limit.__setitem__(slice(None), new))
    raise_file_limit(30)
    assert limit == [200, 1000]
    raise_file_limit(500)
    assert limit == [500 + OTHER_FILES, 1000]
    with pytest.raises(
        InvalidInput, match="--max-connections: 990 connections need 1118 open files"
    ):
        raise_file_limit(990)
