"""infinity's rerank. On the paths that it shares, ``raw_scores`` tells it apart."""

from __future__ import annotations

from typing import TypedDict

import echelon.server.protocols.base as api
from echelon.types import RerankRequest


class InfinityRequest(api.CommonFields, kw_only=True):
    """Body of ``/rerank``."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None


def _read(
    body: InfinityRequest, texts: api.RequestTexts
) -> tuple[RerankRequest, api.ResponseOptions]:
    documents = body.documents if body.return_documents else None
    request = RerankRequest(texts.pairs(body.query, body.documents))
    return request, api.ResponseOptions(documents, api.limit_of(body.top_n))


class InfinityResult(TypedDict):
    """One document's score."""

    relevance_score: float
    index: int
    document: str | None


class InfinityResponse(api.Explained):
    """Response of ``/rerank``."""

    object: str
    results: list[InfinityResult]
    model: str
    usage: api.Usage
    id: str
    created: int


class InfinityDetails(TypedDict):
    """An error about fields; each entry has the field (``loc``), ``msg`` and ``type``."""

    detail: list[dict[str, str | list[str]]]


class InfinityErrorInfo(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class InfinityError(TypedDict):
    """An error that no field caused."""

    error: InfinityErrorInfo


def _write(response: api.RerankResponse) -> InfinityResponse:
    results: list[InfinityResult] = [
        {"relevance_score": one.score, "index": one.index, "document": one.document}
        for one in response.results
    ]
    return {
        "object": "rerank",
        "results": results,
        "model": response.model,
        "usage": api.usage_of(response),
        "id": f"infinity-{response.request_id}",
        "created": response.created,
    }


_DETAIL = {400, 401, 405, 413, 415, 421}
"""Statuses for which infinity's framework writes ``detail`` as a text."""

_DETAIL_LIST = 422
"""The status for which it is a list; infinity's client parses every entry."""


def _write_error(
    response: api.ErrorResponse,
) -> tuple[int, api.DetailError | InfinityDetails | InfinityError]:
    message, status = response.message, response.status
    if status == _DETAIL_LIST:
        field = message.partition(": ")[0]
        return status, {"detail": [{"loc": ["body", field], "msg": message, "type": "value_error"}]}
    if status in _DETAIL:
        return status, {"detail": message}
    kind = type(response.error).__name__
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


INFINITY = api.ApiProtocol(
    name="infinity",
    title="infinity",
    paths=("/rerank",),
    body=InfinityRequest,
    claims=api.holds("raw_scores"),
    read=_read,
    write=_write,
    write_error=_write_error,
    response=InfinityResponse,
    errors=(api.DetailError, InfinityDetails, InfinityError),
    example={
        "model": "default/not-specified",
        **api.EXAMPLE,
        "return_documents": True,
        "raw_scores": False,
    },
)
