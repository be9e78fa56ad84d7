"""``echelon serve`` in a process of its own: real clients, bad clients, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cohere
import httpx
import psutil
import pytest
from helpers import SENTENCES
from raw_clients import until
from served import JSON, KEY, MODEL, QUERY, Live
from services import GUARD_S

from echelon import Reranker
from echelon.server.context import name_of
from echelon.server.http_checks import is_loopback

NO_RETRY = {"max_retries": 0}


# Cohere's own clients.


@pytest.fixture
def speak():
    """Makes clients whose connections are closed at the end."""
    with httpx.Client(timeout=GUARD_S) as plain:
        yield lambda kind, server, key=KEY: kind(key, base_url=server.url, httpx_client=plain)


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_coheres_client_gets_the_librarys_ranking(live, expected, speak, kind):
    client = speak(kind, live)
    response = client.rerank(model="rerank-v3.5", query=QUERY, documents=list(SENTENCES))
    assert [r.index for r in response.results] == [r.index for r in expected.results]
    scores = [r.relevance_score for r in response.results]
    assert scores == pytest.approx([r.score for r in expected.results], abs=1e-5)
    assert response.id
    assert response.meta.tokens.input_tokens == expected.report.tokens
    two = client.rerank(model="m", query=QUERY, documents=list(SENTENCES), top_n=2)
    assert [r.index for r in two.results] == [r.index for r in expected.results[:2]]


def test_coheres_first_client_gets_documents_back(live, speak):
    documents = [{"text": "rain", "title": "weather"}, {"text": "sun"}]
    response = speak(cohere.Client, live).rerank(
        model="m", query=QUERY, documents=documents, return_documents=True, max_chunks_per_doc=2
    )
    assert {r.document.text for r in response.results} == {"rain", "sun"}


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_coheres_client_raises_its_own_errors(live, speak, kind):
    asked = {"model": "m", "query": QUERY, "request_options": NO_RETRY}
    with pytest.raises(cohere.UnauthorizedError, match="API key is not known"):
        speak(kind, live, "wrong").rerank(**asked, documents=["a"])
    client = speak(kind, live)
    with pytest.raises(cohere.UnprocessableEntityError, match="top_n: -1 is negative"):
        client.rerank(**asked, documents=["a"], top_n=-1)
    with pytest.raises(
        cohere.core.ApiError, match="51 documents are more than max_documents=50"
    ) as caught:
        client.rerank(**asked, documents=["a"] * 51)
    assert caught.value.status_code == 413


# Bad clients.


def post(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


BODY = b'{"query": "q", "documents": ["a", "b"]}'


def alive(live) -> bool:
    headers = {"Authorization": f"Bearer {KEY}", **JSON}
    return httpx.post(f"{live.url}/v1/rerank", content=BODY, headers=headers).status_code == 200


def test_half_a_body_affects_no_other_request(live):
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(post(BODY[:10], len(BODY)))
    assert alive(live)
    until(lambda: any(isinstance(ln, dict) and ln.get("status") == 499 for ln in live.lines))


def test_a_body_that_never_ends_is_given_up(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=GUARD_S) as client:
        client.sendall(post(BODY[:10], len(BODY)))
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
    assert alive(live)


def test_headers_that_never_end_are_given_up(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=GUARD_S) as client:
        client.sendall(post(BODY)[:30])
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
    assert alive(live)


def test_byte_by_byte_is_slow_and_right(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=GUARD_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = post(BODY)
        client.sendall(whole[:-20])  # headers are in a hurry here
        for byte in whole[-20:]:
            client.sendall(bytes([byte]))
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("junk", [b"\r\n\r\n", b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x00\xff" * 9])
def test_junk_affects_no_other_request(live, junk):
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(junk)
    assert alive(live)


@pytest.mark.parametrize(
    ("line", "headers", "status", "words"),
    [
        ("GET /health HTTP/1.1", "Host: localhost:80", 200, "ok"),
        ("GET /health HTTP/1.1", "Host: rebound.example", 421, "--allowed-hosts"),
        ("GET /health HTTP/1.1", "Accept: */*", 400, "Host: was sent 0 times"),
        ("GET /health HTTP/1.0", "Accept: */*", 200, "ok"),
        ("GET /metrics%0a HTTP/1.1", "Host: localhost", 404, "There is no GET /metrics"),
        ("GET //health HTTP/1.1", "Host: localhost", 404, "There is no GET //health"),
        ("POST /health/ HTTP/1.1", "Host: localhost", 404, "There is no POST /health/"),
    ],
)
def test_hosts_and_paths_as_they_arrive(live, line, headers, status, words):
    with socket.create_connection(("127.0.0.1", live.port), timeout=GUARD_S) as client:
        client.sendall(f"{line}\r\n{headers}\r\nConnection: close\r\n\r\n".encode())
        with client.makefile("rb") as reply:
            answer = reply.read().decode()
    assert answer.split(" ")[1] == str(status)
    assert words in answer
    assert "location:" not in answer


def test_the_parent_process_does_not_import_torch(live):
    maps = Path(f"/proc/{live.process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "libtorch" not in maps.read_text()


def test_an_onnx_folder_is_served_where_torch_is_not_installed(light, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n", "utf-8"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Live(light, PYTHONPATH=path) as server:
        asked = {"query": QUERY, "texts": list(SENTENCES), "raw_scores": True}
        results = httpx.post(f"{server.url}/rerank", json=asked).json()
        assert server.end(signal.SIGINT) == 0
    with Reranker(light) as reranker:
        expected = reranker.rank(QUERY, SENTENCES).results
    assert [r["index"] for r in results] == [r.index for r in expected]
    assert [r["score"] for r in results] == pytest.approx([r.logit for r in expected], abs=1e-5)


# A full server, and its end.


def test_a_full_server_and_a_graceful_end(light, speak):
    with Live(light, *MODEL, "--max-requests", 1, "--served-name", "ours") as server:
        (worker,) = psutil.Process(server.process.pid).children()
        client = speak(cohere.ClientV2, server)
        worker.send_signal(signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as thread:
                inside = thread.submit(
                    client.rerank, model="m", query=QUERY, documents=list(SENTENCES)
                )
                until(lambda: "echelon_requests_inside 1.0" in metrics(server))
                with pytest.raises(cohere.TooManyRequestsError) as caught:
                    client.rerank(model="m", query="q", documents=["a"], request_options=NO_RETRY)
                assert int(caught.value.headers["retry-after"]) >= 1
                server.process.send_signal(signal.SIGTERM)
                until(lambda: refuses(server.port))
                assert server.process.poll() is None
                worker.send_signal(signal.SIGCONT)
                assert len(inside.result(GUARD_S).results) == len(SENTENCES)
        finally:
            if worker.is_running():
                worker.send_signal(signal.SIGCONT)
        assert server.wait() == 0
        assert "all requests were answered" in server.lines[-1]["message"]


def test_requests_left_after_the_drain_get_an_error(light):
    with Live(light, *MODEL, "--drain-s", 0.2) as server:
        (worker,) = psutil.Process(server.process.pid).children()
        worker.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as thread:
            inside = thread.submit(
                httpx.post, f"{server.url}/v1/rerank", content=BODY, headers=JSON, timeout=GUARD_S
            )
            until(lambda: "echelon_requests_inside 1.0" in metrics(server))
            assert server.end(signal.SIGTERM) == 0
            answer = inside.result(GUARD_S)
        assert (answer.status_code, worker.is_running()) == (503, False)
        assert "stopped before the request was done" in answer.json()["message"]
        assert "--drain-s was over" in server.lines[-1]["message"]


def metrics(server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


# Starts that fail.


def run(*arguments):
    command = [sys.executable, "-m", "echelon", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=GUARD_S)


def test_a_model_that_is_not_there_is_one_line_and_a_code(tmp_path):
    ended = run(tmp_path, "--port", 0)
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("Error: ")


def test_a_broken_profile_has_its_own_code(tmp_path):
    (tmp_path / "p.json").write_text("{", "utf-8")
    ended = run(tmp_path, "--port", 0, "--profile", tmp_path / "p.json")
    assert ended.returncode == 4
    assert ended.stderr.splitlines()[-1].startswith("Error: ")


def test_a_port_in_use_is_reported_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = run(tmp_path, "--port", other.getsockname()[1])
    assert ended.returncode == 2
    assert "--port: 127.0.0.1:" in ended.stderr


def test_other_machines_are_warned_of(tmp_path):
    ended = run(tmp_path, "--host", "0.0.0.0", "--port", 0, "--log-format", "text")
    assert "other machines may reach this server, and no API key is needed" in ended.stderr


def test_loopback_addresses():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_names_of_models(tmp_path):
    assert name_of(str(tmp_path)) == tmp_path.name
    assert name_of("owner/name") == "owner/name"
    assert name_of("demo") == "demo"


def test_help_is_quick_and_imports_no_server():
    code = (
        "import sys, echelon.cli\n"
        "print([n for n in ('uvicorn', 'starlette', 'numpy') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
