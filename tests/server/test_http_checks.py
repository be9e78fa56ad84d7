"""What every request must satisfy, and the headers that every response carries."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from served import ASKED, run_app
from services import service

from echelon.errors import InvalidInput, Malformed, MethodNotAllowed, Misdirected, ModelNotFound
from echelon.server.app import HEADERS, STATE_ROUTES, make_app
from echelon.server.auth import Access, ApiKey, Keys
from echelon.server.context import ServerContext
from echelon.server.http_checks import Hosts
from echelon.server.metrics import Metrics
from echelon.server.protocols import PATHS, PROTOCOLS
from echelon.server.protocols.base import ErrorResponse

LOCKED = Access(Keys([ApiKey("sesame", "tests")]))
SECRET = {"Authorization": "Bearer sesame"}


def error_of(protocol):
    """The form of a protocol's errors."""
    return protocol.write_error(ErrorResponse(MethodNotAllowed("Use POST."), "", ""))[1]


# The type of the content.


OTHER_TYPES = (
    None,
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=a",
    "text/plain; charset=application/json",
    "application/jsonp",
    "application/json, text/plain",
    "xapplication/json",
)


def test_bodies_that_are_not_announced_as_json_are_refused_in_the_form_of_the_api():
    async def main(client, server):
        for kind in OTHER_TYPES:
            headers = {} if kind is None else {"Content-Type": kind}
            for protocol in PROTOCOLS:
                body, path = json.dumps(dict(protocol.example)).encode(), protocol.own_paths[0]
                response = await client.post(path, content=body, headers=headers)
                assert response.status_code == 415, (path, kind)
                assert "-H 'Content-Type: application/json'" in response.text
                assert response.json().keys() == error_of(protocol).keys()
        body = json.dumps(ASKED).encode()
        for kind in (
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/vnd.api+json ;q=1",
        ):
            headers = {"Content-Type": kind}
            response = await client.post("/v1/rerank", content=body, headers=headers)
            assert response.status_code == 200, kind

    run_app(main)


def test_a_page_of_another_site_cannot_make_a_browser_send_json():
    async def main(client, server):
        asked = {
            "Origin": "https://evil.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        preflight = await client.options("/v1/rerank", headers=asked)
        assert preflight.status_code in {400, 405}
        assert "access-control-allow-origin" not in preflight.headers

    run_app(main)
    run_app(main, access=Access(origins=("https://shop.example",)))


# The host.

LOCAL = Hosts.of("127.0.0.1", ())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LocalHost.:8080", True),
        ("app.localhost:1", True),
        ("127.0.0.1:8080", True),
        ("127.9.9.9", True),
        ("10.1.2.3:8080", True),
        ("[::1]:8080", True),
        ("[fe80::1]", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("[::1]evil.example", False),
        ("[localhost", False),
        ("::1", False),
        ("localhost:80:80", False),
        ("0x7f.1", False),
        ("", False),
        (" ", False),
        ("localhost\n", False),
        ("a." * 30_000, False),
    ],
)
def test_a_server_of_this_machine_answers_under_its_names_and_addresses(host, allowed):
    headers = [(b"accept", b"*/*"), (b"host", host.encode())]
    if allowed:
        LOCAL.check(headers, "1.1")
    else:
        with pytest.raises(Misdirected, match="--allowed-hosts NAME"):
            LOCAL.check(headers, "1.1")


@pytest.mark.parametrize("hosts", [LOCAL, Hosts()])
def test_a_request_has_one_host(hosts):
    for headers in ([], [(b"host", b"localhost"), (b"host", b"localhost")]):
        with pytest.raises(Malformed, match="Send this header once"):
            hosts.check(headers, "1.1")
    hosts.check([], "1.0")  # probes of load balancers


@pytest.mark.parametrize(
    ("address", "allowed", "host", "answers"),
    [
        ("0.0.0.0", (), "rank.svc.cluster.local", True),
        ("10.0.0.5", (), "rank", True),
        ("0.0.0.0", ("rank",), "rank:8080", True),
        ("0.0.0.0", ("rank",), "evil.example", False),
        ("0.0.0.0", ("rank",), "10.0.0.7", True),
        ("0.0.0.0", ("rank",), "localhost", True),
        ("127.0.0.1", ("*.example.org",), "a.b.Example.org", True),
        ("127.0.0.1", ("*.example.org",), "example.org", False),
        ("127.0.0.1", ("Example.org.",), "example.org", True),
        ("127.0.0.1", ("rank", "*"), "evil.example", True),
        ("::1", (), "evil.example", False),
        ("rank.lan", ("other",), "rank.lan", True),
    ],
)
def test_names_of_a_server_by_its_address_and_its_settings(address, allowed, host, answers):
    hosts, headers = Hosts.of(address, allowed), [(b"host", host.encode())]
    if answers:
        hosts.check(headers, "1.1")
    else:
        with pytest.raises(Misdirected):
            hosts.check(headers, "1.1")


