"""infinity's rerank. On the paths that it shares, ``raw_scores`` tells it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class InfinityRequest(Extras, kw_only=True):
    """Body of ``/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None


def _read(body: InfinityRequest) -> RerankRequest:
    return RerankRequest(
        pairs=pairs_of(body.query, body.documents),
        documents=body.documents if body.return_documents else None,
        top_n=limit_of(body.top_n),
        **extras(body),
    )


def _write(outcome: RerankResponse) -> Body:
    results = [
        {"relevance_score": hit.score, "index": hit.index, "document": hit.document}
        for hit in outcome.hits
    ]
    return {
        "object": "rerank",
        "results": results,
        "model": outcome.model,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        "id": f"infinity-{outcome.number}",
        "created": outcome.created,
    }


_DETAILED = {400, 401, 413}
"""Errors that infinity's framework answers, in its words."""

_LISTED = 422
"""One for which its words are a list; its client takes every entry apart."""


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    words, status = str(complaint), complaint.status
    if status == _LISTED:
        field = words.partition(": ")[0]
        return status, {"detail": [{"loc": ["body", field], "msg": words, "type": "value_error"}]}
    if status in _DETAILED:
        return status, {"detail": words}
    kind = type(complaint.error).__name__
    return status, {"error": {"message": words, "type": kind, "param": None, "code": status}}


INFINITY = ApiProtocol(
    name="infinity",
    title="infinity",
    paths=("/rerank",),
    request=InfinityRequest,
    claims=holds("raw_scores"),
    read=_read,
    write=_write,
    complain=_complain,
    noun="documents",
    example={
        "model": "default/not-specified",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "return_documents": True,
        "raw_scores": False,
    },
)
