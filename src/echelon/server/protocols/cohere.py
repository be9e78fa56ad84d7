"""Cohere's rerank, versions 1 and 2.

Many servers and clients use these fields on ``/v1/rerank``, so responses of version 1 also have
those that clients of Jina, infinity and vLLM read there: ``model``, ``object``, ``created``,
``usage``, and in errors ``detail``. Cohere's own client ignores fields that it does not know.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import echelon.server.protocols.base as api
from echelon.types import Chunking, RerankRequest


class CohereV1(api.CommonFields, kw_only=True):
    """Body of ``/v1/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    rank_fields: list[str] | None = None
    return_documents: bool | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None


class CohereV2(api.CommonFields, kw_only=True):
    """Body of ``/v2/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None
    max_tokens_per_doc: int | None = None


def _read_v1(body: CohereV1, texts: api.RequestTexts) -> tuple[RerankRequest, api.ResponseOptions]:
    pairs = texts.pairs(body.query, body.documents, fields=body.rank_fields or ())
    tokens, chunks = body.max_tokens_per_doc, body.max_chunks_per_doc
    chunking = None if tokens is None and chunks is None else Chunking(tokens, chunks)
    request = RerankRequest(pairs, chunking=chunking)
    documents = None
    if body.return_documents:
        documents = [{"text": d} if isinstance(d, str) else d for d in body.documents]
    return request, api.ResponseOptions(documents, api.limit_of(body.top_n))


def _read_v2(body: CohereV2, texts: api.RequestTexts) -> tuple[RerankRequest, api.ResponseOptions]:
    tokens = body.max_tokens_per_doc
    chunking = None if tokens is None else Chunking(tokens)
    request = RerankRequest(texts.pairs(body.query, body.documents), chunking=chunking)
    return request, api.ResponseOptions(top_n=api.limit_of(body.top_n))


class CohereMeta(TypedDict):
    """What a response of both versions says about itself."""

    api_version: dict[str, str]
    billed_units: dict[str, int]
    tokens: dict[str, int]
    warnings: NotRequired[list[str]]


class CohereV1Response(api.Explained):
    """Response of ``/v1/rerank``."""

    id: str
    object: str
    created: int
    model: str
    results: list[api.RelevanceResult]
    usage: api.Usage
    meta: CohereMeta


class CohereV2Response(api.Explained):
    """Response of ``/v2/rerank``."""

    id: str
    results: list[api.RelevanceResult]
    meta: CohereMeta


class CohereError(TypedDict):
    """An error."""

    id: str
    message: str
    detail: str


def _write_v1(response: api.RerankResponse) -> CohereV1Response:
    return {
        "id": response.request_id,
        "object": "rerank",
        "created": response.created,
        "model": response.model,
        "results": api.relevance_results(response),
        "usage": api.usage_of(response),
        "meta": _meta("1", response),
    }


def _write_v2(response: api.RerankResponse) -> CohereV2Response:
    results: list[api.RelevanceResult] = [
        {"index": one.index, "relevance_score": one.score} for one in response.results
    ]
    return {"id": response.request_id, "results": results, "meta": _meta("2", response)}


def _meta(version: str, response: api.RerankResponse) -> CohereMeta:
    meta: CohereMeta = {
        "api_version": {"version": version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": response.tokens, "output_tokens": 0},
    }
    if response.warnings:
        meta["warnings"] = list(response.warnings)
    return meta


def _write_error(response: api.ErrorResponse) -> tuple[int, CohereError]:
    message = response.message
    return response.status, {"id": response.request_id, "message": message, "detail": message}


_EXAMPLE = {"model": "rerank-v3.5", **api.EXAMPLE, "top_n": 1}

COHERE_V1 = api.ApiProtocol(
    name="cohere_v1",
    title="Cohere v1",
    paths=("/v1/rerank",),
    body=CohereV1,
    read=_read_v1,
    write=_write_v1,
    write_error=_write_error,
    response=CohereV1Response,
    errors=(CohereError,),
    example={**_EXAMPLE, "return_documents": True},
)

COHERE_V2 = api.ApiProtocol(
    name="cohere_v2",
    title="Cohere v2",
    paths=("/v2/rerank",),
    body=CohereV2,
    read=_read_v2,
    write=_write_v2,
    write_error=_write_error,
    response=CohereV2Response,
    errors=(CohereError,),
    example={**_EXAMPLE, "max_tokens_per_doc": 4096},
)
