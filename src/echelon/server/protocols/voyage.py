"""Voyage's rerank. On the path that it shares, ``top_k`` or ``truncation`` tells it apart."""

from __future__ import annotations

import echelon.server.protocols.base as api
from echelon.types import RerankRequest


class VoyageRequest(api.CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_k: int | None = None
    return_documents: bool | None = None
    truncation: bool | None = None


def _read(
    body: VoyageRequest, texts: api.RequestTexts
) -> tuple[RerankRequest, api.ResponseOptions]:
    pairs = texts.pairs(body.query, body.documents)
    documents = body.documents if body.return_documents else None
    request = RerankRequest(pairs, refuse_truncation=body.truncation is False)
    return request, api.ResponseOptions(documents, api.limit_of(body.top_k, "top_k"))


class VoyageResponse(api.Explained):
    """Response of ``/v1/rerank``."""

    object: str
    data: list[api.RelevanceResult]
    model: str
    usage: dict[str, int]


def _write(response: api.RerankResponse) -> VoyageResponse:
    return {
        "object": "list",
        "data": api.relevance_results(response),
        "model": response.model,
        "usage": {"total_tokens": response.tokens},
    }


def _write_error(response: api.ErrorResponse) -> tuple[int, api.DetailError]:
    return response.status_without_422, {"detail": response.message}


VOYAGE = api.ApiProtocol(
    name="voyage",
    title="Voyage",
    paths=("/v1/rerank",),
    body=VoyageRequest,
    claims=api.holds("top_k", "truncation"),
    read=_read,
    write=_write,
    write_error=_write_error,
    response=VoyageResponse,
    errors=(api.DetailError,),
    example={"model": "rerank-2.5", **api.EXAMPLE, "top_k": 1},
)
