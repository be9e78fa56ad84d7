"""Jina's rerank. On the path that it shares, a model named ``jina…`` tells it apart."""

from __future__ import annotations

from typing import Any

import echelon.server.protocols.base as api
from echelon.types import RerankRequest


class JinaRequest(api.CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None


def _claims(fields: api.Fields) -> bool:
    return bytes(fields.get("model", b"")).startswith(b'"jina')


def _read(body: JinaRequest, texts: api.RequestTexts) -> tuple[RerankRequest, api.ResponseOptions]:
    pairs = texts.pairs(body.query, body.documents)
    documents = None if body.return_documents is False else [{"text": text} for _, text in pairs]
    return RerankRequest(pairs), api.ResponseOptions(documents, api.limit_of(body.top_n))


class JinaResponse(api.Explained):
    """Response of ``/v1/rerank``."""

    model: str
    object: str
    usage: api.Usage
    results: list[api.RelevanceResult]


def _write(response: api.RerankResponse) -> JinaResponse:
    return {
        "model": response.model,
        "object": "list",
        "usage": api.usage_of(response),
        "results": api.relevance_results(response),
    }


def _write_error(response: api.ErrorResponse) -> tuple[int, api.DetailError]:
    return response.status, {"detail": response.message}


JINA = api.ApiProtocol(
    name="jina",
    title="Jina",
    paths=("/v1/rerank",),
    body=JinaRequest,
    claims=_claims,
    read=_read,
    write=_write,
    write_error=_write_error,
    response=JinaResponse,
    errors=(api.DetailError,),
    example={
        "model": "jina-reranker-v2-base-multilingual",
        "query": api.EXAMPLE["query"],
        "documents": ["Hold the button for ten seconds.", {"text": "Bananas are yellow."}],
        "top_n": 1,
    },
)
