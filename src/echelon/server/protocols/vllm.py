"""vLLM's rerank and score.

What a cross-encoder cannot honour (an instruction, chat templates) is refused, not ignored: it
would change what the scores mean.
"""

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
    text_of,
)
from echelon.tokenization.chunking import Chunking

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, RerankResponse
    from echelon.types import Pair

Texts = str | list[str | dict[str, Any]]


class Common(Extras, kw_only=True):
    """Fields of both requests."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    normalize: bool | None = None


class VllmRerank(Common, kw_only=True):
    """Body of ``/rerank``."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None


class VllmScore(Common, kw_only=True):
    """Body of ``/score``: one text with many, or as many with as many."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    items: Texts | None = None


def _read_rerank(body: VllmRerank) -> RerankRequest:
    texts = [text_of(document, i) for i, document in enumerate(body.documents)]
    tokens = body.max_tokens_per_doc
    return RerankRequest(
        pairs=pairs_of(body.query, texts),
        documents=texts,
        top_n=limit_of(body.top_n),
        max_query_tokens=_positive("max_tokens_per_query", body.max_tokens_per_query),
        chunking=None if tokens is None else Chunking(max_tokens=tokens),
        **_common(body),
    )


def _read_score(body: VllmScore) -> RerankRequest:
    name, first = _one_of(body, ("text_1", "queries", "data_1"))
    noun, second = _one_of(body, ("text_2", "documents", "data_2", "items"))
    return RerankRequest(pairs=_joined(name, first, noun, second), ranked=False, **_common(body))


def _joined(name: str, first: list[str], noun: str, second: list[str]) -> list[Pair]:
    if len(first) == 1:
        return pairs_of(first[0], second, noun)
    if len(first) != len(second):
        raise InvalidInput(
            name,
            f"has {len(first)} texts and {noun} has {len(second)}",
            "Send one text, or as many as there are on the other side.",
        )
    if not first:
        raise InvalidInput(name, "is empty", "Send at least one text.")
    return list(zip(first, second, strict=True))


def _one_of(body: VllmScore, names: tuple[str, ...]) -> tuple[str, list[str]]:
    for name in names:
        value = getattr(body, name)
        if isinstance(value, str):
            return name, [value]
        if value is not None:
            return name, [text_of(text, i) for i, text in enumerate(value)]
    raise InvalidInput(names[0], "is missing", f"Send one of {', '.join(names)}.")


def _common(body: Common) -> dict[str, Any]:
    for name in ("instruction", "chat_template_kwargs", "normalize"):
        if getattr(body, name) is not None:
            raise InvalidInput(name, "means nothing to a cross-encoder", "Leave it out.")
    plain = False in (body.use_activation, body.activation, body.softmax)
    cut = body.truncate_prompt_tokens
    return {
        **extras(body),
        "raw": bool(body.raw_scores) or plain,
        "max_length": None if cut == -1 else _positive("truncate_prompt_tokens", cut),
        "side": side_of(body.truncation_side, "truncation_side"),
    }


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InvalidInput(name, f"{value} is not positive", "Give 1 or more.")
    return value


def _write_rerank(outcome: RerankResponse) -> Body:
    results = [
        {
            "index": hit.index,
            "document": {"text": hit.document, "multi_modal": None},
            "relevance_score": hit.score,
        }
        for hit in outcome.hits
    ]
    return {
        "id": f"rerank-{outcome.number}",
        "model": outcome.model,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        "results": results,
    }


def _write_score(outcome: RerankResponse) -> Body:
    data = [{"index": hit.index, "object": "score", "score": hit.score} for hit in outcome.hits]
    return {
        "id": f"score-{outcome.number}",
        "object": "list",
        "created": outcome.created,
        "model": outcome.model,
        "data": data,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
    }


_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    413: "BadRequestError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    status = 400 if complaint.status == 422 else complaint.status  # noqa: PLR2004 - HTTP's own
    error = {
        "message": str(complaint),
        "type": _KINDS.get(status, "InternalServerError"),
        "param": getattr(complaint.error, "field", None),
        "code": status,
    }
    return status, {"error": error}


_TELLS = tuple(
    name
    for name in (*msgspec.structs.asdict(Common()), "max_tokens_per_query")
    if name not in {"model", "priority", "timeout_ms", "raw_scores", "explain"}
)

VLLM_RERANK = ApiProtocol(
    name="vllm",
    title="vLLM rerank",
    paths=("/rerank", "/v1/rerank", "/v2/rerank"),
    request=VllmRerank,
    claims=holds(*_TELLS),
    read=_read_rerank,
    write=_write_rerank,
    complain=_complain,
    noun="documents",
    example={
        "model": "BAAI/bge-reranker-v2-m3",
        "query": "how do I reset my router?",
        "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
        "top_n": 1,
        "truncate_prompt_tokens": -1,
    },
)

VLLM_SCORE = ApiProtocol(
    name="vllm_score",
    title="vLLM score",
    paths=("/score", "/v1/score"),
    request=VllmScore,
    claims=holds("text_1", "queries", "data_1"),
    read=_read_score,
    write=_write_score,
    complain=_complain,
    noun="text_2",
    example={
        "model": "BAAI/bge-reranker-v2-m3",
        "text_1": "how do I reset my router?",
        "text_2": ["Hold the button for ten seconds.", "Bananas are yellow."],
    },
)
