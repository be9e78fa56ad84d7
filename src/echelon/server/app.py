"""The ASGI application: routes, request ids, hosts, CORS, errors, and headers of every response."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from functools import cache, partial
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
from echelon.engine.events import Readiness
from echelon.errors import (
    EchelonError,
    MethodNotAllowed,
    NoSuchRoute,
    ScoringFailed,
    Unauthorised,
)
from echelon.messages import in_language
from echelon.server import pages
from echelon.server.dashboard import dashboard_data
from echelon.server.metrics import CONTENT_TYPE
from echelon.server.observability import ID_HEADER, id_of, request_id
from echelon.server.openapi import describe
from echelon.server.protocols import PATHS, protocol_of
from echelon.server.protocols.cohere import COHERE_V1
from echelon.server.protocols.tei import TeiInfo
from echelon.server.routes import RankRoute, as_json, error_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from echelon.server.context import ServerContext

    Handler = Callable[[ServerContext, Request], Awaitable[Response]]

logger = logging.getLogger(__name__)

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
"""Headers of every response that does not set them itself: a browser neither guesses its type, nor
shows it in a frame, nor loads anything for it, nor keeps it."""


def make_app(server: ServerContext) -> HttpMiddleware:
    """The application of one server."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await server.open()
        try:
            yield
        finally:
            await server.close()

    ranking = [
        ExactRoute(_routed(path), RankRoute(server, protocols), methods=["POST"], name=path)
        for path, protocols in PATHS.items()
    ]
    others = [
        ExactRoute(path, partial(handler, server), name=path)
        for path, handler in STATE_ROUTES.items()
    ]
    files = [ExactRoute(f"{folder}/{{name}}", pages.file) for folder in pages.FOLDERS]
    # Pages of other origins may read responses only where --cors names them.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(server.access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
    app = Starlette(
        routes=[*ranking, *others, *files],
        middleware=[cors] if server.access.origins else [],
        exception_handlers={EchelonError: _failed, HTTPException: _unrouted, Exception: _crashed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # the address would be made from the Host header
    return HttpMiddleware(app, server)


def _routed(path: str) -> str:
    """A path as Starlette writes it; a model's name may contain slashes."""
    return path.replace("{model}", "{model:path}")


class ExactRoute(Route):
    """A route that matches its path only, and not also the path with a line feed after it.

    A part of the path may be any text, also with line feeds.
    """

    def __init__(self, path: str, handler: Callable[..., Any], **settings: Any) -> None:
        super().__init__(path, handler, **settings)
        exact = self.path_regex.pattern.removesuffix("$") + r"\Z"
        self.path_regex = re.compile(exact, re.DOTALL)


# Errors outside of the routes that rank have the form of Cohere's API, which most clients read.


async def _failed(_: Request, error: Any) -> Response:
    return error_response(error, COHERE_V1)


async def _unrouted(request: Request, _: Any) -> Response:
    """The response where Starlette found no route, or only one for other methods."""
    path, route = request.scope["path"], request.scope.get("route")
    if route is None:
        error_404 = NoSuchRoute(f"There is no {request.method} {path}. See /docs.")
        return error_response(error_404, COHERE_V1)
    allowed = ", ".join(sorted(route.methods))
    error = MethodNotAllowed(f"{request.method} is not possible on {path}. Use {allowed}.")
    response = error_response(error, protocol_of(route.path))
    response.headers["Allow"] = allowed
    return response


async def _crashed(_: Request, error: Exception) -> Response:
    words = f"{type(error).__name__}. This is a bug; the log has more."
    return error_response(ScoringFailed(words), COHERE_V1)


# Routes that do not rank.


async def _page(name: str, server: ServerContext, request: Request) -> Response:
    return pages.page(name, request, server.language, keys=len(server.access.keys) > 0)


async def _dashboard_data(server: ServerContext, request: Request) -> Response:
    server.access.keys.authenticate(request.headers)
    service = server.running
    info, state = (service.info, service.snapshot()) if service else (None, None)
    return as_json(dashboard_data(server.stats.view(), server.model, info, state), 200)


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


async def _ready(server: ServerContext, request: Request) -> Response:
    """Whether the service is ready; the reason why not is for owners of keys only."""
    service = server.running
    found = await service.ready() if service else Readiness(ready=False, reason="not started")
    if not found.ready:
        logger.warning("Not ready: %s", found.reason)
    content: dict[str, Any] = {"ready": found.ready}
    with contextlib.suppress(Unauthorised):
        server.access.keys.authenticate(request.headers)
        # What follows may name files of this machine; it is for the log.
        content["reason"] = found.reason.partition(":")[0]
    return as_json(content, 200 if found.ready else 503)


async def _metrics(server: ServerContext, _: Request) -> Response:
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _openapi(server: ServerContext, request: Request) -> Response:
    language = pages.language_of(request.headers, server.language)
    found = _description(server.model, language, keys=len(server.access.keys) > 0)
    response = as_json(found, 200)
    response.headers["Vary"] = "Accept-Language"
    return response


@cache
def _description(model: str, language: str, *, keys: bool) -> dict[str, Any]:
    """The description, made once a language: it takes the event loop 15 ms."""
    with in_language(language):
        return describe(f"Echelon: {model}", keys=keys)


STATE_ROUTES: dict[str, Handler] = {
    "/v1/models": _models,
    "/models": _models,
    "/info": _info,
    "/health": _health,
    "/ready": _ready,
    "/metrics": _metrics,
    "/dashboard/data": _dashboard_data,
    "/openapi.json": _openapi,
    "/docs": partial(_page, "docs.html"),
    "/": partial(_page, "playground.html"),
    "/dashboard": partial(_page, "dashboard.html"),
}
"""GET routes and their handlers; :mod:`echelon.server.openapi` describes them."""


class HttpMiddleware:
    """Gives each request an id, which its response carries too, and checks its host."""

    def __init__(self, app: Starlette, server: ServerContext) -> None:
        self.app = app
        self._hosts = server.access.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one scope; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, _without_traceback(send))
            return
        current = id_of(Headers(scope=scope))
        token = request_id.set(current)
        try:
            await self._checked(scope)(scope, receive, _with_headers(send, current))
        finally:
            request_id.reset(token)

    def _checked(self, scope: Scope) -> ASGIApp:
        """The application, or the refusal of a request that is for another host."""
        try:
            self._hosts.check(scope["headers"], scope["http_version"])
        except EchelonError as error:
            return error_response(error, protocol_of(scope["path"]))
        return self.app


def _with_headers(send: Send, current: str) -> Send:
    """Add the id of the request, and :data:`HEADERS` where the response does not set them."""
    header = (ID_HEADER.encode(), current.encode())

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = dict(message["headers"])
            added = [pair for pair in HEADERS.items() if pair[0] not in given]
            message["headers"] = [*message["headers"], header, *added]
        await send(message)

    return send_with_headers


def _without_traceback(send: Send) -> Send:
    """Drop the traceback of a failed start: the caller of the server reports the error."""

    async def send_without(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message = {"type": message["type"]}
        await send(message)

    return send_without
