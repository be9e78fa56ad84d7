"""Voyage's rerank. On the path that it shares, ``top_k`` or ``truncation`` tells it apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.server.protocols.base import (
    ApiProtocol,
    CommonFields,
    ErrorResponse,
    ResponseOptions,
    holds,
    limit_of,
    pairs_of,
    relevance_results,
)
from echelon.types import RerankRequest

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, RerankResponse


class VoyageRequest(CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_k: int | None = None
    return_documents: bool | None = None
    truncation: bool | None = None


def _read(body: VoyageRequest) -> tuple[RerankRequest, ResponseOptions]:
    pairs = pairs_of(body.query, body.documents)
    documents = body.documents if body.return_documents else None
    request = RerankRequest(pairs, refuse_truncation=body.truncation is False)
    return request, ResponseOptions(documents, limit_of(body.top_k, "top_k"))


def _write(response: RerankResponse) -> Body:
    return {
        "object": "list",
        "data": relevance_results(response),
        "model": response.model,
        "usage": {"total_tokens": response.tokens},
    }


def _write_error(response: ErrorResponse) -> tuple[int, Body]:
    status = 400 if response.status == 422 else response.status  # noqa: PLR2004 - HTTP's own
    return status, {"detail": response.message}


VOYAGE = ApiProtocol(
    name="voyage",
    title="Voyage",
    paths=("/v1/rerank",),
    body=VoyageRequest,
    claims=holds("top_k", "truncation"),
    read=_read,
    write=_write,
    write_error=_write_error,
    noun="documents",
    example={
        "model": "rerank-2.5",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "top_k": 1,
    },
)
