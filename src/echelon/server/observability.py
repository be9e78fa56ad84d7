"""Logs with the id of the request, as JSON or text, and OpenTelemetry traces.

Each request that ranks has a span, with spans for tokenise, queue and compute below it. Spans are
made after the response, from the times in it, and hold numbers and names, never a query, a document
or a key. OpenTelemetry is imported only where the standard variables or ``--otel`` turn traces on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from echelon import __version__
from echelon.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import TracerProvider

    from echelon.types import Answer

ID_HEADER = "x-request-id"

request_id: ContextVar[str] = ContextVar("echelon_request_id", default="")
"""The id of the request that the running task handles; else empty."""

_VALID_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def id_of(headers: Mapping[str, str]) -> str:
    """The client's id of its request if it is valid, else a new one."""
    given = headers.get(ID_HEADER, "")
    return given if _VALID_ID.fullmatch(given) else uuid4().hex


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, change how a terminal shows it, or cannot be written in UTF-8."""


def escaped(text: str) -> str:
    """The text with control characters in their form for JSON: clients cannot forge log lines."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class TextFormatter(logging.Formatter):
    """A record as one line of text; the lines of a traceback are indented below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class' name
        """Write the line."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the base class' name
        """Write the lines of a traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {escaped(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    Keys: ``time`` (UTC, milliseconds), ``level``, ``logger``, ``message``, ``request_id`` in a
    request, ``error`` with a traceback, and the items of the record's ``fields``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        line |= getattr(record, "fields", {})
        return escaped(json.dumps(line, ensure_ascii=False, default=str))


def set_up(style: str | None, level: str) -> None:
    """Send the logs of Echelon, the HTTP server and the exporter of traces to standard error.

    ``style`` is ``json`` or ``text``, None text on a terminal and JSON elsewhere; ``level`` is the
    lowest level that is written.
    """
    style = style or ("text" if sys.stderr.isatty() else "json")
    handler = logging.StreamHandler(sys.stderr)
    plain = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else plain)
    for name in ("echelon", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    warnings.showwarning = _log_warning
    # Its messages at info (started, waiting) repeat ours or are of no use in production.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logger.level))


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Log a warning, so that standard error holds JSON only."""
    logging.getLogger("echelon").warning("%s", message)


logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables with the address of a collector; either turns traces on."""

FLUSH_S = 3
"""Seconds at the end for the collector to take the last spans."""

SERVER_ERROR = 500
"""Lowest status that marks a span as an error: the server's fault."""

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A request that has ended.

    Attributes:
        headers: ``traceparent`` names the parent of its span.
        documents: number of its documents; None if the body was not read.
        answered_s: seconds from its start to the service's answer.
        key: name of its API key.
    """

    path: str
    headers: Mapping[str, str]
    request_id: str
    protocol: str
    status: int
    seconds: float
    documents: int | None = None
    answer: Answer | None = None
    answered_s: float = 0.0
    key: str | None = None


class Traces:
    """Makes spans; the provider samples, batches and exports them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("echelon", __version__)

    def record(self, request: SpanRecord) -> str:
        """Make the spans of a request; return the trace's id in hexadecimal."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import (
            SpanKind,
            Status,
            StatusCode,
            format_trace_id,
            set_span_in_context,
        )

        end = time.time_ns()
        begin = end - round(request.seconds * _NS)
        span = self._tracer.start_span(
            f"POST {request.path}",
            context=extract(dict(request.headers)),
            kind=SpanKind.SERVER,
            attributes=_attributes(request),
            start_time=begin,
        )
        if request.status >= SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        if request.answer is not None and span.is_recording():
            # Spans of the phases, one after another up to the answer.
            answered = begin + round(request.answered_s * _NS)
            times, context = request.answer.timings, set_span_in_context(span)
            since = answered - round(times.total_s * _NS)
            tokenised = since + round(times.tokenise_s * _NS)
            started = min(answered, tokenised + round(times.queue_s * _NS))
            for name, first, last in (
                ("tokenise", since, tokenised),
                ("queue", tokenised, started),
                ("compute", started, answered),
            ):
                self._tracer.start_span(name, context=context, start_time=first).end(last)
        span.end(end)
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Send the last spans, for three seconds at most."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_S)


def open_traces(enabled: bool | None) -> Traces | None:  # noqa: FBT001 - a flag that may be unset
    """Traces, or None where they are off; ``enabled=None`` leaves it to the environment."""
    if not (enabled_by() if enabled is None else enabled):
        return None
    try:
        provider = _provider()
    except ImportError as error:
        missing = MissingDependency(f"Traces need {error.name}.", "otel", ", or give --no-otel.")
        if enabled:
            raise missing from None
        logger.warning("%s", missing)
        return None
    return Traces(provider)


def enabled_by(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard variables turn traces on."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    return any(environment.get(name) for name in ENDPOINTS)


def _provider() -> TracerProvider:
    """Sampler, limits and collector come from the standard variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": "echelon", "service.version": __version__})
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _attributes(request: SpanRecord) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": "POST",
        "http.route": request.path,
        "http.response.status_code": request.status,
        "echelon.request_id": request.request_id,
        "echelon.dialect": request.protocol,
        "echelon.key": request.key,
        "echelon.documents": request.documents,
    }
    if (answer := request.answer) is not None:
        found |= {
            "echelon.tokens": answer.tokens,
            "echelon.truncated_documents": int(np.count_nonzero(answer.truncated_tokens)),
            "echelon.steps": len(answer.batch_sizes),
            "echelon.compute_s": answer.timings.compute_s,
            "echelon.ladder": tuple(step.rung for step in answer.ladder),
            "echelon.fallback_max_length": answer.fallback,
        }
    return {name: value for name, value in found.items() if value is not None}
