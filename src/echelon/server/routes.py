"""The routes that rank: read the body, submit it to the service, write response or error.

Results are sorted by logit; the sigmoid is applied to the scores that are shown, in float64, so
that scores near 1 never tie.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from echelon.errors import (
    EchelonError,
    InvalidInput,
    Overloaded,
    RateLimited,
    ScoringFailed,
    ShuttingDown,
)
from echelon.messages import N_
from echelon.server.body import SMALL_BYTES
from echelon.server.http_checks import check_json
from echelon.server.observability import SpanRecord, request_id
from echelon.server.protocols import choose, read
from echelon.server.protocols.base import (
    ErrorResponse,
    RequestTexts,
    RerankResponse,
    RerankResult,
)
from echelon.server.protocols.tei import TEI

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Receive, Scope, Send

    from echelon.server.auth import ApiClient
    from echelon.server.body import MemoryShare
    from echelon.server.context import ServerContext
    from echelon.server.protocols.base import ApiProtocol, Body, ResponseOptions
    from echelon.types import Answer, RerankRequest

logger = logging.getLogger(__name__)

_PLACE = re.compile(r"pairs\[(\d+)\](\.document|\.query)?")

CLIENT_GONE = 499
"""Status in metrics and logs of a request whose client went away; it is never sent."""


MAX_MESSAGE = 2000
"""Characters of an error's message."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request while it is handled."""

    server: ServerContext
    http: Request
    memory: MemoryShare
    protocol: ApiProtocol  # the body's; until the body is read, the last of its path
    client: ApiClient | None = None  # owner of its key; None until that is known
    documents: int | None = None  # None until the body is read
    deadline: float | None = None
    answer: Answer | None = None
    answered_s: float = 0.0  # seconds from its begin to the answer
    log_fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankRoute:
    """The route of one path, an ASGI application; each body is of one of the protocols."""

    server: ServerContext
    candidates: tuple[ApiProtocol, ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; see ASGI."""
        began = time.perf_counter()
        # The memory is freed when the response was sent, or the client has gone.
        with self.server.memory.share() as memory:
            http = Request(scope, receive)
            context = RequestContext(self.server, http, memory, self.candidates[-1])
            response = await _respond(context, self.candidates)
            seconds = time.perf_counter() - began
            await response(scope, receive, send)
        await _record(context, response.status_code, seconds)


async def _respond(context: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    try:
        return await _answer(context, candidates)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except EchelonError as error:
        if isinstance(error, RateLimited) and context.client is not None:
            context.server.rate_limited(context.client.name)
        if error.limit is not None:
            context.server.limit_exceeded(error.limit)
        return error_response(error, context.protocol)
    except Exception as error:
        logger.exception("A request met an unexpected error. This is a bug.")
        message = f"{type(error).__name__}: {error}. This is a bug; the log has more."
        return error_response(ScoringFailed(message), context.protocol)


async def _answer(context: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    server = context.server
    clock = server.service.clock
    began = clock()
    _authenticate(context, began)
    check_json(context.http.headers)
    request, options = await _read(context, candidates, began)
    context.documents, context.deadline = len(request.pairs), request.deadline
    answer = context.answer = await _within_limit(context, request)
    context.answered_s = clock() - began
    explained = _explanation(answer)
    context.log_fields["documents"] = context.documents
    for name in ("tokens", "queue_ms", "tokenise_ms", "compute_ms"):
        context.log_fields[name] = explained[name]
    if answer.fallback is not None:
        context.log_fields["fallback"] = explained["fallback"]
    response = RerankResponse(
        request_id=request_id.get(),
        created=int(time.time()),
        model=server.model,
        results=results_of(answer, options),
        tokens=answer.tokens,
        with_documents=options.documents is not None,
        warnings=_warnings_of(answer),
    )
    content = context.protocol.write(response)
    if options.explain and isinstance(content, dict):
        content["echelon"] = explained
    headers = headers_of(answer)
    if context.protocol is TEI:
        headers |= _tei_headers(answer, request)
    encoded = as_json(content, 200, headers)
    size, held = len(encoded.body), context.memory.bytes
    # It takes the place of the texts. A short one is never refused, its work is done.
    context.memory.resize(size if size > SMALL_BYTES else min(size, held))
    return encoded


async def _read(
    context: RequestContext, candidates: tuple[ApiProtocol, ...], began: float
) -> tuple[RerankRequest, ResponseOptions]:
    server, http, memory = context.server, context.http, context.memory
    body = await memory.read(http, server.limits)

    def parse() -> tuple[RerankRequest, ResponseOptions]:
        context.protocol = choose(candidates, body)
        texts = RequestTexts(server.limits, memory.resize)
        return read(context.protocol, body, http.headers, began, texts)

    return await server.parser.run(body, server.limits, parse)


def _authenticate(context: RequestContext, now: float) -> None:
    """Find the key's owner; one that has used up its limit is refused before its body is read."""
    keys = context.server.access.keys
    client = context.client = keys.authenticate(context.http.headers)
    if len(keys):
        context.log_fields["key"] = client.name
    if client.bucket is not None:
        client.bucket.check(1, now)


async def _within_limit(context: RequestContext, request: RerankRequest) -> Answer:
    """Submit a request within its key's limit.

    One that is refused unread does not count. Documents whose scores were cached are given back.
    """
    bucket = context.client.bucket if context.client else None
    if bucket is None:
        return await _until_disconnect(context, request)
    documents = len(request.pairs)
    bucket.take(documents, context.server.service.clock())
    try:
        answer = await _until_disconnect(context, request)
    except (InvalidInput, Overloaded, ShuttingDown) as error:
        if not error.tokenised:
            bucket.give_back(documents)
        raise
    bucket.give_back(answer.cached)
    return answer


async def _until_disconnect(context: RequestContext, request: RerankRequest) -> Answer:
    """Submit a request; if the client goes away first, its work is taken out of the queue.

    The service is awaited in this task, not in one of its own: that would cost an answer more
    turns of the event loop.
    """
    submitting = asyncio.current_task()
    if submitting is None:
        raise RuntimeError("a request is answered outside of a task. This is a bug.")
    watching = asyncio.ensure_future(_disconnect(context.http))
    waiting, gone = True, False

    def cancel(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if waiting:  # also called when watching is cancelled, perhaps after the answer
            gone = True
            submitting.cancel()

    watching.add_done_callback(cancel)
    try:
        return await context.server.service.submit(request)
    except asyncio.CancelledError:
        if gone and not submitting.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        waiting = False
        watching.cancel()


async def _disconnect(http: Request) -> None:
    """Return when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def error_response(error: EchelonError, protocol: ApiProtocol) -> Response:
    """The one place where an error becomes a response."""

    def renamed(place: re.Match[str]) -> str:  # pairs[3].document is texts[3] for TEI
        return "query" if place[2] == ".query" else f"{protocol.noun}[{place[1]}]"

    message = _PLACE.sub(renamed, str(error))
    if len(message) > MAX_MESSAGE:  # it quotes what the client sent
        message = f"{message[:MAX_MESSAGE]}…"
    status, body = protocol.write_error(ErrorResponse(error, message, request_id.get()))
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = retry_after(error.retry_after_s)
    return as_json(body, status, headers)


def retry_after(seconds: float) -> str:
    """``Retry-After`` in whole seconds, rounded up, at least one."""
    return str(max(1, math.ceil(seconds)))


def as_json(content: Body, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    encoded = b"" if content is None else msgspec.json.encode(content)
    return Response(encoded, status, dict(headers or {}), media_type="application/json")


HEADERS = {
    "X-Echelon-Queue-Ms": N_("milliseconds in the queue"),
    "X-Echelon-Tokenise-Ms": N_("milliseconds of tokenising"),
    "X-Echelon-Compute-Ms": N_("milliseconds of the steps that held its pairs"),
    "X-Echelon-Total-Ms": N_("milliseconds from its arrival at the service to the answer"),
    "X-Echelon-Tokens": N_("tokens that the model saw"),
    "X-Echelon-Truncated-Documents": N_("documents that lost tokens"),
    "X-Echelon-Batch-Size": N_("pairs of the largest step that held pairs of it"),
    "X-Echelon-Ladder": N_("memory-ladder steps that it went through, separated by commas"),
    "X-Echelon-Fallback": N_(
        "max_length=N where the queue was so long that pairs were cut to N "
        "tokens, as configured for low priority; else empty"
    ),
}
"""Headers of every response with results, and their meaning."""


def headers_of(answer: Answer) -> dict[str, str]:
    """The headers of :data:`HEADERS`."""
    values: tuple[object, ...] = (
        *_milliseconds(answer).values(),
        answer.tokens,
        int(np.count_nonzero(answer.truncated_tokens)),
        max(answer.batch_sizes, default=0),
        ",".join(step.rung for step in answer.ladder),
        "" if answer.fallback is None else f"max_length={answer.fallback}",
    )
    return {name: str(value) for name, value in zip(HEADERS, values, strict=True)}


def _tei_headers(answer: Answer, request: RerankRequest) -> dict[str, str]:
    """Headers that TEI's clients read: whole milliseconds, characters, tokens."""
    times = answer.timings
    characters = len(request.pairs[0][0]) + sum(len(document) for _, document in request.pairs)
    return {
        "x-compute-type": "echelon",
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(answer.tokens),
        "x-compute-time": str(round(times.total_s * 1000)),
        "x-total-time": str(round(times.total_s * 1000)),
        "x-tokenization-time": str(round(times.tokenise_s * 1000)),
        "x-queue-time": str(round(times.queue_s * 1000)),
        "x-inference-time": str(round(times.compute_s * 1000)),
    }


def _explanation(answer: Answer) -> dict[str, Any]:
    """Where a request's time went and what happened to it, for the body."""
    return _milliseconds(answer) | {
        "tokens": answer.tokens,
        "cost_tokens": answer.cost_tokens,
        "truncated_documents": int(np.count_nonzero(answer.truncated_tokens)),
        "truncated_tokens": answer.truncated_tokens.tolist(),
        "cached_documents": answer.cached,
        "batch_sizes": list(answer.batch_sizes),
        "ladder": [{"rung": s.rung, "detail": s.detail, "remedy": s.remedy} for s in answer.ladder],
        "fallback": None if answer.fallback is None else {"max_length": answer.fallback},
    }


def _milliseconds(answer: Answer) -> dict[str, Any]:
    names = ("queue", "tokenise", "compute", "total")
    return {f"{name}_ms": round(getattr(answer.timings, f"{name}_s") * 1000, 3) for name in names}


def results_of(answer: Answer, options: ResponseOptions) -> list[RerankResult]:
    """Results: best first unless input order was asked for, at most ``top_n``."""
    logits = answer.logits.astype(np.float64)
    order = np.argsort(-logits, kind="stable") if options.ranked else np.arange(len(logits))
    order = order[: options.top_n]
    kept = logits[order]
    shown = kept if options.raw_scores else np.exp(-np.logaddexp(0.0, -kept))
    rows = zip(order.tolist(), shown.tolist(), kept.tolist(), strict=True)
    documents = options.documents
    if documents is None:
        return [RerankResult(index, score, logit) for index, score, logit in rows]
    return [RerankResult(index, score, logit, documents[index]) for index, score, logit in rows]


def _warnings_of(answer: Answer) -> tuple[str, ...]:
    """Warnings for the caller: truncated documents, actions of the OOM ladder, load shedding."""
    remedy = (
        "Ask for max_tokens_per_doc to have them read in chunks, or serve with a larger max_length."
        if answer.fallback is None
        else "The queue was long, so this request of low priority was read with "
        f"max_length={answer.fallback}. Ask again later, or with normal priority."
    )
    cut = int(np.count_nonzero(answer.truncated_tokens))
    warnings = []
    if cut:
        warnings.append(f"{cut} of {len(answer.logits)} documents were cut. {remedy}")
    elif answer.fallback is not None:
        warnings.append(remedy)
    return (*warnings, *(f"{step.detail}. {step.remedy}" for step in answer.ladder))


async def _record(context: RequestContext, status: int, seconds: float) -> None:
    """Write metrics, traces and the log, after the response is sent."""
    await asyncio.sleep(0)  # the response leaves at the end of the loop's turn
    server, path = context.server, context.http.scope["path"]
    server.metrics.answered(context.protocol.name, status, seconds)
    server.stats.answered(status, seconds, context.log_fields.get("documents", 0))
    if context.answer is not None and context.client is not None:
        documents = len(context.answer.logits)
        server.metrics.count("key_documents_total", context.client.name, by=documents)
    if context.deadline is not None:
        met = "met" if status == 200 else "missed"  # noqa: PLR2004 - HTTP's own
        server.metrics.count("deadline_requests_total", met)
    if server.traces is not None:
        span = SpanRecord(
            path=path,
            headers=context.http.headers,
            request_id=request_id.get(),
            protocol=context.protocol.name,
            status=status,
            seconds=seconds,
            documents=context.documents,
            answer=context.answer,
            answered_s=context.answered_s,
            key=context.log_fields.get("key"),
        )
        context.log_fields["trace_id"] = server.traces.record(span)
    fields = {
        "path": path,
        "dialect": context.protocol.name,
        "status": status,
        "seconds": round(seconds, 6),
        **context.log_fields,
    }
    logger.info("%s %s", path, status, extra={"fields": fields})
