"""The routes that rank: read the body, submit it to the service, write response or error."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from echelon.errors import (
    EchelonError,
    InvalidInput,
    Overloaded,
    RateLimited,
    ScoringFailed,
    ShuttingDown,
    SlowClient,
    TooLarge,
)
from echelon.server.observability import SpanRecord, request_id
from echelon.server.protocols import choose, read
from echelon.server.protocols.base import ErrorResponse, RerankResponse
from echelon.server.protocols.tei import TEI
from echelon.server.responses import (
    explanation,
    headers_of,
    results_of,
    retry_after,
    tei_headers,
    warnings_of,
    with_noun,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request

    from echelon.server.auth import ApiClient
    from echelon.server.context import ServerContext, ServerLimits
    from echelon.server.protocols.base import ApiProtocol, Body, ResponseOptions
    from echelon.types import Answer, RerankRequest

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status in metrics and logs of a request whose client went away; it is never sent."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request while it is handled.

    Attributes:
        server: the server.
        http: the request.
        protocol: the body's; until the body is read, the last of its path.
        began: the service's time when it came; None where the service has not started.
        client: owner of its key; None until that is known.
        request: what it asks; None until the body is read.
        answer: the service's answer, where there is one.
        answered_s: seconds from its begin to that answer.
        log_fields: what the log says of it.
    """

    server: ServerContext
    http: Request
    protocol: ApiProtocol
    began: float | None = None
    client: ApiClient | None = None
    request: RerankRequest | None = None
    answer: Answer | None = None
    answered_s: float = 0.0
    log_fields: dict[str, Any] = field(default_factory=dict)


def endpoint(
    server: ServerContext, candidates: tuple[ApiProtocol, ...]
) -> Callable[[Request], Awaitable[Response]]:
    """The route of one path."""

    async def rank(http: Request) -> Response:
        began = time.perf_counter()
        context = RequestContext(server, http, candidates[-1])
        response = await _respond(context, candidates)
        seconds = time.perf_counter() - began
        response.background = BackgroundTask(_record, context, response.status_code, seconds)
        return response

    return rank


async def _respond(context: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    try:
        return await _answer(context, candidates)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except EchelonError as error:
        if isinstance(error, RateLimited) and context.client is not None:
            context.server.rate_limited(context.client.name)
        return error_response(error, context.protocol)
    except Exception as error:
        logger.exception("A request met an unexpected error. This is a bug.")
        message = f"{type(error).__name__}: {error}. This is a bug; the log has more."
        return error_response(ScoringFailed(message), context.protocol)


async def _answer(context: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    server, http = context.server, context.http
    clock = server.service.clock
    began = context.began = clock()
    _authenticate(context, began)
    body = await read_body(http, server.limits)
    protocol = context.protocol = choose(candidates, body)
    request, options = read(protocol, body, http.headers, began)
    context.request = request
    answer = context.answer = await _within_limit(context, request)
    context.answered_s = clock() - began
    explained = explanation(answer)
    context.log_fields["documents"] = len(request.pairs)
    for name in ("tokens", "queue_ms", "tokenise_ms", "compute_ms"):
        context.log_fields[name] = explained[name]
    if answer.fallback is not None:
        context.log_fields["fallback"] = explained["fallback"]
    content = protocol.write(_response(server, options, answer))
    if options.explain and isinstance(content, dict):
        content["echelon"] = explained
    headers = headers_of(answer)
    if protocol is TEI:
        headers |= tei_headers(answer, request)
    return as_json(content, 200, headers)


def _authenticate(context: RequestContext, now: float) -> None:
    """Find the key's owner; one that has used up its limit is refused before its body is read.

    Raises:
        Unauthorised: no key, or a wrong one.
        RateLimited: not even one document would be admitted.
    """
    keys = context.server.limits.keys
    client = context.client = keys.authenticate(context.http.headers)
    if len(keys):
        context.log_fields["key"] = client.name
    if client.bucket is not None:
        client.bucket.check(1, now)


async def _within_limit(context: RequestContext, request: RerankRequest) -> Answer:
    """Submit a request within its key's limit; one that the service refuses does not count.

    Raises:
        RateLimited: the key has used up its limit.
    """
    bucket = context.client.bucket if context.client else None
    if bucket is None:
        return await _until_disconnect(context, request)
    documents = len(request.pairs)
    bucket.take(documents, context.server.service.clock())
    try:
        return await _until_disconnect(context, request)
    except (InvalidInput, Overloaded, ShuttingDown):
        bucket.give_back(documents)
        raise


async def _until_disconnect(context: RequestContext, request: RerankRequest) -> Answer:
    """Submit a request; if the client goes away first, its work is taken out of the queue.

    The service is awaited in this task, not in one of its own: that would cost an answer more
    turns of the event loop.

    Raises:
        ClientDisconnect: the client went away.
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


def _response(server: ServerContext, options: ResponseOptions, answer: Answer) -> RerankResponse:
    return RerankResponse(
        request_id=request_id.get(),
        created=int(time.time()),
        model=server.model,
        results=results_of(answer, options),
        tokens=answer.tokens,
        with_documents=options.documents is not None,
        warnings=warnings_of(answer),
    )


def error_response(error: EchelonError, protocol: ApiProtocol) -> Response:
    """The one place where an error becomes a response."""
    message = with_noun(str(error), protocol.noun)
    status, body = protocol.write_error(ErrorResponse(error, message, request_id.get()))
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = retry_after(error.retry_after_s)
    return as_json(body, status, headers)


def as_json(content: Body, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    encoded = b"" if content is None else msgspec.json.encode(content)
    return Response(encoded, status, dict(headers or {}), media_type="application/json")


async def _record(context: RequestContext, status: int, seconds: float) -> None:
    """Write metrics, traces and the log, after the response is sent."""
    await asyncio.sleep(0)  # the response leaves at the end of the loop's turn
    server, request, path = context.server, context.request, context.http.scope["path"]
    server.metrics.answered(context.protocol.name, status, seconds)
    server.stats.answered(status, seconds, context.log_fields.get("documents", 0))
    if context.answer is not None and context.client is not None:
        server.metrics.documents_scored(context.client.name, len(context.answer.logits))
    if request is not None and request.deadline is not None:
        server.metrics.deadline_ended(met=status == 200)  # noqa: PLR2004 - HTTP's own
    if server.traces is not None:
        span = SpanRecord(
            path=path,
            headers=context.http.headers,
            request_id=request_id.get(),
            protocol=context.protocol.name,
            status=status,
            seconds=seconds,
            documents=None if request is None else len(request.pairs),
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


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it is longer than allowed; what comes after that is not read.
        SlowClient: it did not come in time.
        starlette.requests.ClientDisconnect: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_body_bytes:
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                chunks.append(part)
    except TimeoutError:
        raise SlowClient(
            f"The body did not come within {limits.body_timeout_s:g} s. Send it faster."
        ) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limits: ServerLimits) -> TooLarge:
    return TooLarge(
        "body",
        f"is longer than {limits.max_body_bytes} bytes",
        "Send fewer documents at a time, or start the server with a larger --max-body-mb.",
    )
