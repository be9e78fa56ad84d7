"""Jina's rerank. On the path that it shares, a model named ``jina…`` tells it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.server.protocols.base import (
    ApiProtocol,
    ErrorResponse,
    Extras,
    RerankRequest,
    extras,
    limit_of,
    pairs_of,
    text_of,
)

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, Fields, RerankResponse


class JinaRequest(Extras, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None


def _claims(fields: Fields) -> bool:
    return bytes(fields.get("model", b"")).startswith(b'"jina')


def _read(body: JinaRequest) -> RerankRequest:
    texts = [text_of(document, i) for i, document in enumerate(body.documents)]
    return RerankRequest(
        pairs=pairs_of(body.query, texts),
        documents=[{"text": text} for text in texts]
        if body.return_documents is not False
        else None,
        top_n=limit_of(body.top_n),
        **extras(body),
    )


def _write(outcome: RerankResponse) -> Body:
    results = []
    for hit in outcome.hits:
        result: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if outcome.with_documents:
            result["document"] = hit.document
        results.append(result)
    return {
        "model": outcome.model,
        "object": "list",
        "usage": {"total_tokens": outcome.tokens, "prompt_tokens": outcome.tokens},
        "results": results,
    }


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    return complaint.status, {"detail": str(complaint)}


JINA = ApiProtocol(
    name="jina",
    title="Jina",
    paths=("/v1/rerank",),
    request=JinaRequest,
    claims=_claims,
    read=_read,
    write=_write,
    complain=_complain,
    noun="documents",
    example={
        "model": "jina-reranker-v2-base-multilingual",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", {"text": "Bananas are yellow."}],
        "top_n": 1,
    },
)
