"""The routes that rank: body in, service asked, answer or error out, in the caller's dialect.

A request's body, as long and as slow as the rules allow.
"""

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
from echelon.server.protocols.base import ErrorResponse, RerankResponse, priority_of
from echelon.server.protocols.tei import TEI
from echelon.server.responses import (
    explanation,
    headers_of,
    hits_of,
    in_callers_words,
    retry_after,
    tei_headers,
    warnings_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request

    from echelon.scheduling.fair_queue import Priority
    from echelon.server.auth import ApiClient
    from echelon.server.context import ServerContext, ServerLimits
    from echelon.server.protocols.base import ApiProtocol, Body, RerankRequest
    from echelon.types import Answer


logger = logging.getLogger(__name__)

GONE = 499
"""What metrics and logs call a client that went away; nobody receives it."""


@dataclass(slots=True)
class RequestContext:
    """One request on its way.

    Attributes:
        house: the server.
        request: what came.
        dialect: its language, the path's last until the body has told.
        began: the service's time when it came; None where it has not started.
        timeout_s: seconds that the caller gives us; None is no limit.
        holder: whose key it came with; None until that is known.
        documents: its documents; None until they are read.
        answer: the service's answer, where there is one.
        answered_s: seconds from the begin to that answer.
        facts: what the log is told.
    """

    house: ServerContext
    request: Request
    dialect: ApiProtocol
    began: float | None = None
    timeout_s: float | None = None
    holder: ApiClient | None = None
    documents: int | None = None
    answer: Answer | None = None
    answered_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def endpoint(
    house: ServerContext, candidates: tuple[ApiProtocol, ...]
) -> Callable[[Request], Awaitable[Response]]:
    """The route of one path."""

    async def rank(request: Request) -> Response:
        began = time.perf_counter()
        call = RequestContext(house, request, candidates[-1])
        response = await _respond(call, candidates)
        seconds = time.perf_counter() - began
        response.background = BackgroundTask(_note, call, response.status_code, seconds)
        return response

    return rank


async def _respond(call: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    try:
        return await _answer(call, candidates)
    except ClientDisconnect:
        return Response(status_code=GONE)
    except EchelonError as error:
        if isinstance(error, RateLimited) and call.holder is not None:
            call.house.rate_limited(call.holder.name)
        return error_response(error, call.dialect)
    except Exception as error:
        logger.exception("A request met what the server does not know. This is a bug.")
        words = f"{type(error).__name__}: {error}. This is a bug; the log has more."
        return error_response(ScoringFailed(words), call.dialect)


async def _answer(call: RequestContext, candidates: tuple[ApiProtocol, ...]) -> Response:
    house, request = call.house, call.request
    service = house.service
    call.began = service.clock()
    _identify(call, service.clock())
    body = await read_body(request, house.rules)
    call.dialect = choose(candidates, body)
    wanted = read(call.dialect, body)
    call.timeout_s = timeout_of(request.headers, wanted.timeout_ms)
    call.documents = len(wanted.pairs)
    answer = call.answer = await _within_limit(call, wanted)
    call.answered_s = service.clock() - call.began
    call.facts |= {"documents": call.documents, **headers_facts(answer)}
    content = call.dialect.write(_outcome(house, wanted, answer))
    if wanted.explain and isinstance(content, dict):
        content["echelon"] = explanation(answer)
    headers = headers_of(answer)
    if call.dialect is TEI:
        headers |= tei_headers(answer, wanted)
    return as_json(content, 200, headers)


def _identify(call: RequestContext, now: float) -> None:
    """Whose request it is; one that has used up its limit is refused before its body is read.

    Raises:
        Unauthorised: no key, or a wrong one.
        RateLimited: not even one document would be let in.
    """
    holder = call.holder = call.house.rules.keys.holder(call.request.headers)
    if len(call.house.rules.keys):
        call.facts["key"] = holder.name
    if holder.bucket is not None:
        holder.bucket.ask(1, now)


async def _within_limit(call: RequestContext, wanted: RerankRequest) -> Answer:
    """The service's answer, paid for by the key; what the service refuses costs nothing.

    Raises:
        RateLimited: the key has used up what it may have scored.
    """
    bucket = call.holder.bucket if call.holder else None
    documents = len(wanted.pairs)
    if bucket is None:
        return await _unless_gone(call, wanted)
    bucket.take(documents, call.house.service.clock())
    try:
        return await _unless_gone(call, wanted)
    except (InvalidInput, Overloaded, ShuttingDown):
        bucket.give_back(documents)
        raise


async def _unless_gone(call: RequestContext, wanted: RerankRequest) -> Answer:
    """The service's answer; if the client goes away first, its work is taken out of the queue.

    No task of its own asks: each turn of the loop until the answer is out would be waited for.

    Raises:
        ClientDisconnect: it went away.
    """
    asking = asyncio.current_task()
    if asking is None:
        raise RuntimeError("a request is answered outside of a task. This is a bug.")
    watching = asyncio.ensure_future(_goes(call.request))
    waiting, gone = True, False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if waiting:  # it is told of its own end as well, and perhaps after ours
            gone = True
            asking.cancel()

    watching.add_done_callback(leave)
    try:
        return await _ask(call, wanted)
    except asyncio.CancelledError:
        if gone and not asking.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        waiting = False
        watching.cancel()


async def _ask(call: RequestContext, wanted: RerankRequest) -> Answer:
    service = call.house.service
    deadline = None
    if call.timeout_s is not None and call.began is not None:
        deadline = call.began + call.timeout_s
    return await service.submit(
        wanted.pairs,
        deadline=deadline,
        priority=priority_asked(call.request.headers, wanted.priority),
        max_length=wanted.max_length,
        truncation=wanted.truncation,
        max_query_tokens=wanted.max_query_tokens,
        chunking=wanted.chunking,
        whole=wanted.whole,
        side=wanted.side,
    )


async def _goes(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _outcome(house: ServerContext, wanted: RerankRequest, answer: Answer) -> RerankResponse:
    return RerankResponse(
        number=request_id.get(),
        created=int(time.time()),
        model=house.model,
        hits=hits_of(answer, wanted),
        tokens=answer.tokens,
        with_documents=wanted.documents is not None,
        warnings=warnings_of(answer),
    )


def error_response(error: EchelonError, dialect: ApiProtocol) -> Response:
    """The one place where an error becomes an answer."""
    words = in_callers_words(str(error), dialect.noun)
    status, body = dialect.complain(ErrorResponse(error, words, request_id.get()))
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = retry_after(error.retry_after_s)
    return as_json(body, status, headers)


def as_json(content: Body, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    encoded = b"" if content is None else msgspec.json.encode(content)
    return Response(encoded, status, dict(headers or {}), media_type="application/json")


def headers_facts(answer: Answer) -> dict[str, Any]:
    """What the log says of an answer."""
    told = explanation(answer)
    facts = {name: told[name] for name in ("tokens", "queue_ms", "tokenise_ms", "compute_ms")}
    return facts if answer.fallback is None else facts | {"fallback": told["fallback"]}


async def _note(call: RequestContext, status: int, seconds: float) -> None:
    """Metrics, traces and the log; nobody waits for them, so the answer goes out first."""
    await asyncio.sleep(0)  # what was written leaves at the end of the loop's turn
    metrics = call.house.metrics
    metrics.answered(call.dialect.name, status, seconds)
    call.house.recent.answered(status, seconds, call.facts.get("documents", 0))
    if call.answer is not None and call.holder is not None:
        metrics.asked(call.holder.name, len(call.answer.logits))
    if call.timeout_s is not None:
        metrics.due(met=status == 200)  # noqa: PLR2004 - HTTP's own
    if call.house.traces is not None:
        call.facts["trace_id"] = call.house.traces.tell(_told(call, status, seconds))
    logger.info(
        "%s %s",
        call.request.scope["path"],
        status,
        extra={
            "facts": {
                "path": call.request.scope["path"],
                "dialect": call.dialect.name,
                "status": status,
                "seconds": round(seconds, 6),
                **call.facts,
            }
        },
    )


def _told(call: RequestContext, status: int, seconds: float) -> SpanRecord:
    return SpanRecord(
        path=call.request.scope["path"],
        headers=call.request.headers,
        number=request_id.get(),
        dialect=call.dialect.name,
        status=status,
        seconds=seconds,
        documents=call.documents,
        answer=call.answer,
        answered_s=call.answered_s,
        key=call.facts.get("key"),
    )


TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-request-priority"


async def read_body(request: Request, rules: ServerLimits) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it is longer than allowed; what comes after that is not read.
        SlowClient: it did not come in time.
        starlette.requests.ClientDisconnect: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > rules.max_body_bytes:
        raise _too_large(rules)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(rules.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > rules.max_body_bytes:
                    raise _too_large(rules)
                chunks.append(part)
    except TimeoutError:
        raise SlowClient(
            f"The body did not come within {rules.body_timeout_s:g} s. Send it faster."
        ) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def timeout_of(headers: Mapping[str, str], timeout_ms: float | None) -> float | None:
    """Seconds that the caller gives us, out of the body or the header; None is no limit.

    Raises:
        InvalidInput: no positive number.
    """
    field = "timeout_ms"
    if timeout_ms is None and TIMEOUT_HEADER in headers:
        field = "X-Request-Timeout-Ms"
        try:
            timeout_ms = float(headers[TIMEOUT_HEADER])
        except ValueError:
            timeout_ms = -1.0
    if timeout_ms is None:
        return None
    if not 0 < timeout_ms < float("inf"):
        raise InvalidInput(field, "is no positive number of milliseconds", "Give 1 or more.")
    return timeout_ms / 1000


def priority_asked(headers: Mapping[str, str], priority: Priority | None) -> Priority:
    """Share of the device that the caller asks for, in the body or the header.

    Raises:
        InvalidInput: the header has an unknown name.
    """
    if priority is None:
        priority = priority_of(headers.get(PRIORITY_HEADER), "X-Request-Priority")
    return priority or "normal"


def _too_large(rules: ServerLimits) -> TooLarge:
    return TooLarge(
        "body",
        f"is longer than {rules.max_body_bytes} bytes",
        "Send fewer documents at a time, or start the server with a larger --max-body-mb.",
    )
