"""The OpenAPI description, made out of the table of dialects: it cannot say what is not so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from echelon import __version__
from echelon.scheduling.fair_queue import WEIGHTS
from echelon.server.protocols import DIALECTS, SHARED
from echelon.server.protocols.tei import TeiInfo
from echelon.server.responses import HEADERS

if TYPE_CHECKING:
    from echelon.server.protocols.base import ApiProtocol

ERRORS = {
    400: "The body is no JSON object; vLLM's and Voyage's dialects say 400 for 422 too.",
    401: "No API key, or a wrong one.",
    408: "The headers or the body did not come in time.",
    413: "More documents, tokens or bytes than one request may have; the field is named.",
    422: "A field is missing or wrong; it is named, with what to do.",
    429: "The queue is full, or would make the request late, or the key has used up its limit. "
    "Retry-After says when to come again.",
    431: "The headers are too long.",
    500: "The model failed; TEI's dialect says 424.",
    503: "Not started, draining, no worker can be kept alive, or too many connections.",
    504: "The deadline (timeout_ms or X-Request-Timeout-Ms) passed, or cannot be met.",
    507: "A document does not fit in memory, even alone.",
}
"""Statuses besides 200, and when they are given."""

PLAIN = {
    "/v1/models": "The served model, as OpenAI's clients list it.",
    "/models": "The same.",
    "/info": "The served model and the limits, as TEI's clients read them.",
    "/health": "200 as long as the process lives.",
    "/ready": "200 where a pair was really scored lately; else 503 with the reason.",
    "/metrics": "Metrics for Prometheus.",
    "/dashboard/data": "The last ten minutes of this server, for the dashboard.",
    "/openapi.json": "This description.",
    "/docs": "This description, to read and try.",
    "/": "The playground: a page to try the model.",
    "/dashboard": "The dashboard: a page that shows the last ten minutes.",
}
"""Routes that are asked with GET."""


VERSION = "3.0.3"
"""The newest that the page under /docs reads: Swagger UI 4 refuses 3.1."""


def describe(title: str = "Echelon") -> dict[str, Any]:
    """The description."""
    types = [dialect.request for dialect in DIALECTS]
    schemas, parts = msgspec.json.schema_components(
        [*types, TeiInfo], ref_template="#/components/schemas/{name}"
    )
    bodies = {d.name: schema for d, schema in zip(DIALECTS, schemas, strict=False)}
    paths: dict[str, Any] = {
        path: {"post": _ranks(path, them, bodies)} for path, them in SHARED.items()
    }
    paths |= {path: {"get": _plain(says)} for path, says in PLAIN.items()}
    answer = paths["/info"]["get"]["responses"]["200"]
    answer["content"] = {"application/json": {"schema": schemas[-1]}}
    description = {
        "openapi": VERSION,
        "info": {"title": title, "version": __version__, "description": _WORDS},
        "paths": paths,
        "components": {
            "schemas": parts,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
    told: dict[str, Any] = _without_null(description)
    return told


def _without_null(part: Any) -> Any:
    """Schemas in the words of OpenAPI 3.0, where null is no type but a property of one."""
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


_WORDS = (
    "Reranking in the dialects that clients already speak. Each dialect also has paths of its own "
    "under its name, such as /jina/v1/rerank, where bodies need not tell which it is."
)


def _ranks(
    path: str, dialects: tuple[ApiProtocol, ...], bodies: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    spoken = list(reversed(dialects))
    schemas = [bodies[dialect.name] for dialect in spoken]
    examples = {d.name: {"summary": d.title, "value": dict(d.example)} for d in spoken}
    return {
        "summary": ", ".join(d.title for d in spoken),
        "operationId": path.strip("/").replace("/", "_"),
        "parameters": [
            {
                "name": "X-Request-Timeout-Ms",
                "in": "header",
                "description": "Milliseconds until the answer is of no use; as timeout_ms.",
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
        "responses": {"200": _answer()}
        | {str(status): {"description": says} for status, says in ERRORS.items()},
    }


def _answer() -> dict[str, Any]:
    headers = {
        name: {"description": says, "schema": {"type": "string"}} for name, says in HEADERS.items()
    }
    return {"description": "The results.", "headers": headers}


def _plain(says: str) -> dict[str, Any]:
    return {"summary": says, "responses": {"200": {"description": says}}}
