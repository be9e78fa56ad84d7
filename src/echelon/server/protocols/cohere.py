"""Cohere's rerank, versions 1 and 2.

On ``/v1/rerank`` many servers and clients use these fields, so what version 1 answers also holds
what clients of Jina, infinity and vLLM read there: ``model``, ``object``, ``created``, ``usage``,
and in errors ``detail``. Cohere's own client ignores what it does not know.
"""

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
from echelon.tokenization.chunking import Chunking

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, Fields, RerankResponse


class CohereV1(Extras, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    rank_fields: list[str] | None = None
    return_documents: bool | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None


class CohereV2(Extras, kw_only=True):
    """Body of ``/v2/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    max_tokens_per_doc: int | None = None


def _read_v1(body: CohereV1) -> RerankRequest:
    fields = body.rank_fields or ()
    texts = [text_of(document, i, fields) for i, document in enumerate(body.documents)]
    return RerankRequest(
        pairs=pairs_of(body.query, texts),
        documents=[_as_object(d) for d in body.documents] if body.return_documents else None,
        top_n=limit_of(body.top_n),
        chunking=_chunking(body.max_tokens_per_doc, body.max_chunks_per_doc),
        **extras(body),
    )


def _read_v2(body: CohereV2) -> RerankRequest:
    texts = [text_of(document, i) for i, document in enumerate(body.documents)]
    return RerankRequest(
        pairs=pairs_of(body.query, texts),
        top_n=limit_of(body.top_n),
        chunking=_chunking(body.max_tokens_per_doc, None),
        **extras(body),
    )


def _chunking(tokens: int | None, chunks: int | None) -> Chunking | None:
    return None if tokens is None and chunks is None else Chunking(tokens, chunks)


def _as_object(document: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _write_v1(outcome: RerankResponse) -> Body:
    results = []
    for hit in outcome.hits:
        result: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if outcome.with_documents:
            result["document"] = hit.document
        results.append(result)
    return {
        "id": outcome.number,
        "object": "rerank",
        "created": outcome.created,
        "model": outcome.model,
        "results": results,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        "meta": _meta("1", outcome),
    }


def _write_v2(outcome: RerankResponse) -> Body:
    results = [{"index": hit.index, "relevance_score": hit.score} for hit in outcome.hits]
    return {"id": outcome.number, "results": results, "meta": _meta("2", outcome)}


def _meta(version: str, outcome: RerankResponse) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "api_version": {"version": version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": outcome.tokens, "output_tokens": 0},
    }
    if outcome.warnings:
        meta["warnings"] = list(outcome.warnings)
    return meta


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    words = str(complaint)
    return complaint.status, {"id": complaint.number, "message": words, "detail": words}


def _never(_: Fields) -> bool:
    return False


_EXAMPLE = {
    "model": "rerank-v3.5",
    "query": "how do I reset my router?",
    "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
    "top_n": 1,
}

COHERE_V1 = ApiProtocol(
    name="cohere_v1",
    title="Cohere v1",
    paths=("/v1/rerank",),
    request=CohereV1,
    claims=_never,
    read=_read_v1,
    write=_write_v1,
    complain=_complain,
    noun="documents",
    example={**_EXAMPLE, "return_documents": True},
)

COHERE_V2 = ApiProtocol(
    name="cohere_v2",
    title="Cohere v2",
    paths=("/v2/rerank",),
    request=CohereV2,
    claims=_never,
    read=_read_v2,
    write=_write_v2,
    complain=_complain,
    noun="documents",
    example={**_EXAMPLE, "max_tokens_per_doc": 4096},
)
