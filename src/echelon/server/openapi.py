"""The OpenAPI description of the server, made from the table of protocols and their types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import msgspec

from echelon import __version__
from echelon.errors import (
    DeadlinePassed,
    InvalidInput,
    Malformed,
    Misdirected,
    OutOfMemory,
    Overloaded,
    ScoringFailed,
    ShuttingDown,
    SlowClient,
    TooLarge,
    Unauthorised,
    UnsupportedMediaType,
)
from echelon.messages import N_, tr
from echelon.scheduling.queue import WEIGHTS
from echelon.server.protocols import HOSTED_NIM, PROTOCOLS, SHARED
from echelon.server.protocols.base import ErrorResponse
from echelon.server.protocols.cohere import CohereError
from echelon.server.protocols.tei import TeiInfo
from echelon.server.routes import HEADERS

if TYPE_CHECKING:
    from echelon.errors import EchelonError
    from echelon.server.protocols.base import ApiProtocol

VERSION = "3.0.3"
"""The newest version of OpenAPI that the page /docs reads: Swagger UI 4 refuses 3.1."""

ABOUT = N_(
    "Reranking in the APIs that clients already use. Each API also has paths under its own "
    "name, such as /jina/v1/rerank, for bodies that do not show which API they are written for."
)

ERRORS = {
    400: N_(
        "The body is no JSON object, or the request no HTTP; vLLM's and Voyage's APIs use 400 for "
        "422 too, TEI's for empty texts."
    ),
    401: N_("No API key, or a wrong one."),
    404: N_("There is no such path."),
    405: N_("The path has other methods; Allow names them."),
    408: N_("The headers or the body did not arrive in time."),
    413: N_("More documents, tokens or bytes than a request may have; the field is named."),
    415: N_("The body is not announced as JSON."),
    421: N_("The Host header names another server; see --allowed-hosts."),
    422: N_("A field is missing or wrong; it is named, with the remedy."),
    424: N_("The model failed, or a document does not fit in memory, in TEI's API."),
    429: N_(
        "The queue is full, or would make the request late, or the key's limit is used up. "
        "Retry-After says when to try again."
    ),
    431: N_("The headers are too long."),
    500: N_("The model failed."),
    503: N_("Not started, shutting down, no worker stays alive, or too many connections."),
    504: N_("The deadline (timeout_ms or X-Request-Timeout-Ms) passed, or cannot be met."),
    507: N_("A document does not fit in memory, even alone."),
}
"""Statuses of errors, and their causes."""

RANKING_ERRORS: tuple[EchelonError, ...] = (
    *(kind("field", "problem", "Remedy.") for kind in (Malformed, TooLarge, InvalidInput)),
    *(kind("header", "problem", "Remedy.") for kind in (UnsupportedMediaType, Misdirected)),
    *(kind("Words.") for kind in (Unauthorised, SlowClient, ScoringFailed, ShuttingDown)),
    *(kind("Words.") for kind in (DeadlinePassed, OutOfMemory)),
    Overloaded("The queue is full", 1.0),
)
"""An error of each kind that a request to rank may end with."""

MODEL_IN_PATH: dict[str, Any] = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": N_("Any name, also with slashes; the server has one model."),
    "schema": {"type": "string", "minLength": 1},
    "example": "nvidia/llama-3_2-nv-rerankqa-1b-v2",
}

CONNECTION_ERRORS = (400, 408, 431, 503)
"""Statuses of requests that are refused before their path is known."""


class RefusalBody(TypedDict):
    """The response to a request that is refused before its path is known."""

    message: str
    detail: str


class Model(TypedDict):
    """A served model, as OpenAI's clients read it."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class Models(TypedDict):
    """Response of ``/v1/models``."""

    object: str
    data: list[Model]


class Health(TypedDict):
    """Response of ``/health``; ``unix`` is the server's time in seconds."""

    status: str
    unix: float
    model: str


class Ready(TypedDict):
    """Response of ``/ready``; without a key of a server that has keys, there is no reason."""

    ready: bool
    reason: NotRequired[str]


RANKING_GROUP = N_("Ranking")
STATE_GROUP = N_("Model and state")
PAGES_GROUP = N_("Pages and description")
GROUPS = {
    RANKING_GROUP: N_("Rank documents for a query, in the API that the client speaks."),
    STATE_GROUP: N_("What is served, and how it is."),
    PAGES_GROUP: N_("Pages for people, and this description."),
}
"""Groups of routes, as /docs shows them."""


@dataclass(frozen=True, slots=True)
class StateRoute:
    """What a GET route that does not rank answers with."""

    words: str
    body: Any = None  # the type of its JSON
    media: str = "application/json"
    keyed: bool = False  # whether it needs a key where there are keys
    busy: Any = CohereError  # the type of its JSON with status 503
    group: str = STATE_GROUP


def _page(words: str) -> StateRoute:
    return StateRoute(words, str, "text/html", group=PAGES_GROUP)


_MODELS = StateRoute(N_("The served model, as OpenAI's clients list it."), Models, keyed=True)

