"""The OpenAPI description, made from the table of protocols, so that the two always agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from echelon import __version__
from echelon.scheduling.fair_queue import WEIGHTS
from echelon.server.protocols import PROTOCOLS, SHARED
from echelon.server.protocols.tei import TeiInfo
from echelon.server.routes import HEADERS

if TYPE_CHECKING:
    from echelon.server.protocols.base import ApiProtocol

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

PLAIN = {
    "/v1/models": "The served model, as OpenAI's clients list it.",
    "/models": "The same.",
    "/info": "The served model and the limits, as TEI's clients read them.",
    "/health": "200 while the process runs.",
    "/ready": "200 if a pair was scored lately; else 503 with the reason.",
    "/metrics": "Metrics for Prometheus.",
    "/dashboard/data": "The last ten minutes of this server, for the dashboard.",
    "/openapi.json": "This description.",
    "/docs": "This description, to read and try.",
    "/": "The playground: a page to try the model.",
    "/dashboard": "The dashboard: a page that shows the last ten minutes.",
}
"""GET routes."""

VERSION = "3.0.3"
"""The newest version that the page /docs reads: Swagger UI 4 refuses 3.1."""


def describe(title: str = "Echelon") -> dict[str, Any]:
    """Describe the API."""
    types = [protocol.body for protocol in PROTOCOLS]
    schemas, parts = msgspec.json.schema_components(
        [*types, TeiInfo], ref_template="#/components/schemas/{name}"
    )
    bodies = {d.name: schema for d, schema in zip(PROTOCOLS, schemas, strict=False)}
    paths: dict[str, Any] = {
        path: {"post": _ranking(path, protocols, bodies)} for path, protocols in SHARED.items()
    }
    paths |= {path: {"get": _plain(words)} for path, words in PLAIN.items()}
    info = paths["/info"]["get"]["responses"]["200"]
    info["content"] = {"application/json": {"schema": schemas[-1]}}
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
    found: dict[str, Any] = _without_null(description)
    return found


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


_WORDS = (
    "Reranking in the APIs that clients already use. Each API also has paths under its own name, "
    "such as /jina/v1/rerank, for bodies that do not show which API they are written for."
)


def _ranking(
    path: str, protocols: tuple[ApiProtocol, ...], bodies: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    in_order = list(reversed(protocols))
    schemas = [bodies[protocol.name] for protocol in in_order]
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
        "responses": {"200": _results()}
        | {str(status): {"description": words} for status, words in ERRORS.items()},
    }


def _results() -> dict[str, Any]:
    headers = {
        name: {"description": words, "schema": {"type": "string"}}
        for name, words in HEADERS.items()
    }
    return {"description": "The results.", "headers": headers}


def _plain(words: str) -> dict[str, Any]:
    return {"summary": words, "responses": {"200": {"description": words}}}
