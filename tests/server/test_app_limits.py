"""Limits of the server: keys, bodies, origins; request ids and log lines."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from typing import get_args

import pytest
from served import ASKED, DAY_S, HOLDING, JSON, metric, run_app
from services import until

from echelon.errors import InvalidInput
from echelon.server.auth import Access, Keys, read_keys
from echelon.server.limits import NAMES, ServerLimits
from echelon.server.observability import JsonFormatter, TextFormatter, request_id
from echelon.server.protocols import PROTOCOLS
from echelon.server.refusals import EXCEEDED, Reason
from echelon.server.routes import MAX_MESSAGE


def refusals(server) -> dict[str, float]:
    """What each limit of a server refused."""
    counted = (
        (name, metric(server, f'echelon_limit_refusals_total{{limit="{name}"}}')) for name in NAMES
    )
    return {name: count for name, count in counted if count}


def test_keys(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n  second-key  # of the web shop\n\n", "utf-8")
    monkeypatch.setenv("ECHELON_API_KEYS", "third-key, ")
    keys = read_keys(file)
    assert len(keys) == 3

    async def main(client, server):
        for path in ("/v1/models", "/info"):
            assert (await client.get(path)).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for protocol in PROTOCOLS:
            path = protocol.own_paths[0]
            response = await client.post(path, json=dict(protocol.example))
            assert response.status_code == 401
            assert "API key" in response.text
        for headers in (
            {"Authorization": "Bearer first-key"},
            {"Authorization": "bearer second-key"},
            {"Authorization": "third-key"},
            {"X-Api-Key": "first-key"},
            {"Api-Key": "first-key"},
        ):
            response = await client.post("/v1/rerank", json=ASKED, headers=headers)
            assert response.status_code == 200
        wrong = {"Authorization": "Bearer first-key2"}
        response = await client.post("/v1/rerank", json=ASKED, headers=wrong)
        assert response.status_code == 401
        assert "first-key2" not in response.text

    run_app(main, access=Access(keys))


def test_key_files_without_a_key(tmp_path):
    with pytest.raises(InvalidInput, match="--api-keys: cannot be read"):
        read_keys(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n", "utf-8")
    with pytest.raises(InvalidInput, match="holds no key"):
        read_keys(tmp_path / "empty")
    assert len(Keys()) == 0


def test_long_bodies():
    async def main(client, server):
        body = {**ASKED, "documents": ["d" * 2000]}
        announced = await client.post("/v1/rerank", json=body)

        async def parts():
            for _ in range(20):
                yield b" " * 100

        streamed = await client.post("/v1/rerank", content=parts(), headers=JSON)
        for response, size in ((announced, "2_030 bytes"), (streamed, "1_100 bytes or more")):
            assert response.status_code == 413
            words = f"body: {size} are more than max_body_mb=0.000953674."
            assert response.json()["message"].startswith(words)
        assert refusals(server) == {"max_body_mb": 2}
        assert (await client.post("/v1/rerank", json=ASKED)).status_code == 200

    run_app(main, limits=ServerLimits(max_body_mb=1000 / 2**20))


def test_slow_bodies():
    async def main(client, server):
        async def parts():
            yield b"{"
            await asyncio.Event().wait()

        response = await client.post("/v1/rerank", content=parts(), headers=JSON)
        assert response.status_code == 408
        assert "did not come within body_timeout_s=0.05" in response.json()["message"]
        assert refusals(server) == {"body_timeout_s": 1}

    run_app(main, limits=ServerLimits(body_timeout_s=0.05))


def test_memory_that_others_use_is_refused_and_freed():
    async def main(client, server):
        limits = server.limits
        with server.memory.share() as others:
            others.resize(limits.max_bodies_bytes - 300_000)
            assert (await client.post("/v1/rerank", json=ASKED)).status_code == 200
            # Its texts find room, its response, in which each of their letters takes six, does not.
            echoed = {"query": "q", "documents": ["\x01" * 50_000] * 2, "return_documents": True}
            large = await client.post("/voyage/v1/rerank", content=json.dumps(echoed), headers=JSON)
            others.resize(limits.max_bodies_bytes - 100)
            small = await client.post("/v1/rerank", json=ASKED)
            for response in (large, small):
                assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
                words = "memory for bodies and texts (max_bodies_mb=2) is used up"
                assert words in response.json()["detail"]
            assert refusals(server) == {"max_bodies_mb": 2}
        assert server.memory.used_bytes == 0
        assert (await client.post("/v1/rerank", json=ASKED)).status_code == 200
        assert (await client.post("/v1/rerank", content=b"{", headers=JSON)).status_code == 400
        assert server.memory.used_bytes == 0

    run_app(main, limits=ServerLimits(max_bodies_mb=2, max_body_mb=2))


def test_every_limit_of_a_request_is_counted_and_named():
    asked = [
        ("max_json_depth", {**ASKED, "unknown": [[[1]]]}),
        ("max_json_values", {**ASKED, "unknown": [1] * 20}),
        ("max_documents", {**ASKED, "documents": ["d"] * 7}),
        ("max_rank_fields", {**ASKED, "rank_fields": ["a", "b", "c"]}),
        ("max_characters", {**ASKED, "query": "q" * 200}),
    ]

    async def main(client, server):
        for name, body in asked:
            response = await client.post("/v1/rerank", json=body)
            assert response.status_code == 413
            assert f"more than {name}={getattr(server.limits, name)}." in response.json()["message"]
        assert refusals(server) == dict.fromkeys((name for name, _ in asked), 1)

    numbers = {"max_json_depth": 3, "max_json_values": 20, "max_documents": 6}
    run_app(main, limits=ServerLimits(**numbers, max_rank_fields=2, max_characters=200))


def test_a_refused_connection_counts_for_its_limit():
    async def main(client, server):
        for reason in get_args(Reason):
            server.connection_refused(reason)
            assert metric(server, f'echelon_connections_refused_total{{reason="{reason}"}}') == 1
        assert refusals(server) == Counter(EXCEEDED.values())

    run_app(main)


def test_requests_that_the_end_cuts_short_are_counted():
    async def main(client, server):
        asking = asyncio.create_task(client.post("/v1/rerank", json=HOLDING))
        await until(lambda: server.service.snapshot().requests)
        await server.close()
        assert (await asking).status_code == 503
        assert refusals(server) == {"drain_s": 1}

    run_app(main, limits=ServerLimits(drain_s=0.01), wedge_after_s=DAY_S)


def test_long_errors_are_cut():
    async def main(client, server):
        response = await client.post("/v1/rerank", json={**ASKED, "priority": "x" * 10_000})
        assert response.status_code == 422
        message = response.json()["message"]
        assert message.startswith("priority: 'xxx")
        assert len(message) == MAX_MESSAGE + 1

    run_app(main)


def test_cors_is_off_unless_an_origin_is_named():
    origin = {"Origin": "https://shop.example"}

    async def closed(client, server):
        response = await client.post("/v1/rerank", json=ASKED, headers=origin)
        assert "access-control-allow-origin" not in response.headers

    async def opened(client, server):
        response = await client.post("/v1/rerank", json=ASKED, headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://shop.example"
        other = await client.post("/v1/rerank", json=ASKED, headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in other.headers

    run_app(closed)
    run_app(opened, access=Access(origins=("https://shop.example",)))


@pytest.mark.parametrize("name", NAMES)
def test_invalid_limits_are_refused(name):
    with pytest.raises(InvalidInput, match=f"{name}: 0 is not positive"):
        ServerLimits(**{name: 0})


def test_request_ids(caplog):
    async def main(client, server):
        with caplog.at_level(logging.INFO, "echelon.server.routes"):
            given = await client.post("/v1/rerank", json=ASKED, headers={"X-Request-Id": "abc-1"})
            assert given.headers["x-request-id"] == given.json()["id"] == "abc-1"
            odd = await client.post("/v1/rerank", json=ASKED, headers={"X-Request-Id": "a b\tc"})
            assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])
        fields = caplog.records[0].fields
        assert (fields["status"], fields["dialect"], fields["documents"]) == (200, "cohere_v1", 5)

    run_app(main)


def test_log_lines_are_json():
    def line(**record):
        made = logging.makeLogRecord({"name": "echelon.x", "levelname": "INFO", **record})
        return json.loads(JsonFormatter().format(made))

    plain = line(msg="a %s", args=("b",), fields={"status": 200})
    assert (plain["message"], plain["level"], plain["status"]) == ("a b", "info", 200)
    assert "request_id" not in plain
    token = request_id.set("abc")
    try:
        int("oops")
    except ValueError as error:
        broken = line(msg="x", exc_info=(ValueError, error, error.__traceback__))
    request_id.reset(token)
    assert broken["request_id"] == "abc"
    assert "ValueError: invalid literal" in broken["error"]


def test_control_characters_cannot_forge_log_lines():
    odd = "/v1/rerank\n\r\x1b[2J\x85\u2028\u202e\ud800é"
    forged = r"/v1/rerank\u000a\u000d\u001b[2J\u0085\u2028\u202e\ud800é"
    with pytest.raises(ValueError, match="rerank") as caught:
        raise ValueError(odd)
    info = (caught.type, caught.value, caught.tb)
    record = {"msg": "%s", "args": (odd,), "levelname": "INFO", "fields": {"path": odd}}
    plain = TextFormatter("%(levelname)s: %(message)s")
    assert plain.format(logging.makeLogRecord(record)) == f"INFO: {forged}"
    first, *traceback = plain.format(logging.makeLogRecord({**record, "exc_info": info})).split(
        "\n"
    )
    assert first == f"INFO: {forged}"
    assert traceback[-2:] == [
        "    ValueError: /v1/rerank",
        r"    \u000d" + forged.partition("0d")[2],
    ]
    assert all(line.startswith("    ") for line in traceback)
    line = JsonFormatter().format(logging.makeLogRecord({**record, "exc_info": info}))
    assert line.isprintable()
    assert json.loads(line)["path"] == json.loads(line)["message"] == odd
    line.encode()
