"""The ASGI application: routes, request ids, CORS, errors, and the OpenAPI description."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route

from echelon import __version__
from echelon.engine.admission_pipeline import TOKENISERS
from echelon.errors import EchelonError, NoSuchRoute
from echelon.scheduling.queue import WEIGHTS
from echelon.server import pages
from echelon.server.dashboard import dashboard_data
from echelon.server.metrics import CONTENT_TYPE
from echelon.server.observability import ID_HEADER, id_of, request_id
from echelon.server.protocols import PATHS, PROTOCOLS, SHARED
from echelon.server.protocols.cohere import COHERE_V1
from echelon.server.protocols.tei import TEI, TeiInfo
from echelon.server.routes import HEADERS, as_json, endpoint, error_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from echelon.server.context import ServerContext
    from echelon.server.protocols.base import ApiProtocol

    Handler = Callable[[ServerContext, Request], Awaitable[Response]]


ERRORS = {
    400: "The body is no JSON object; vLLM's and Voyage's APIs use 400 for 422 too.",
    401: "No API key, or a wrong one.",
    408: "The headers or the body did not arrive in time.",
    413: "More documents, tokens or bytes than a request may have; the field is named.",
    422: "A field is missing or wrong; it is named, with the remedy.",
    429: "The queue is full, or would make the request late, or the key's limit is used up. "
    "Retry-After says when to try again.",
    431: "The headers are too long.",
    500: "The model failed; TEI's API uses 424.",
    503: "Not started, shutting down, no worker stays alive, or too many connections.",
    504: "The deadline (timeout_ms or X-Request-Timeout-Ms) passed, or cannot be met.",
    507: "A document does not fit in memory, even alone.",
}
"""Statuses of errors, and their causes."""

OPENAPI_VERSION = "3.0.3"
"""The newest version that the page /docs reads: Swagger UI 4 refuses 3.1."""


def make_app(server: ServerContext) -> RequestIdMiddleware:
    """The application of one server."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await server.open()
        try:
            yield
        finally:
            await server.close()

    ranking = [
        Route(path, endpoint(server, protocols), methods=["POST"], name=path)
        for path, protocols in PATHS.items()
    ]
    others = [
        Route(path, partial(handler, server), name=path)
        for path, (handler, _) in STATE_ROUTES.items()
    ]
    # Pages of other origins may read responses only where --cors names them.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(server.access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
    app = Starlette(
        routes=[*ranking, *others, Route("/pages/{name}", pages.file), pages.docs_assets()],
        middleware=[cors] if server.access.origins else [],
        exception_handlers={EchelonError: _failed, HTTPException: _not_found},
        lifespan=lifespan,
    )
    return RequestIdMiddleware(app)


# Errors outside of the routes that rank have the form of Cohere's API, which most clients read.


async def _failed(_: Request, error: Any) -> Response:
    return error_response(error, COHERE_V1)


async def _not_found(request: Request, error: Any) -> Response:
    path = request.url.path
    error_404 = NoSuchRoute(f"There is no {request.method} {path}. See /docs.")
    response = error_response(error_404, TEI if path == "/" else COHERE_V1)
    if path == "/":  # always 404: the playground is no route of the API
        return response
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


# Routes that do not rank.


async def _page(name: str, server: ServerContext, request: Request) -> Response:
    root = request.scope.get("root_path", "")
    return pages.page(name, root, keys=len(server.access.keys) > 0)


async def _dashboard_data(server: ServerContext, request: Request) -> Response:
    server.access.keys.authenticate(request.headers)
    service = server.running
    info, state = (service.info, service.snapshot()) if service else (None, None)
    data = dashboard_data(server.stats.view(), server.model, info, state)
    return as_json(data, 200, {"Cache-Control": "no-store"})


async def _models(server: ServerContext, request: Request) -> Response:
    server.access.keys.authenticate(request.headers)
    model = {
        "id": server.model,
        "object": "model",
        "created": server.created,
        "owned_by": "echelon",
        "max_model_len": server.service.longest(),
    }
    return as_json({"object": "list", "data": [model]}, 200)


async def _info(server: ServerContext, request: Request) -> Response:
    server.access.keys.authenticate(request.headers)
    service = server.service
    bounds = service.settings.bounds
    info = TeiInfo(
        model_id=server.model,
        model_sha=server.revision,
        model_dtype=service.info.precision,
        served_model_name=server.model,
        model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        max_concurrent_requests=bounds.max_requests,
        max_input_length=service.longest(),
        max_batch_tokens=service.snapshot().load.budget,
        max_batch_requests=service.settings.max_pairs,
        max_client_batch_size=bounds.max_documents,
        auto_truncate=True,
        tokenization_workers=TOKENISERS,
        version=__version__,
        sha=None,
        docker_label=None,
    )
    return as_json(msgspec.to_builtins(info), 200)


async def _health(server: ServerContext, _: Request) -> Response:
    return as_json({"status": "ok", "unix": time.time(), "model": server.model}, 200)


