"""text-embeddings-inference's rerank: ``texts``, and a list as the response."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import msgspec

import echelon.server.protocols.base as api
from echelon.errors import InvalidInput
from echelon.types import RerankRequest


class TeiRequest(api.CommonFields, kw_only=True):
    """Body of ``/rerank``."""

    query: str
    texts: list[str]
    truncate: bool | None = None
    truncation_direction: str | None = None
    return_text: bool | None = None
    top_n: int | None = None


def _read(body: TeiRequest, texts: api.RequestTexts) -> tuple[RerankRequest, api.ResponseOptions]:
    request = RerankRequest(
        texts.pairs(body.query, body.texts, "texts"),
        refuse_truncation=body.truncate is False,
        side=api.side_of(body.truncation_direction, "truncation_direction"),
    )
    documents = body.texts if body.return_text else None
    return request, api.ResponseOptions(documents, api.limit_of(body.top_n))


class TeiRank(TypedDict):
    """One result; a response is a list of them."""

    index: int
    score: float
    text: NotRequired[str]


class TeiError(TypedDict):
    """An error."""

    error: str
    error_type: str


def _write(response: api.RerankResponse) -> list[TeiRank]:
    if not response.with_documents:
        return [{"index": one.index, "score": one.score} for one in response.results]
    return [
        {"index": one.index, "score": one.score, "text": one.document} for one in response.results
    ]


_KINDS = {
    **dict.fromkeys((400, 405, 413, 415, 421, 422), "Validation"),
    401: "Unauthorized",
    **dict.fromkeys((429, 504), "Overloaded"),
    503: "Unhealthy",
}
"""``error_type`` of each status. TEI itself knows no deadlines; a client that handles
``Overloaded`` does the right thing when one has passed."""

_BACKEND = {500, 507}
"""Statuses for which TEI answers 424: the model failed, not the caller."""


def _write_error(response: api.ErrorResponse) -> tuple[int, TeiError]:
    error = response.error
    if isinstance(error, InvalidInput) and (error.field, error.problem) == ("texts", "is empty"):
        return 400, {"error": response.message, "error_type": "Empty"}
    status = 424 if response.status in _BACKEND else response.status
    return status, {"error": response.message, "error_type": _KINDS.get(status, "Backend")}


class TeiInfo(msgspec.Struct):
    """Response of ``/info``."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


TEI = api.ApiProtocol(
    name="tei",
    title="text-embeddings-inference",
    paths=("/rerank",),
    body=TeiRequest,
    claims=api.holds("texts"),
    read=_read,
    write=_write,
    write_error=_write_error,
    response=list[TeiRank],
    errors=(TeiError,),
    noun="texts",
    example={
        "query": "how do I reset my router?",
        "texts": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "raw_scores": False,
        "return_text": False,
    },
)
