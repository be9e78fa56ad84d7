"""Jina's rerank. On the path that it shares, a model named ``jina…`` tells it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.server.protocols.base import (
    ApiProtocol,
    CommonFields,
    ErrorResponse,
    ResponseOptions,
    limit_of,
    pairs_of,
    relevance_results,
    text_of,
    usage_of,
)
from echelon.types import RerankRequest

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, Fields, RerankResponse


class JinaRequest(CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None


def _claims(fields: Fields) -> bool:
    return bytes(fields.get("model", b"")).startswith(b'"jina')


def _read(body: JinaRequest) -> tuple[RerankRequest, ResponseOptions]:
    texts = [text_of(document, i) for i, document in enumerate(body.documents)]
    documents = None if body.return_documents is False else [{"text": text} for text in texts]
    request = RerankRequest(pairs_of(body.query, texts))
    return request, ResponseOptions(documents, limit_of(body.top_n))


def _write(response: RerankResponse) -> Body:
    return {
        "model": response.model,
        "object": "list",
        "usage": usage_of(response),
        "results": relevance_results(response),
    }


def _write_error(response: ErrorResponse) -> tuple[int, Body]:
    return response.status, {"detail": response.message}


JINA = ApiProtocol(
    name="jina",
    title="Jina",
    paths=("/v1/rerank",),
    body=JinaRequest,
    claims=_claims,
    read=_read,
    write=_write,
    write_error=_write_error,
    noun="documents",
    example={
        "model": "jina-reranker-v2-base-multilingual",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", {"text": "Bananas are yellow."}],
        "top_n": 1,
    },
)
