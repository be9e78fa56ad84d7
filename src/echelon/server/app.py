"""The ASGI application: routes, request ids, CORS, errors, and start and stop of the service."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from echelon import __version__
from echelon.engine.admission_pipeline import TOKENISERS
from echelon.errors import EchelonError, NoSuchRoute
from echelon.server import pages
from echelon.server.dashboard import dashboard_data
from echelon.server.metrics import CONTENT_TYPE
from echelon.server.observability import ID_HEADER, id_of, request_id
from echelon.server.openapi import describe
from echelon.server.protocols import PATHS
from echelon.server.protocols.cohere import COHERE_V1
from echelon.server.protocols.tei import TEI, TeiInfo
from echelon.server.routes import as_json, endpoint, error_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from echelon.server.context import ServerContext

    Handler = Callable[[ServerContext, Request], Awaitable[Response]]


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
        Route(path, partial(handler, server), name=path) for path, handler in _HANDLERS.items()
    ]
    app = Starlette(
        routes=[*ranking, *others, Route("/pages/{name}", pages.file), _docs_assets()],
        middleware=_middleware(server.limits.origins),
        exception_handlers={EchelonError: _failed, HTTPException: _not_found},
        lifespan=lifespan,
    )
    return RequestIdMiddleware(app)


def _middleware(origins: tuple[str, ...]) -> list[Middleware]:
    """CORS: pages of other origins may read responses only where ``--cors`` names them."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    ]


# Errors outside of the routes that rank have the form of Cohere's API, which most clients read.


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, EchelonError):
        raise error
    return error_response(error, COHERE_V1)


async def _not_found(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
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
    return pages.page(name, root, keys=len(server.limits.keys) > 0)


async def _dashboard_data(server: ServerContext, request: Request) -> Response:
    server.limits.keys.authenticate(request.headers)
    service = server.running
    info, state = (service.info, service.snapshot()) if service else (None, None)
    data = dashboard_data(server.stats.view(), server.model, info, state)
    return as_json(data, 200, {"Cache-Control": "no-store"})


async def _models(server: ServerContext, request: Request) -> Response:
    server.limits.keys.authenticate(request.headers)
    model: dict[str, Any] = {
        "id": server.model,
        "object": "model",
        "created": server.created,
        "owned_by": "echelon",
        "max_model_len": server.service.longest(),
    }
    return as_json({"object": "list", "data": [model]}, 200)


async def _info(server: ServerContext, request: Request) -> Response:
    server.limits.keys.authenticate(request.headers)
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
    root = escape(request.scope.get("root_path", "").rstrip("/"))
    return HTMLResponse(_DOCS_PAGE.replace("ROOT", root))


_HANDLERS: dict[str, Handler] = {
    "/": partial(_page, "playground.html"),
    "/dashboard": partial(_page, "dashboard.html"),
    "/dashboard/data": _dashboard_data,
    "/v1/models": _models,
    "/models": _models,
    "/info": _info,
    "/health": _health,
    "/ready": _ready,
    "/metrics": _metrics,
    "/openapi.json": _openapi,
    "/docs": _docs,
}


def _docs_assets() -> Mount:
    """Swagger UI's files from its package: nothing is loaded from other servers."""
    from swagger_ui_bundle import swagger_ui_path

    return Mount("/docs/assets", StaticFiles(directory=swagger_ui_path))


_DOCS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Echelon: API</title>
<link rel="stylesheet" href="ROOT/docs/assets/swagger-ui.css">
</head>
<body>
<div id="api" data-url="ROOT/openapi.json"></div>
<script src="ROOT/docs/assets/swagger-ui-bundle.js"></script>
<script>
const {url} = document.getElementById("api").dataset;
SwaggerUIBundle({url, dom_id: "#api", validatorUrl: null});
</script>
</body>
</html>
"""


class RequestIdMiddleware:
    """Gives each request an id, which its response carries too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one scope; see ASGI."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self.app(scope, receive, _without_traceback(send))

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        current = id_of(Headers(scope=scope))
        token = request_id.set(current)
        header = (ID_HEADER.encode(), current.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = message["headers"]
                message["headers"] = [*headers, header]
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