async def _ready(server: ServerContext, _: Request) -> Response:
    service = server.running
    if service is None:
        return as_json({"ready": False, "reason": "not started"}, 503)
    found = await service.ready()
    status = 200 if found.ready else 503
    return as_json({"ready": found.ready, "reason": found.reason}, status)


async def _metrics(server: ServerContext, _: Request) -> Response:
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _openapi(server: ServerContext, _: Request) -> Response:
    return as_json(describe(f"Echelon: {server.model}"), 200)


async def _docs(_: ServerContext, request: Request) -> Response:
    return pages.docs(request.scope.get("root_path", ""))


STATE_ROUTES: dict[str, tuple[Handler, str]] = {
    "/v1/models": (_models, "The served model, as OpenAI's clients list it."),
    "/models": (_models, "The same."),
    "/info": (_info, "The served model and the limits, as TEI's clients read them."),
    "/health": (_health, "200 while the process runs."),
    "/ready": (_ready, "200 if a pair was scored lately; else 503 with the reason."),
    "/metrics": (_metrics, "Metrics for Prometheus."),
    "/dashboard/data": (_dashboard_data, "The last ten minutes of this server, for the dashboard."),
    "/openapi.json": (_openapi, "This description."),
    "/docs": (_docs, "This description, to read and try."),
    "/": (partial(_page, "playground.html"), "The playground: a page to try the model."),
    "/dashboard": (
        partial(_page, "dashboard.html"),
        "The dashboard: a page that shows the last ten minutes.",
    ),
}
"""GET routes, with their handlers and descriptions."""


class RequestIdMiddleware:
    """Gives each request an id, which its response carries too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one scope; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, _without_traceback(send))
            return
        current = id_of(Headers(scope=scope))
        token = request_id.set(current)
        header = (ID_HEADER.encode(), current.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            request_id.reset(token)


def _without_traceback(send: Send) -> Send:
    """Drop the traceback of a failed start: the caller of the server reports the error."""

    async def send_without(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message = {"type": message["type"]}
        await send(message)

    return send_without


def describe(title: str = "Echelon") -> dict[str, Any]:
    """The OpenAPI description, made from the table of protocols, so that the two always agree."""
    types = [protocol.body for protocol in PROTOCOLS]
    schemas, parts = msgspec.json.schema_components(
        [*types, TeiInfo], ref_template="#/components/schemas/{name}"
    )
    bodies = {d.name: schema for d, schema in zip(PROTOCOLS, schemas, strict=False)}
    paths: dict[str, Any] = {
        path: {"post": _ranking(path, protocols, bodies)} for path, protocols in SHARED.items()
    }
    for path, (_, words) in STATE_ROUTES.items():
        answer = {"summary": words, "responses": {"200": {"description": words}}}
        paths[path] = {"get": answer}
    info = paths["/info"]["get"]["responses"]["200"]
    info["content"] = {"application/json": {"schema": schemas[-1]}}
    about = (
        "Reranking in the APIs that clients already use. Each API also has paths under its own "
        "name, such as /jina/v1/rerank, for bodies that do not show which API they are written for."
    )
    description: dict[str, Any] = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": title, "version": __version__, "description": about},
        "paths": paths,
        "components": {
            "schemas": parts,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
    return {key: _without_null(value) for key, value in description.items()}


def _without_null(part: Any) -> Any:
    """Schemas in the form of OpenAPI 3.0, where null is no type but a property of one."""
    if isinstance(part, list):
        return [_without_null(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: _without_null(value) for key, value in part.items()}
    kinds = part.get("anyOf", ())
    rest = [kind for kind in kinds if kind != {"type": "null"}]
    if len(rest) == len(kinds):
        return part
    others = {key: value for key, value in part.items() if key != "anyOf"}
    one = len(rest) == 1 and "$ref" not in rest[0]  # words beside a $ref would be ignored
    return {**(rest[0] if one else {"anyOf": rest}), **others, "nullable": True}


def _ranking(
    path: str, protocols: tuple[ApiProtocol, ...], bodies: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    in_order = protocols[::-1]
    schemas = [bodies[protocol.name] for protocol in in_order]
    headers = {
        name: {"description": words, "schema": {"type": "string"}}
        for name, words in HEADERS.items()
    }
    examples = {d.name: {"summary": d.title, "value": dict(d.example)} for d in in_order}
    return {
        "summary": ", ".join(d.title for d in in_order),
        "operationId": path.strip("/").replace("/", "_"),
        "parameters": [
            {
                "name": "X-Request-Timeout-Ms",
                "in": "header",
                "description": "Milliseconds until the response is useless; as timeout_ms.",
                "schema": {"type": "number"},
            },
            {
                "name": "X-Request-Priority",
                "in": "header",
                "description": "Share of the device; as priority.",
                "schema": {"type": "string", "enum": list(WEIGHTS)},
            },
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": schemas}, "examples": examples}},
        },
        "responses": {"200": {"description": "The results.", "headers": headers}}
        | {str(status): {"description": words} for status, words in ERRORS.items()},
    }