@pytest.mark.parametrize("name", ["http://a", "a:80", "a b", "", "*a", "a.*", "a,b", "*."])
def test_allowed_hosts_that_are_no_names_are_refused(name):
    with pytest.raises(InvalidInput, match="is no host name"):
        Hosts.of("127.0.0.1", [name])


def test_a_foreign_host_is_answered_on_no_path():
    async def main(client, server):
        foreign = {"Host": "evil.example"}
        for path in ("/", "/health", "/metrics", "/pages/theme.js", "/nothing"):
            response = await client.get(path, headers=foreign)
            assert (response.status_code, response.headers["x-frame-options"]) == (421, "DENY")
            assert "Host: is not a name of this server" in response.text
        ranked = await client.post("/tei/rerank", json=ASKED, headers=foreign)
        assert (ranked.status_code, ranked.json()["error_type"]) == (421, "Validation")
        assert ranked.headers["x-request-id"]
        named = await client.post("/v1/rerank", json=ASKED, headers={"Host": "localhost:1"})
        assert named.status_code == 200

    run_app(main, access=Access(hosts=LOCAL))


# Paths and methods.

ENDINGS = ("%0A", "/", "%2F", "%00", "%20", ";a", "%0D%0A")


def test_a_path_matches_exactly_and_nothing_is_redirected():
    async def main(client, server):
        paths = {*PATHS, *STATE_ROUTES, "/pages/theme.js", "/docs/assets/swagger-ui.css"} - {"/"}
        changed = [path + ending for path in paths for ending in ENDINGS]
        for path in (*changed, "/%2Fhealth", "/health%2F..%2Fmetrics", "/Health", "/docs/assets"):
            response = await client.request("POST" if path[:-3] in PATHS else "GET", path)
            assert (response.status_code, "location" in response.headers) == (404, False), path
            assert "There is no" in response.json()["message"]

    run_app(main)


def test_a_wrong_method_gets_405_in_the_form_of_the_path():
    async def main(client, server):
        for path, protocols in PATHS.items():
            for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE"):
                response = await client.request(method, path)
                assert (response.status_code, response.headers["Allow"]) == (405, "POST")
                assert response.json().keys() == error_of(protocols[-1]).keys()
                assert "Use POST" in response.text
        for path in STATE_ROUTES:
            response = await client.post(path, json=ASKED)
            assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD")

    run_app(main)


# Responses.


def test_every_response_forbids_frames_guessed_types_and_foreign_content(monkeypatch):
    async def main(client, server):
        seen = set()
        for path in [*STATE_ROUTES, "/pages/theme.js", "/docs/assets/swagger-ui.css", "/nothing"]:
            seen.add(_checked(await client.get(path, headers=SECRET)))
        seen.add(_checked(await client.get("/info")))
        seen.add(_checked(await client.get("/v1/rerank")))
        seen.add(_checked(await client.post("/v1/rerank", json=ASKED, headers=SECRET)))
        answer = await client.post("/v1/rerank", json=ASKED, headers=SECRET)
        assert answer.headers["cache-control"] == "no-store"
        monkeypatch.setattr(server.metrics, "text", lambda: 1 / 0)
        broken = httpx.ASGITransport(make_app(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=broken, base_url="http://test") as other:
            response = await other.get("/metrics")
        seen.add(_checked(response))
        assert "ZeroDivisionError. This is a bug" in response.json()["message"]
        assert seen == {200, 401, 404, 405, 500}

    run_app(main, access=LOCKED)


def _checked(response) -> int:
    found = response.headers
    for name in HEADERS:
        assert found.get_list(name.decode()), (response.url, name)
        assert len(found.get_list(name.decode())) == 1
    assert found["x-frame-options"] == "DENY"
    assert found["x-content-type-options"] == "nosniff"
    assert found["referrer-policy"] == "no-referrer"
    policy = found["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    return response.status_code


# What is said without a key.


def test_readiness_gives_no_reason_without_a_key_and_never_a_path(caplog):
    path = "/srv/models/secret model/model.safetensors"

    async def main():
        made = service()
        await made.start()

        async def broken(_):
            raise ModelNotFound(f"{path} is damaged: fetch it again.")

        server = ServerContext(lambda: None, "m", Metrics(), access=LOCKED)
        transport = httpx.ASGITransport(make_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            before = await client.get("/ready", headers=SECRET)
            assert before.json() == {"ready": False, "reason": "not started"}
            server.running = made
            assert (await client.get("/ready")).json() == {"ready": True}
            assert (await client.get("/ready", headers=SECRET)).json() == {
                "ready": True,
                "reason": "",
            }
            made.submit = broken
            made._dispatcher.last_scored = None
            made._canary = None
            hidden = await client.get("/ready")
            assert (hidden.status_code, hidden.json()) == (503, {"ready": False})
            wrong = await client.get("/ready", headers={"Authorization": "Bearer x"})
            assert wrong.json() == {"ready": False}
            told = await client.get("/ready", headers=SECRET)
            assert told.json() == {"ready": False, "reason": "the canary was not scored"}
        await made.stop()

    with caplog.at_level(logging.WARNING, "echelon.server.app"):
        asyncio.run(main())
    assert path in caplog.text
