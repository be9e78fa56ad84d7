"""Clients that send wrong, too much or nothing, or do not read: they are told, or gone in time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl

import httpx
import psutil
import pytest
import trustme
from raw_clients import BODY, HEAD, START, WHOLE, answer, client_of, one_answer, status, until
from served import ASKED, LiveFake, sample
from services import GUARD_S

CLIENTS = int(os.environ.get("ECHELON_BAD_CLIENTS", "100"))
"""Clients of each kind that are bad at the same time."""

CHUNKED = f"{START}Transfer-Encoding: chunked\r\n".encode()
LAST = b"\r\n%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
LARGE = b"GET /pages/plotly.js HTTP/1.1\r\nHost: a\r\n\r\n"
SMALL = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
UNREAD = 4096
"""Window of a client that does not read."""

LIMITS = {"send_timeout_s": 1.0, "handshake_timeout_s": 1.0, "header_timeout_s": 1.0}


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def loop(request, tmp_path_factory):
    """Environment of a server whose event loop is uvloop, or asyncio's where that is missing."""
    if request.param == "uvloop":
        return {}
    folder = tmp_path_factory.mktemp("no-uvloop")
    (folder / "uvloop.py").write_text("raise ImportError('as if it were not installed')", "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def live(loop):
    with LiveFake(loop, limits=LIMITS, scorer={"pace_s": 0.00005}) as server:
        yield server
        assert server.end(signal.SIGTERM) == 0
        assert not [line for line in server.lines if "Traceback" in str(line)]


@pytest.fixture(scope="module")
def secure(loop, certificate):
    address = {"certificate": certificate}
    with LiveFake(loop, limits=LIMITS | {"max_connections": 8}, address=address) as server:
        yield server
        assert server.end(signal.SIGTERM) == 0
        assert not [line for line in server.lines if "Traceback" in str(line)]


def trusting(authority) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def refused(server, reason: str) -> float:
    return server.metric(f'echelon_connections_refused_total{{reason="{reason}"}}')


def said(reply: bytes) -> str:
    """The message of a JSON response that closes its connection."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    return json.loads(body)["message"]


# Wrong input.


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"NO HTTP\r\n\r\n", "This is no valid HTTP/1.1 (Invalid method encountered)."),
        (b"\x16\x03\x01\x02\x00", "This is no valid HTTP/1.1 (Invalid method encountered)."),
        (CHUNKED + b"\r\nzz\r\n", "This is no valid HTTP/1.1 (Invalid character in chunk size)."),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "This is no valid HTTP/1.1 (Pause on PRI/Upgrade)."),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT is for proxies, and this"),
        (CHUNKED + b"\r\n1\r\na" * 2000, "The body has too many small chunks."),
        (CHUNKED + LAST + b"X: y\r\n\r\n", "The body has trailers. Send it without."),
    ],
)
def test_what_cannot_be_read_gets_an_answer_in_json(live, sent, words):
    with client_of(live) as client:
        client.sendall(sent)
        reply = answer(client)
    assert status(reply) == 400
    assert said(reply).startswith(words)


def test_answers_that_are_due_come_before_that_of_what_cannot_be_read(live):
    with client_of(live) as client:
        client.sendall(WHOLE * 2 + b"NO HTTP\r\n\r\n")
        reply = answer(client)
    assert (status(reply), reply.count(b"HTTP/1.1 200"), reply.count(b"HTTP/1.1 400")) == (
        200,
        2,
        1,
    )
    assert reply.rindex(b"HTTP/1.1 200") < reply.index(b"HTTP/1.1 400")


def test_a_packet_full_of_requests(live):
    with client_of(live) as client:
        client.sendall(SMALL * 1000)
        reply = answer(client)
    assert 32 <= reply.count(b"HTTP/1.1 200") <= 100
    assert "sent ahead. Wait for responses." in said(reply[reply.index(b"HTTP/1.1 400") :])


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"\r\n0\r\n", b"X: " + b"y" * 65_531 + b"\r\n"),
        (b"\r\n0\r\nX: ", b"y" * 65_536),
        (b"\r\n1;a=", b"y" * 65_536),
    ],
    ids=["trailers", "trailer", "extension"],
)
def test_trailers_and_extensions_of_chunks_are_bounded(live, begin, more):
    def resident() -> int:
        return psutil.Process(live.process.pid).memory_info().rss

    before, sent = resident(), 0
    with client_of(live) as client, contextlib.suppress(OSError):
        client.sendall(CHUNKED + begin)
        while sent < 64 * 2**20:
            client.sendall(more)
            sent += len(more)
    assert sent < 16 * 2**20 or resident() - before < 16 * 2**20
    with client_of(live) as client:
        client.sendall(CHUNKED + begin + more * 16)  # the end of a read is judged with the next
        assert status(answer(client)) in (400, 431)


def test_headers_have_a_number(live):
    with client_of(live) as client:
        client.sendall(HEAD + b"a:\r\n" * 300)
        reply = answer(client)
    assert (status(reply), said(reply)) == (431, "There are more than 256 headers.")


# Another protocol.


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    "sent", [HEAD + UPGRADE + b"\r\n" + BODY, CHUNKED + UPGRADE + LAST + b"\r\n"]
)
@pytest.mark.parametrize("size", [7, 100_000])
def test_a_client_that_asks_for_http_2_is_answered_in_http_1(live, sent, size):
    with client_of(live) as client:
        for _ in range(2):
            for start in range(0, len(sent), size):
                client.sendall(sent[start : start + size])
            reply = one_answer(client)
            assert status(reply) == 200
            assert len(json.loads(reply.partition(b"\r\n\r\n")[2])["results"]) == 5
        client.sendall(WHOLE)
        assert status(one_answer(client)) == 200


def test_there_is_no_websocket(live):
    words = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with client_of(live) as client:
        client.sendall(
            b"GET /ws HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: eA==\r\n" + words + b"\r\n"
        )
        assert status(one_answer(client)) == 404


# Half-closed.


@pytest.mark.parametrize("sent", [SMALL, WHOLE, SMALL * 3, SMALL.replace(b"1.1", b"1.0"), LARGE])
def test_a_client_that_has_ended_its_sending_is_answered(live, sent):
    with client_of(live) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        reply = answer(client)
    assert reply.count(b" 200 OK\r\n") == sent.count(b"HTTP/")
    assert reply.endswith(b"}") or len(reply) > 2**20


def test_a_client_that_has_ended_its_sending_waits_for_a_long_answer(live):
    body = json.dumps({"query": "q", "documents": [f"{i} " + "d" * 90 for i in range(90)]})
    with client_of(live) as client:  # a third of a second of work
        client.sendall(f"{START}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        client.shutdown(socket.SHUT_WR)
        reply = answer(client)
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 ")
    assert b"HTTP/1.1 200 OK" in reply


# Not reading.


def test_a_client_that_reads_slowly_gets_everything(live):
    before = refused(live, "slow_reader")
    with client_of(live, UNREAD) as client, client_of(live, UNREAD) as other:
        for each in (client, other):
            each.sendall(LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        reply = b""
        while refused(live, "slow_reader") == before:  # the other, which does not read
            reply += client.recv(20_000)
        reply += answer(client)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert live.metric('echelon_limit_refusals_total{limit="send_timeout_s"}') >= 1


@pytest.mark.parametrize(
    ("sent", "reasons"),
    [
        ((b"POST / HT", HEAD + b"\r\n" + BODY[:9], LARGE), ("slow_headers", "slow_reader")),
        ((b"",), ("slow_handshake",)),
    ],
    ids=["http", "tls"],
)
def test_many_bad_clients_at_a_time_leave_the_others_alone(sent, reasons, certificate, authority):
    """Headers, bodies or handshakes that never end, and responses that are never read."""
    limits = LIMITS | {"body_timeout_s": 1.0, "max_connections": len(sent) * CLIENTS + 1}
    address = {"certificate": certificate} if "slow_handshake" in reasons else {}
    with LiveFake(limits=limits, address=address) as server, contextlib.ExitStack() as stack:
        trust = trusting(authority)
        with httpx.Client(base_url=server.url, verify=trust, timeout=GUARD_S) as other:

            def metric(name: str) -> float:
                return sample(other.get("/metrics").text, name)

            assert metric("echelon_connections") == 1
            for one in sent:
                for _ in range(CLIENTS):
                    stack.enter_context(client_of(server, UNREAD)).sendall(one)
            while metric("echelon_connections") > 1:
                assert other.post("/v1/rerank", json=ASKED).status_code == 200
            for reason in reasons:
                name = f'echelon_connections_refused_total{{reason="{reason}"}}'
                assert metric(name) == CLIENTS
        assert server.end(signal.SIGTERM) == 0


def test_clients_that_are_waited_for_make_room():
    kinds = (b"", b"GET ", HEAD + b"\r\n", LARGE)
    with LiveFake(limits={"max_connections": 8}) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            for sent in kinds * 2:
                stack.enter_context(client_of(server, UNREAD)).sendall(sent)
            # Each on a new connection.
            until(lambda: httpx.post(f"{server.url}/v1/rerank", json=ASKED).status_code == 200)
        assert refused(server, "displaced") >= 2
        assert refused(server, "slow_headers") == refused(server, "slow_reader") == 0


def test_the_end_does_not_wait_for_clients_that_do_not_read():
    with LiveFake(limits={"drain_s": 0.5}) as server, contextlib.ExitStack() as stack:
        for sent in (b"", b"GET ", HEAD + b"\r\n", LARGE, LARGE):
            stack.enter_context(client_of(server, UNREAD)).sendall(sent)
        until(lambda: server.metric("echelon_connections") == 6)
        assert server.end(signal.SIGTERM) == 0
    assert server.lines[-1]["message"].startswith("Ended; 0 requests got 503")
    assert server.lines[-1]["unread"] == 2


# File descriptors.


def test_a_server_without_file_descriptors_goes_on_when_there_are_some():
    with LiveFake() as server, httpx.Client(base_url=server.url) as other:
        assert other.get("/health").status_code == 200
        limit, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        used = psutil.Process(server.process.pid).num_fds()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 4, hard))
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(client_of(server)) for _ in range(12)]
            until(lambda: any("can be accepted now" in str(line) for line in server.lines))
            assert other.get("/health").status_code == 200
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
            for client in clients:
                client.sendall(SMALL)
                assert status(one_answer(client)) == 200
        assert sum("can be accepted now" in str(line) for line in server.lines) == 1


# TLS.


def shake(context, client) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """The client's side of a handshake, with its last message not yet sent."""
    taken, given = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(taken, given, server_hostname="127.0.0.1")
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            client.sendall(given.read())
            taken.write(client.recv(65536))
        else:
            return tls, taken, given


def test_a_request_in_one_packet_with_the_end_of_the_handshake(secure, authority):
    with client_of(secure) as client:
        tls, taken, given = shake(trusting(authority), client)
        tls.write(WHOLE)
        client.sendall(given.read())
        reply = b""
        while b"results" not in reply:
            taken.write(client.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    reply += tls.read(65536)
    assert status(reply) == 200


def test_handshakes_are_counted_and_have_a_time(secure, authority):
    with httpx.Client(base_url=secure.url, verify=trusting(authority)) as inside:

        def metric(name: str) -> float:
            return sample(inside.get("/metrics").text, name)

        counter = 'echelon_connections_refused_total{{reason="{}"}}'.format
        before = metric(counter("slow_handshake"))
        with contextlib.ExitStack() as stack:
            for sent in [b"", b"\x16\x03\x01"] * 3:
                stack.enter_context(client_of(secure)).sendall(sent)
            until(lambda: metric("echelon_connections") == 7)
            for _ in range(2):
                stack.enter_context(client_of(secure))
            until(lambda: metric(counter("too_many")) >= 1)
            until(lambda: metric(counter("slow_handshake")) >= before + 6)
            until(lambda: metric("echelon_connections") == 1)
        assert metric('echelon_limit_refusals_total{limit="handshake_timeout_s"}') >= 6
        before = metric(counter("bad_handshake"))
        with client_of(secure) as client:
            client.sendall(SMALL)
            answer(client)
        with client_of(secure) as client:
            client.sendall(b"\x16\x03")  # and goes
        until(lambda: metric(counter("bad_handshake")) == before + 1)
        until(lambda: metric("echelon_connections") == 1)


def test_tls_clients_that_do_not_read_are_disconnected(secure, authority):
    context = trusting(authority)
    with client_of(secure, UNREAD) as client, httpx.Client(verify=context) as other:
        tls = context.wrap_socket(client, server_hostname="127.0.0.1")
        tls.sendall(LARGE)
        name = 'echelon_connections_refused_total{reason="slow_reader"} 1.0'
        until(lambda: name in other.get(f"{secure.url}/metrics").text)
        tls.close()
