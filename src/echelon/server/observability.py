"""Logs: one JSON object a line, or plain lines for people; each knows the request it is about.

OpenTelemetry: a span for each request that ranks, with tokenise, queue and compute below it.

Only where the standard variables or ``--otel`` ask for it; nothing of OpenTelemetry is imported
otherwise. Spans are made after the answer, from the times that it holds, so that a request waits
for nothing. They hold numbers and names, never a query, a document or a key.
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
    from opentelemetry.trace import Span

    from echelon.types import Answer

ID_HEADER = "x-request-id"

request_id: ContextVar[str] = ContextVar("echelon_request_id", default="")
"""The id of the request that the running task is about; empty outside of one."""

_SOUND = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def id_of(headers: Mapping[str, str]) -> str:
    """The caller's id for its request where it is a sound one, else a new one."""
    given = headers.get(ID_HEADER, "")
    return given if _SOUND.fullmatch(given) else uuid4().hex


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    Keys: ``time`` (UTC, milliseconds), ``level``, ``logger``, ``message``, ``request_id`` in a
    request, ``error`` with a traceback, and what the record's ``facts`` hold.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if number := request_id.get():
            line["request_id"] = number
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        line |= getattr(record, "facts", {})
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(style: str, level: str) -> None:
    """Send the logs of Echelon, the HTTP server and the exporter of traces to standard error.

    Args:
        style: ``json`` or ``text``.
        level: the lowest level that is written, such as ``info``.
    """
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else plain)
    for name in ("echelon", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    warnings.showwarning = _log_warning
    # What it says at info (started, waiting) is said by us or is of no use in production.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logger.level))


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of the log, so that a reader of JSON meets nothing else."""
    logging.getLogger("echelon").warning("%s", message)


logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables that name a receiver: one of them turns traces on."""

FLUSH_S = 3
"""At the end the receiver has this time to take the last spans."""

BROKEN = 500
"""From this status on it was the server's fault, which is what a span calls an error."""

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A request that ranks, when it has ended.

    Attributes:
        path: the route.
        headers: the request's; ``traceparent`` says what its span belongs to.
        number: the request's id.
        dialect: its dialect's name.
        status: the HTTP status.
        seconds: how long it took.
        documents: its documents, where they were read.
        answer: the service's answer, where there is one.
        answered_s: seconds from its begin to that answer.
        key: name of the key's holder.
    """

    path: str
    headers: Mapping[str, str]
    number: str
    dialect: str
    status: int
    seconds: float
    documents: int | None = None
    answer: Answer | None = None
    answered_s: float = 0.0
    key: str | None = None


class Traces:
    """Makes spans.

    Args:
        provider: samples, batches and exports them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("echelon", __version__)

    def tell(self, told: SpanRecord) -> str:
        """Make the spans of a request; the trace's id in hexadecimal."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        begin = end - round(told.seconds * _NS)
        span = self._tracer.start_span(
            f"POST {told.path}",
            context=extract(dict(told.headers)),
            kind=SpanKind.SERVER,
            attributes=_attributes(told),
            start_time=begin,
        )
        if told.status >= BROKEN:
            span.set_status(Status(StatusCode.ERROR))
        if told.answer is not None and span.is_recording():
            answered = begin + round(told.answered_s * _NS)
            self._phases(told.answer, answered, set_span_in_context(span))
        span.end(end)
        return _id_of(span)

    def close(self) -> None:
        """Send what is left; a receiver that does not answer is not waited for."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_S)

    def _phases(self, answer: Answer, end: int, context: Any) -> None:
        """Spans of the phases, one after another up to the answer."""
        times = answer.timings
        since = end - round(times.total_s * _NS)
        tokenised = since + round(times.tokenise_s * _NS)
        started = min(end, tokenised + round(times.queue_s * _NS))
        for name, first, last in (
            ("tokenise", since, tokenised),
            ("queue", tokenised, started),
            ("compute", started, end),
        ):
            self._tracer.start_span(name, context=context, start_time=first).end(last)


def open_traces(asked: bool | None) -> Traces | None:  # noqa: FBT001 - a flag that may be unset
    """Traces as the environment says; None where they are off.

    Args:
        asked: on or off; None leaves it to the environment.

    Raises:
        MissingDependency: asked for, and the packages are not installed.
    """
    if not (wanted() if asked is None else asked):
        return None
    try:
        provider = _provider()
    except ImportError as error:
        words = f"Traces need {error.name}. Install it with: pip install 'echelon-rerank[otel]'"
        if asked:
            raise MissingDependency(words) from None
        logger.warning("%s, or start the server with --no-otel.", words)
        return None
    return Traces(provider)


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    return any(environment.get(name) for name in ENDPOINTS)


def _provider() -> TracerProvider:
    """Sampler, limits and receiver come from the standard variables."""
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


def _attributes(told: SpanRecord) -> dict[str, Any]:
    told_of: dict[str, Any] = {
        "http.request.method": "POST",
        "http.route": told.path,
        "http.response.status_code": told.status,
        "echelon.request_id": told.number,
        "echelon.dialect": told.dialect,
    }
    if told.key is not None:
        told_of["echelon.key"] = told.key
    if told.documents is not None:
        told_of["echelon.documents"] = told.documents
    if (answer := told.answer) is not None:
        told_of |= {
            "echelon.tokens": answer.tokens,
            "echelon.truncated_documents": int(np.count_nonzero(answer.truncated_tokens)),
            "echelon.steps": len(answer.batch_sizes),
            "echelon.compute_s": answer.timings.compute_s,
            "echelon.ladder": tuple(step.rung for step in answer.ladder),
        }
        if answer.fallback is not None:
            told_of["echelon.fallback_max_length"] = answer.fallback
    return told_of


def _id_of(span: Span) -> str:
    from opentelemetry.trace import format_trace_id

    return format_trace_id(span.get_span_context().trace_id)