STATE_ROUTES = {
    "/v1/models": _MODELS,
    "/models": _MODELS,
    "/info": StateRoute(N_("Model and limits, as TEI's clients read them."), TeiInfo, keyed=True),
    "/health": StateRoute(N_("200 while the process runs."), Health),
    "/ready": StateRoute(N_("200 if a pair was scored lately; else 503."), Ready, busy=Ready),
    "/metrics": StateRoute(N_("Metrics for Prometheus."), str, "text/plain"),
    "/dashboard/data": StateRoute(
        N_("The last ten minutes of this server, for the dashboard."), dict[str, Any], keyed=True
    ),
    "/openapi.json": StateRoute(N_("This description."), dict[str, Any], group=PAGES_GROUP),
    "/docs": _page(N_("This description, to read and try.")),
    "/": _page(N_("The playground: a page to try the model.")),
    "/dashboard": _page(N_("The dashboard: a page that shows the last ten minutes.")),
}
"""GET routes that do not rank."""

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "Api-Key"},
}
"""Headers that may hold the API key; see :data:`echelon.server.auth.HEADERS`."""


def describe(title: str = "Echelon", *, keys: bool = True) -> dict[str, Any]:
    """The description in the current language; ``keys`` says whether clients need one."""
    schemas = _Schemas()
    security: list[dict[str, list[str]]] = [{name: []} for name in SCHEMES] if keys else []
    paths: dict[str, Any] = {}
    for path, protocols in SHARED.items():
        paths[path] = {"post": {**_ranking(path, protocols, schemas), "security": security}}
    for path, route in STATE_ROUTES.items():
        needed = security if route.keyed else []
        paths[path] = {"get": {**_state(route, schemas), "security": needed}}
    description: dict[str, Any] = {
        "openapi": VERSION,
        "info": {"title": title, "version": __version__, "description": tr(ABOUT)},
        "tags": [{"name": tr(name), "description": tr(words)} for name, words in GROUPS.items()],
        "paths": paths,
        "components": {"schemas": schemas.parts, "securitySchemes": SCHEMES},
    }
    return {key: _without_null(value) for key, value in description.items()}


class _Schemas:
    """Schemas of types, and the parts that they refer to."""

    def __init__(self) -> None:
        types = [kind for p in PROTOCOLS for kind in (p.body, p.response, *p.errors)]
        types += [kind for route in STATE_ROUTES.values() for kind in (route.body, route.busy)]
        types += [RefusalBody]
        found, self.parts = msgspec.json.schema_components(
            types, ref_template="#/components/schemas/{name}"
        )
        self._by_type = dict(zip(map(str, types), found, strict=True))

    def of(self, *types: Any) -> dict[str, Any]:
        """The schema of a value of one of these types."""
        found = [self._by_type[kind] for kind in dict.fromkeys(map(str, types))]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def response(self, words: str, *types: Any, media: str = "application/json") -> dict[str, Any]:
        """A response whose body is a value of one of these types."""
        return {"description": tr(words), "content": {media: {"schema": self.of(*types)}}}

    def errors(self, statuses: set[int], *types: Any) -> dict[str, Any]:
        """The responses of errors whose bodies are values of one of these types."""
        statuses = statuses | set(CONNECTION_ERRORS)
        return {
            str(status): self.response(
                ERRORS[status], *types, *([RefusalBody] if status in CONNECTION_ERRORS else [])
            )
            for status in sorted(statuses)
        }


def _state(route: StateRoute, schemas: _Schemas) -> dict[str, Any]:
    statuses = {Misdirected.status} | ({Unauthorised.status} if route.keyed else set())
    responses = schemas.errors(statuses, CohereError)
    if route.busy is not CohereError:
        responses["503"] = schemas.response(ERRORS[503], route.busy, RefusalBody)
    answer = schemas.response(route.words, route.body, media=route.media)
    responses["200"] = answer
    return {"tags": [tr(route.group)], "summary": tr(route.words), "responses": responses}


def _ranking(path: str, protocols: tuple[ApiProtocol, ...], schemas: _Schemas) -> dict[str, Any]:
    in_order = protocols[::-1]
    headers = {
        name: {"description": tr(words), "schema": {"type": "string"}}
        for name, words in HEADERS.items()
    }
    examples = {d.name: {"summary": d.title, "value": dict(d.example)} for d in in_order}
    body = {"schema": schemas.of(*(d.body for d in in_order)), "examples": examples}
    answer = schemas.response(N_("The results."), *(d.response for d in in_order))
    statuses = {
        protocol.write_error(ErrorResponse(error, "", ""))[0]
        for protocol in protocols
        for error in RANKING_ERRORS
    }
    errors = schemas.errors(statuses, *(kind for d in in_order for kind in d.errors))
    return {
        "tags": [tr(RANKING_GROUP)],
        "summary": ", ".join(d.title for d in in_order),
        "operationId": re.sub(r"\W+", "_", path).strip("_"),
        "parameters": [
            *(
                [MODEL_IN_PATH | {"description": tr(str(MODEL_IN_PATH["description"]))}]
                if path == HOSTED_NIM
                else []
            ),
            {
                "name": "X-Request-Timeout-Ms",
                "in": "header",
                "description": tr("Milliseconds until the response is useless; as timeout_ms."),
                "schema": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
            },
            {
                "name": "X-Request-Priority",
                "in": "header",
                "description": tr("Share of the device; as priority."),
                "schema": {"type": "string", "enum": list(WEIGHTS)},
            },
        ],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": {**answer, "headers": headers}, **errors},
    }


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
