"""Traces: a span for each request, below the caller's, and no word of any text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from scorers import RAISE, Obedient
from served import ASKED, JSON, LiveFake, run_app

from echelon.errors import MissingDependency
from echelon.server import observability
from echelon.server.auth import Access, ApiKey, Keys
from echelon.server.observability import ENDPOINTS, SpanRecord, Traces, enabled_by, open_traces
from echelon.types import Answer, Timings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "a-secret-word"


@pytest.fixture
def seen(monkeypatch):
    """Spans that were made, and traces that keep them."""
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter, Traces(provider)
    provider.shutdown()


def spans_of(exporter) -> dict:
    spans = {span.name: span for span in exporter.get_finished_spans()}
    exporter.clear()
    return spans


def test_a_request_is_a_span_with_its_phases_below(seen, caplog):
    exporter, traces = seen

    async def main(client, server):
        server.traces = traces
        caplog.set_level("INFO", "echelon.server.routes")
        asked = {"query": SECRET, "documents": [SECRET + "d" * 100, "e"]}
        headers = {**TRACEPARENT, "X-Request-Id": "abc-1", "X-Api-Key": "the-key"}
        response = await client.post("/v1/rerank", json=asked, headers=headers)
        assert response.status_code == 200
        spans = spans_of(exporter)
        assert set(spans) == {"POST /v1/rerank", "tokenise", "queue", "compute"}
        root = spans["POST /v1/rerank"]
        assert (root.kind, root.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
        assert (root.context.trace_id, root.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
        assert dict(root.attributes) == {
            "http.request.method": "POST",
            "http.route": "/v1/rerank",
            "http.response.status_code": 200,
            "echelon.request_id": "abc-1",
            "echelon.dialect": "cohere_v1",
            "echelon.key": "shop",
            "echelon.documents": 2,
            "echelon.tokens": int(response.headers["X-Echelon-Tokens"]),
            "echelon.truncated_documents": 1,
            "echelon.steps": 1,
            "echelon.compute_s": root.attributes["echelon.compute_s"],
            "echelon.ladder": (),
        }
        assert caplog.records[-1].fields["trace_id"] == TRACE
        check_phases(root, spans, response)
        assert SECRET not in repr([span.to_json() for span in spans.values()])
        assert "the-key" not in repr([span.to_json() for span in spans.values()])

    keys = Keys([ApiKey("the-key", "shop")])
    opener = partial(Obedient, pace_s=0.0005)
    run_app(main, access=Access(keys), max_length=60, opener=opener)


def check_phases(root, spans, response) -> None:
    """They lie in the request, one after another, as long as the headers say."""
    phases = [spans[name] for name in ("tokenise", "queue", "compute")]
    for phase in phases:
        assert phase.parent.span_id == root.context.span_id
        assert root.start_time <= phase.start_time <= phase.end_time <= root.end_time
    for before, after in pairwise(phases):
        assert before.end_time == after.start_time
    for phase, header in zip(phases, ("Tokenise", "Queue", "Compute"), strict=True):
        longer_ms = (phase.end_time - phase.start_time) / 1e6
        longer_ms -= float(response.headers[f"X-Echelon-{header}-Ms"])
        assert longer_ms > -0.01
        assert longer_ms < 0.01 or header == "Compute"  # which goes on to the answer


def test_errors_are_in_the_span(seen, caplog):
    exporter, traces = seen

    async def main(client, server):
        server.traces = traces
        caplog.set_level("CRITICAL", "echelon")
        await client.post("/v1/rerank", content=b"{", headers=JSON)
        (span,) = spans_of(exporter).values()
        assert span.attributes["http.response.status_code"] == 400
        assert span.status.status_code is StatusCode.UNSET  # the caller's fault
        assert span.parent is None
        assert "echelon.documents" not in span.attributes
        await client.post("/v1/rerank", json={"query": "q", "documents": [chr(RAISE)]})
        (span,) = spans_of(exporter).values()
        assert span.attributes["http.response.status_code"] == 500
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["echelon.documents"] == 1

    run_app(main)


def test_a_fallback_is_in_the_span(seen):
    exporter, traces = seen
    logits, lost = np.zeros(1, np.float32), np.zeros(1, np.int32)
    for fallback in (None, 64):
        answer = Answer(logits, lost, 9, 9, Timings(), fallback=fallback)
        traces.record(SpanRecord("/v1/rerank", {}, "1", "cohere_v1", 200, 0.1, 1, answer))
        span = spans_of(exporter)["POST /v1/rerank"]
        assert span.attributes.get("echelon.fallback_max_length") == fallback


def test_a_trace_that_is_not_sampled_makes_no_spans(seen):
    exporter, traces = seen

    async def main(client, server):
        server.traces = traces
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert (await client.post("/v1/rerank", json=ASKED, headers=headers)).status_code == 200
        assert spans_of(exporter) == {}

    run_app(main)


# When.


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_the_environment_decides(environment, on):
    assert enabled_by(environment) is on


def test_packages_that_are_missing(monkeypatch, caplog):
    def absent():
        raise ModuleNotFoundError("No module named 'opentelemetry'", name="opentelemetry")

    monkeypatch.setattr(observability, "_provider", absent)
    with pytest.raises(MissingDependency, match=r"Traces need opentelemetry.*\[otel\]"):
        open_traces(enabled=True)
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:1")
    assert open_traces(None) is None
    assert "--no-otel" in caplog.text
    assert open_traces(enabled=False) is None


def test_nothing_is_imported_where_traces_are_off():
    code = (
        "import os, sys\n"
        f"[os.environ.pop(name, None) for name in {ENDPOINTS}]\n"
        "import echelon.server.http_server, echelon.server.observability\n"
        "assert echelon.server.observability.open_traces(None) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# Over the wire.


class Receiver(ThreadingHTTPServer):
    """Takes spans as a collector does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Taker)
        self.got: list = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Taker(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def receiver():
    with Receiver() as made:
        yield made
        made.shutdown()


def test_a_server_sends_its_spans_and_the_last_ones_when_it_ends(receiver):
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=ours",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=tests",
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
    }
    with LiveFake(environment) as server:
        response = httpx.post(f"{server.url}/rerank", json=ASKED, headers=TRACEPARENT)
        assert response.status_code == 200
        assert receiver.got == []
        assert server.end(signal.SIGTERM) == 0
        (line,) = [line for line in server.lines if line.get("path") == "/rerank"]
        assert line["trace_id"] == TRACE
    ((path, headers, body),) = receiver.got
    assert (path, headers["x-tenant"]) == ("/v1/traces", "ours")
    (group,) = ExportTraceServiceRequest.FromString(body).resource_spans
    named = {item.key: item.value.string_value for item in group.resource.attributes}
    assert named["service.name"] == "echelon"
    assert named["deployment.environment.name"] == "tests"
    spans = [span for scope in group.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == ["POST /rerank", "compute", "queue", "tokenise"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}


def test_a_missing_collector_affects_no_request():
    environment = {ENDPOINTS[0]: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with LiveFake(environment) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/rerank", json=ASKED).status_code == 200
        assert server.end(signal.SIGTERM) == 0
        assert all(isinstance(line, dict) for line in server.lines), json.dumps(server.lines)
