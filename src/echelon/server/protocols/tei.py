"""text-embeddings-inference's rerank: ``texts``, and a list as the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from echelon.errors import InvalidInput
from echelon.server.protocols.base import (
    ApiProtocol,
    ErrorResponse,
    Extras,
    RerankRequest,
    extras,
    holds,
    limit_of,
    pairs_of,
    side_of,
)

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, RerankResponse


class TeiRequest(Extras, kw_only=True):
    """Body of ``/rerank``."""

    query: str
    texts: list[str]
    truncate: bool | None = None
    truncation_direction: str | None = None
    return_text: bool | None = None
    top_n: int | None = None


def _read(body: TeiRequest) -> RerankRequest:
    return RerankRequest(
        pairs=pairs_of(body.query, body.texts, "texts"),
        documents=body.texts if body.return_text else None,
        top_n=limit_of(body.top_n),
        whole=body.truncate is False,
        side=side_of(body.truncation_direction, "truncation_direction"),
        **extras(body),
    )


def _write(outcome: RerankResponse) -> Body:
    results = []
    for hit in outcome.hits:
        result: dict[str, Any] = {"index": hit.index, "score": hit.score}
        if outcome.with_documents:
            result["text"] = hit.document
        results.append(result)
    return results


_KINDS = {
    400: "Validation",
    401: "Unauthorized",
    413: "Validation",
    422: "Validation",
    424: "Backend",
    429: "Overloaded",
    503: "Unhealthy",
    504: "Overloaded",
}
"""What TEI's clients find in ``error_type``. Its own errors have no deadline; a client that knows
``Overloaded`` does the right thing with one that has passed."""

_BACKEND = {500, 507}
"""Statuses for which TEI says 424: the model failed, not the caller."""


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    error = complaint.error
    if isinstance(error, InvalidInput) and (error.field, error.problem) == ("texts", "is empty"):
        return 400, {"error": str(complaint), "error_type": "Empty"}
    status = 424 if complaint.status in _BACKEND else complaint.status
    return status, {"error": str(complaint), "error_type": _KINDS.get(status, "Backend")}


class TeiInfo(msgspec.Struct):
    """Answer of ``/info``."""

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


TEI = ApiProtocol(
    name="tei",
    title="text-embeddings-inference",
    paths=("/rerank",),
    request=TeiRequest,
    claims=holds("texts"),
    read=_read,
    write=_write,
    complain=_complain,
    noun="texts",
    example={
        "query": "how do I reset my router?",
        "texts": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "raw_scores": False,
        "return_text": False,
    },
)
