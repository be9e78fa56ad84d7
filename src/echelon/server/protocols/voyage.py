"""Voyage's rerank. On the path that it shares, ``top_k`` or ``truncation`` tells it apart."""

from __future__ import annotations

from echelon.server.protocols import base
from echelon.types import RerankRequest


class VoyageRequest(base.CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_k: int | None = None
    return_documents: bool | None = None
    truncation: bool | None = None


def _read(body: VoyageRequest) -> tuple[RerankRequest, base.ResponseOptions]:
    pairs = base.pairs_of(body.query, body.documents)
    documents = body.documents if body.return_documents else None
    request = RerankRequest(pairs, refuse_truncation=body.truncation is False)
    return request, base.ResponseOptions(documents, base.limit_of(body.top_k, "top_k"))


def _write(response: base.RerankResponse) -> base.Body:
    return {
        "object": "list",
        "data": base.relevance_results(response),
        "model": response.model,
        "usage": {"total_tokens": response.tokens},
    }


def _write_error(response: base.ErrorResponse) -> tuple[int, base.Body]:
    return response.status_without_422, {"detail": response.message}


VOYAGE = base.ApiProtocol(
    name="voyage",
    title="Voyage",
    paths=("/v1/rerank",),
    body=VoyageRequest,
    claims=base.holds("top_k", "truncation"),
    read=_read,
    write=_write,
    write_error=_write_error,
    example={"model": "rerank-2.5", **base.EXAMPLE, "top_k": 1},
)
