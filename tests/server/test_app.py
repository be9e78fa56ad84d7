"""The application in this process: answers and errors in every protocol."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
from scorers import Obedient
from served import ASKED, DOCUMENTS, JSON, metric, run_app
from services import ids, scores, until

from echelon.scheduling.admission import AdmissionLimits
from echelon.server import routes
from echelon.server.app import make_app
from echelon.server.protocols import PATHS, PROTOCOLS
from echelon.server.routes import HEADERS

LOGITS = [float(logit) for logit in scores([("q", document) for document in DOCUMENTS])]
ORDER = sorted(range(5), key=lambda i: -LOGITS[i])

HEADED = [(b"host", b"test"), (b"content-type", b"application/json")]
RANKING = {"type": "http", "method": "POST", "path": "/v1/rerank", "headers": HEADED}
RANKING |= {"query_string": b"", "server": ("test", 80), "scheme": "http", "http_version": "1.1"}
"""A request as the application gets it from an ASGI server."""


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def test_every_path_answers_every_protocols_example():
    async def main(client, server):
        for path, them in PATHS.items():
            for protocol in them:
                response = await client.post(path, json={**protocol.example, "explain": True})
                assert response.status_code == 200, (path, protocol.name, response.text)
                msgspec.convert(response.json(), protocol.response)  # of the type described
                assert set(HEADERS) <= {name.title() for name in response.headers}

    run_app(main)


def test_order_scores_and_documents():
    async def main(client, server):
        response = await client.post("/v1/rerank", json={**ASKED, "return_documents": True})
        results = response.json()["results"]
        assert [result["index"] for result in results] == ORDER
        assert [result["document"]["text"] for result in results] == [DOCUMENTS[i] for i in ORDER]
        expected = [sigmoid(LOGITS[i]) for i in ORDER]
        assert [result["relevance_score"] for result in results] == pytest.approx(expected)
        two = await client.post("/v2/rerank", json={**ASKED, "top_n": 2})
        assert [result["index"] for result in two.json()["results"]] == ORDER[:2]
        raw = await client.post("/rerank", json={**ASKED, "raw_scores": True})
        shown = [result["relevance_score"] for result in raw.json()["results"]]
        assert shown == pytest.approx([LOGITS[i] for i in ORDER])
        score = await client.post("/score", json={"text_1": "q", "text_2": DOCUMENTS})
        data = score.json()["data"]
        assert [item["index"] for item in data] == list(range(5))
        assert [item["score"] for item in data] == pytest.approx(list(map(sigmoid, LOGITS)))
        nim = {"query": {"text": "q"}, "passages": [{"text": text} for text in DOCUMENTS]}
        ranking = (await client.post("/v1/ranking", json=nim)).json()["rankings"]
        assert [hit["logit"] for hit in ranking] == pytest.approx([LOGITS[i] for i in ORDER])

    run_app(main)


def test_headers_and_body_explain_the_answer():
    async def main(client, server):
        long = {"query": "q", "documents": ["d" * 100, "e"], "explain": True}
        response = await client.post("/v1/rerank", json=long)
        explained = response.json()["echelon"]
        assert response.headers["X-Echelon-Tokens"] == str(explained["tokens"]) == "65"
        assert response.headers["X-Echelon-Truncated-Documents"] == "1"
        assert response.headers["X-Echelon-Ladder"] == ""
        assert int(response.headers["X-Echelon-Batch-Size"]) >= 1
        assert explained["truncated_tokens"] == [100 + 1 + 3 - 60, 0]
        assert explained["total_ms"] >= explained["queue_ms"] >= 0
        assert "1 of 2 documents were cut" in response.json()["meta"]["warnings"][0]
        chunked = await client.post("/v1/rerank", json={**long, "max_chunks_per_doc": 10})
        assert chunked.json()["echelon"]["truncated_documents"] == 0
        assert "warnings" not in chunked.json()["meta"]
        assert "echelon" not in (await client.post("/v1/rerank", json=ASKED)).json()
        tei = await client.post("/rerank", json={"query": "q", "texts": ["d", "ef"]})
        assert tei.headers["x-compute-characters"] == "4"
        assert tei.headers["x-compute-tokens"] == "11"
        assert "x-queue-time" in tei.headers
        whole = {"query": "q", "texts": ["e", "d" * 100], "truncate": False}
        refused = await client.post("/rerank", json=whole)
        assert refused.status_code == 422
        assert refused.json()["error"].startswith("texts[1]: with its query it has 104 tokens")

    run_app(main, max_length=60)


def test_steps_of_the_oom_ladder_are_reported():
    async def main(client, server):
        response = await client.post("/v1/rerank", json=ASKED)
        assert response.status_code == 200
        assert "drop_caches" in response.headers["X-Echelon-Ladder"]
        assert metric(server, 'echelon_ladder_steps_total{rung="drop_caches"}') >= 1

    run_app(main, opener=partial(Obedient, memory_tokens=40), token_budget=2000)


# Errors.


def test_errors_are_in_the_protocol_of_the_route():
    async def main(client, server):
        for protocol in PROTOCOLS:
            path = protocol.own_paths[0]
            response = await client.post(path, content=b"{", headers=JSON)
            assert response.status_code == 400
            status, body = 400, response.json()
            expected = {"cohere_v1": "message", "cohere_v2": "message", "nim": "message"}
            expected |= {"tei": "error", "vllm": "error", "vllm_score": "error"}
            assert expected.get(protocol.name, "detail") in body, (protocol.name, status)
        wrong = await client.post("/rerank", json={"query": 3, "texts": ["a"]})
        assert wrong.json() == {
            "error": "query: Expected str, got int. See /docs for the fields of this route.",
            "error_type": "Validation",
        }
        many = await client.post("/v2/rerank", json={"query": "q", "documents": ["d"] * 7})
        assert many.status_code == 413
        assert many.json()["message"].startswith("documents: 7 are more than the 6 of one request")

    run_app(main, bounds=AdmissionLimits(max_documents=6))


def test_unknown_paths_and_methods():
    async def main(client, server):
        missing = await client.post("/v3/rerank", json=ASKED)
        assert (missing.status_code, missing.json()["message"]) == (
            404,
            "There is no POST /v3/rerank. See /docs.",
        )
        wrong = await client.get("/v1/rerank")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.headers["x-request-id"]

    run_app(main)


def test_an_error_of_the_scorer_names_the_document(caplog):
    async def main(client, server):
        caplog.set_level(logging.CRITICAL, "echelon")
        body = {"query": "q", "texts": ["d", chr(9009)]}
        response = await client.post("/rerank", json=body)
        assert response.status_code == 424
        assert response.json()["error_type"] == "Backend"
        assert response.json()["error"].startswith("texts[1]: the model gave nan")

    assert ids(chr(9009)).tolist() == [9009]  # scorers.NAN
    run_app(main)


def test_a_bug_is_answered_with_500(caplog, monkeypatch):
    def broken(options):
        raise KeyError("oops")

    async def main(client, server):
        caplog.set_level(logging.CRITICAL, "echelon")
        monkeypatch.setattr("echelon.server.routes.results_of", lambda *_: broken(_))
        response = await client.post("/v1/rerank", json=ASKED)
        assert response.status_code == 500
        assert "This is a bug" in response.json()["message"]

    run_app(main)


def test_a_full_server_says_when_to_try_again():
    async def main(client, server):
        responses = await asyncio.gather(
            *(client.post("/v1/rerank", json={**ASKED, "query": f"{i}"}) for i in range(6))
        )
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 4
        assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
        assert metric(server, 'echelon_refused_total{reason="requests_full"}') == 4
        assert metric(server, 'echelon_http_requests_total{dialect="cohere_v1",status="429"}') == 4

    run_app(main, bounds=AdmissionLimits(max_requests=2))


@pytest.mark.parametrize("header", [False, True])
def test_deadlines(header):
    async def main(client, server):
        body = {**ASKED, "documents": ["d" * 100] * 100}
        headers = {"X-Request-Timeout-Ms": "200"} if header else {}
        more = {} if header else {"timeout_ms": 200}
        response = await client.post("/v1/rerank", json={**body, **more}, headers=headers)
        assert response.status_code == 504
        assert metric(server, 'echelon_deadline_requests_total{outcome="missed"}') == 1
        for wrong in ("0", "-1", "nan", "inf", "soon"):
            refused = await client.post(
                "/v1/rerank", json=ASKED, headers={"X-Request-Timeout-Ms": wrong}
            )
            assert refused.status_code == 422
            assert refused.json()["message"].startswith("X-Request-Timeout-Ms: is no positive")
        own = {**ASKED, "timeout_ms": 50_000, "priority": "low"}
        for name in ("X-Request-Timeout-Ms", "X-Request-Priority"):  # checked, though not used
            refused = await client.post("/v1/rerank", json=own, headers={name: "soon"})
            assert (refused.status_code, name in refused.text) == (422, True)
        patient = await client.post("/v1/rerank", json={**ASKED, "timeout_ms": 50_000})
        assert patient.status_code == 200
        assert metric(server, 'echelon_deadline_requests_total{outcome="met"}') == 1

    run_app(main, opener=partial(Obedient, pace_s=0.0001))


def test_a_client_that_disconnects_has_its_work_cancelled():
    async def main(client, server):
        body = {**ASKED, "documents": [f"{i} " + "d" * 100 for i in range(1000)]}
        await _disconnect_while_queued(server, json.dumps(body).encode())
        await until(lambda: not server.service.snapshot().load.pairs)
        assert metric(server, 'echelon_requests_total{outcome="cancelled"}') == 1

    run_app(main, opener=partial(Obedient, pace_s=0.0001))


def test_an_answer_is_sent_before_it_is_counted_and_logged():
    async def main(_, server):
        count = 'echelon_http_requests_total{dialect="cohere_v1",status="200"}'
        parts = [{"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}]
        counted = {}

        async def receive():
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message):
            counted[message["type"]] = metric(server, count)

        await make_app(server)(RANKING, receive, send)
        assert counted == {"http.response.start": 0.0, "http.response.body": 0.0}
        assert metric(server, count) == 1.0

    run_app(main)


def test_a_disconnect_at_the_moment_of_the_answer_cancels_nothing():
    async def submit(_):
        await asyncio.sleep(0)
        return "answer"

    async def receive():
        return {"type": "http.disconnect"}

    async def main():
        server = SimpleNamespace(service=SimpleNamespace(submit=submit))
        context = SimpleNamespace(http=SimpleNamespace(receive=receive), server=server)
        assert await routes._until_disconnect(context, None) == "answer"
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(main())


async def _disconnect_while_queued(server, body: bytes) -> None:
    """A request whose client hangs up once its work waits."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()
    sent = []

    async def receive():
        if parts:
            return parts.pop()
        await until(lambda: server.service.snapshot().load.pairs)
        gone.set()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await make_app(server)(RANKING, receive, send)
    assert gone.is_set()
    assert sent[0]["status"] == 499
