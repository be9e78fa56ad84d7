"""Voyage's rerank. On the path that it shares, ``top_k`` or ``truncation`` tells it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.server.protocols.base import (
    ApiProtocol,
    ErrorResponse,
    Extras,
    RerankRequest,
    extras,
    holds,
    limit_of,
    pairs_of,
)

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, RerankResponse


class VoyageRequest(Extras, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_k: int | None = None
    return_documents: bool | None = None
    truncation: bool | None = None


def _read(body: VoyageRequest) -> RerankRequest:
    return RerankRequest(
        pairs=pairs_of(body.query, body.documents),
        documents=body.documents if body.return_documents else None,
        top_n=limit_of(body.top_k, "top_k"),
        whole=body.truncation is False,
        **extras(body),
    )


def _write(outcome: RerankResponse) -> Body:
    data = []
    for hit in outcome.hits:
        result: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if outcome.with_documents:
            result["document"] = hit.document
        data.append(result)
    return {
        "object": "list",
        "data": data,
        "model": outcome.model,
        "usage": {"total_tokens": outcome.tokens},
    }


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    status = 400 if complaint.status == 422 else complaint.status  # noqa: PLR2004 - HTTP's own
    return status, {"detail": str(complaint)}


VOYAGE = ApiProtocol(
    name="voyage",
    title="Voyage",
    paths=("/v1/rerank",),
    request=VoyageRequest,
    claims=holds("top_k", "truncation"),
    read=_read,
    write=_write,
    complain=_complain,
    noun="documents",
    example={
        "model": "rerank-2.5",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "top_k": 1,
    },
)
