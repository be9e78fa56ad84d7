"""The ASGI application: routes, what stands before all of them, and the service's life.

What stands before every route: the request's id, and the words of a start that failed.
"""

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
from echelon.server.dashboard_data import board
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

if TYPE_CHECKING:
    Handler = Callable[[ServerContext, Request], Awaitable[Response]]


def make_app(house: ServerContext) -> RequestIdMiddleware:
    """The application of one server."""

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        await house.open()
        try:
            yield
        finally:
            await house.close()

    ranks = [
        Route(path, endpoint(house, them), methods=["POST"], name=path)
        for path, them in PATHS.items()
    ]
    asked: list[tuple[str, Handler]] = [
        ("/", _playground),
        ("/dashboard", _dashboard),
        ("/dashboard/data", _board),
        ("/v1/models", _models),
        ("/models", _models),
        ("/info", _info),
        ("/health", _health),
        ("/ready", _ready),
        ("/metrics", _metrics),
        ("/openapi.json", _openapi),
        ("/docs", _docs),
    ]
    routes = [Route(path, partial(handler, house), name=path) for path, handler in asked]
    app = Starlette(
        routes=[*ranks, *routes, Route("/pages/{name}", pages.file), *_assets()],
        middleware=_middleware(house),
        exception_handlers={EchelonError: _failed, HTTPException: _not_found},
        lifespan=life,
    )
    return RequestIdMiddleware(app)


def _middleware(house: ServerContext) -> list[Middleware]:
    """What browsers may do from other origins: nothing, unless it was allowed."""
    origins = house.rules.origins
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


# Errors outside of the routes that rank: in the plainest shape, which most clients can read.


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, EchelonError):
        raise error
    return error_response(error, COHERE_V1)


async def _not_found(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    path = request.url.path
    words = f"There is no {request.method} {path}. See /docs."
    response = error_response(NoSuchRoute(words), TEI if path == "/" else COHERE_V1)
    if path == "/":  # the playground is no route of the API: to its clients there is nothing here
        return response
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


# Plain routes.


async def _playground(house: ServerContext, request: Request) -> Response:
    return _page("playground.html", house, request)


async def _dashboard(house: ServerContext, request: Request) -> Response:
    return _page("dashboard.html", house, request)


def _page(name: str, house: ServerContext, request: Request) -> Response:
    root = request.scope.get("root_path", "")
    return pages.page(name, root, keys=len(house.rules.keys) > 0)


async def _board(house: ServerContext, request: Request) -> Response:
    house.rules.keys.holder(request.headers)
    service = house.running
    facts, state = (service.info, service.snapshot()) if service else (None, None)
    told = board(house.recent.view(), house.model, facts, state)
    return as_json(told, 200, {"Cache-Control": "no-store"})


async def _models(house: ServerContext, request: Request) -> Response:
    house.rules.keys.holder(request.headers)
    model: dict[str, Any] = {
        "id": house.model,
        "object": "model",
        "created": house.since,
        "owned_by": "echelon",
        "max_model_len": house.service.longest(),
    }
    return as_json({"object": "list", "data": [model]}, 200)


async def _info(house: ServerContext, request: Request) -> Response:
    house.rules.keys.holder(request.headers)
    service = house.service
    bounds = service.settings.bounds
    info = TeiInfo(
        model_id=house.model,
        model_sha=house.revision,
        model_dtype=service.info.precision,
        served_model_name=house.model,
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


async def _health(house: ServerContext, _: Request) -> Response:
    return as_json({"status": "ok", "unix": time.time(), "model": house.model}, 200)


async def _ready(house: ServerContext, _: Request) -> Response:
    service = house.running
    if service is None:
        return as_json({"ready": False, "reason": "not started"}, 503)
    found = await service.ready()
    status = 200 if found.ready else 503
    return as_json({"ready": found.ready, "reason": found.reason}, status)


async def _metrics(house: ServerContext, _: Request) -> Response:
    return Response(house.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _openapi(house: ServerContext, _: Request) -> Response:
    return as_json(describe(f"Echelon: {house.model}"), 200)


async def _docs(_: ServerContext, request: Request) -> Response:
    root = escape(request.scope.get("root_path", "").rstrip("/"))
    return HTMLResponse(_PAGE.replace("ROOT", root))


def _assets() -> list[Mount]:
    """Swagger UI's own files, out of its package: nothing is asked of other servers."""
    from swagger_ui_bundle import swagger_ui_path

    return [Mount("/docs/assets", StaticFiles(directory=swagger_ui_path))]


_PAGE = """<!doctype html>
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
    """Gives each request its id and each answer that id.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's scope; see ASGI."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self.app(scope, receive, _wordless(send))

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = id_of(Headers(scope=scope))
        token = request_id.set(number)
        header = (ID_HEADER.encode(), number.encode())

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = message["headers"]
                message["headers"] = [*headers, header]
            await send(message)

        try:
            await self.app(scope, receive, signed)
        finally:
            request_id.reset(token)


def _wordless(send: Send) -> Send:
    """A failed start without its traceback: whoever started the server reports the error."""

    async def sent(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message = {"type": message["type"]}
        await send(message)

    return sent
