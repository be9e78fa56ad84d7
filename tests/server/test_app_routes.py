"""Routes that do not rank: state, OpenAPI, metrics; start and stop of the application."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape
from pathlib import Path

import httpx
import pytest
from served import ASKED, metric, run_app
from services import service

from echelon.errors import ModelNotFound, ShuttingDown
from echelon.server.app import STATE_ROUTES, make_app
from echelon.server.context import ServerContext
from echelon.server.metrics import Metrics
from echelon.server.openapi import ERRORS, GROUPS, describe
from echelon.server.openapi import STATE_ROUTES as DESCRIBED
from echelon.server.protocols import PATHS, PROTOCOLS, SHARED
from echelon.server.protocols.nim import NIM
from echelon.server.routes import HEADERS


def test_state_routes():
    async def main(client, server):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"]) == ("the-model", "model")
        info = (await client.get("/info")).json()
        assert info["model_id"] == "the-model"
        assert info["max_input_length"] == 512
        assert "reranker" in info["model_type"]
        assert (await client.get("/health")).json()["status"] == "ok"
        assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
        await server.service.drain(0.01)
        late = await client.get("/ready")
        assert (late.status_code, late.json()["ready"]) == (503, False)
        refused = await client.post("/v1/rerank", json=ASKED)
        assert refused.status_code == 503

    run_app(main)


def test_routes_before_the_start_and_after_a_failed_one():
    async def fails():
        raise ModelNotFound("no such folder. Name another.")

    async def main():
        server = ServerContext(fails, "m", Metrics())
        with pytest.raises(ModelNotFound):
            await server.open()
        assert isinstance(server.failure, ModelNotFound)
        with pytest.raises(ShuttingDown):
            _ = server.service
        transport = httpx.ASGITransport(make_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/v1/models")).status_code == 503
            assert (await client.post("/v1/rerank", json=ASKED)).status_code == 503
            assert (await client.get("/metrics")).status_code == 200
        await server.close()

    asyncio.run(main())


def test_the_application_starts_and_stops_the_service():
    async def main():
        made = service()

        async def launch():
            await made.start()
            return made

        found = []
        app = make_app(ServerContext(launch, "m", Metrics()))
        news = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive():
            return news.pop(0)

        async def send(message):
            found.append(message["type"])
            if message["type"] == "lifespan.startup.complete":
                assert (await made.ready()).ready

        await app({"type": "lifespan"}, receive, send)
        assert found == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert not (await made.ready()).ready

    asyncio.run(main())


def test_a_failed_start_is_reported_without_a_traceback():
    async def fails():
        raise ModelNotFound("no such folder. Name another.")

    async def main():
        found = []

        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            found.append(message)

        with pytest.raises(ModelNotFound):
            await make_app(ServerContext(fails, "m", Metrics()))(
                {"type": "lifespan"}, receive, send
            )
        assert found == [{"type": "lifespan.startup.failed"}]

    asyncio.run(main())


def test_the_openapi_description_is_complete_and_needs_no_other_server():
    description = describe()
    assert set(description["paths"]) == set(SHARED) | set(STATE_ROUTES)
    assert DESCRIBED.keys() == STATE_ROUTES.keys()
    known = set(description["components"]["schemas"])
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description)))
    assert used <= known
    for path, them in SHARED.items():
        found = description["paths"][path]["post"]
        examples = found["requestBody"]["content"]["application/json"]["examples"]
        assert set(examples) == {protocol.name for protocol in them}
        statuses = {"200", *map(str, ERRORS)} - {"404", "405"}  # those have no operation
        refused = {"422", "424", "500", "507"}  # each API has others
        assert set(found["responses"]) - refused == statuses - refused, path

    async def main(client, server):
        page = (await client.get("/docs")).text
        sources = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(sources) == 9
        for source in sources:
            assert source.startswith("/")
            assert (await client.get(source)).status_code == 200
        found = (await client.get("/openapi.json")).json()
        assert found["openapi"].startswith("3.0.")  # the page under /docs reads no other
        assert '"null"' not in json.dumps(found)
        assert '"nullable": true' in json.dumps(found)
        assert found["info"]["title"] == "Echelon: the-model"
        routes = {route.name for route in make_app(server).app.routes}
        assert set(PATHS) | set(STATE_ROUTES) <= routes

    run_app(main)


def test_nvidias_hosted_path_takes_any_name():
    body = dict(NIM.example)

    async def main(client, server):
        plain = (await client.post("/v1/ranking", json=body)).json()
        for name in ("nvidia/llama-3_2-nv-rerankqa-1b-v2", "one", "a%2Fb", "%C3%8A%0A"):
            path = f"/v1/retrieval/{name}/reranking"
            assert (await client.post(path, json=body)).json() == plain
            wrong = await client.get(path)
            assert (wrong.status_code, wrong.json()["object"]) == (405, "error")
        for path in ("/v1/retrieval/reranking", "/v1/retrieval/a/embedding"):
            assert (await client.post(path, json=body)).status_code == 404

    run_app(main)


def test_every_route_has_a_group():
    description = describe()
    routes = [route for path in description["paths"].values() for route in path.values()]
    assert {name for route in routes for name in route["tags"]} == set(GROUPS)
    assert all(len(route["tags"]) == 1 for route in routes)


def test_the_path_prefix_of_a_proxy_is_escaped_in_the_docs():
    root = '/a"><script>alert(1)</script>'

    async def main(client, server):
        behind = httpx.ASGITransport(make_app(server), root_path=f"{root}/")
        async with httpx.AsyncClient(transport=behind, base_url="http://test") as proxied:
            page = (await proxied.get("/docs")).text
        assert page.count("<script") == 2
        found = re.findall(r'(?:src|href|data-url)="([^"]+)"', page)
        assert {unescape(address).removeprefix(root) for address in found} == {
            "/docs/assets/swagger-ui.css",
            "/docs/assets/swagger-ui-bundle.js",
            *("/", "/dashboard", "/docs", "/pages/docs.css"),
            "/pages/docs.js",
            "/pages/icon.svg",
            "/openapi.json",
        }

    run_app(main)


def test_metrics_count_what_happens():
    async def main(client, server):
        for _ in range(3):
            await client.post("/v1/rerank", json=ASKED)
        answered = metric(server, 'echelon_requests_total{outcome="answered"}')
        assert answered == metric(server, 'echelon_request_seconds_count{phase="queue"}') == 3
        assert metric(server, "echelon_documents_total") == 15
        assert metric(server, "echelon_tokens_total") > 0
        assert metric(server, "echelon_padding_tokens_total") == 0
        assert metric(server, "echelon_workers_up") == 1
        assert metric(server, "echelon_token_budget") == 2048
        assert metric(server, "echelon_draining") == 0
        assert metric(server, "echelon_step_seconds_count") == metric(
            server, "echelon_step_actual_over_predicted_count"
        )
        name = 'echelon_http_requests_total{dialect="cohere_v1",status="200"}'
        assert metric(server, name) == 3
        assert metric(server, 'echelon_worker_changes_total{state="up"}') == 1

    run_app(main)


def test_serving_page_names_every_metric_header_path_and_status():
    page = (Path(__file__).parents[2] / "docs/SERVING.md").read_text("utf-8")
    metrics = {
        collected.name + ("_total" if collected.type == "counter" else "")
        for collected in Metrics().registry.collect()
    }
    listed = set(re.findall(r"^\| `(echelon_\w+)`", page, re.MULTILINE))
    assert listed == metrics
    for name in (*HEADERS, *SHARED, *STATE_ROUTES, *(d.title for d in PROTOCOLS)):
        assert name in page, name
    statuses = set(re.findall(r"^\| (\d{3}) \|", page, re.MULTILINE))
    assert statuses == set(map(str, ERRORS))
