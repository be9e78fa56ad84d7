"""vLLM's rerank and score.

Fields that a reranker cannot honour (another chat template's) are refused, not ignored: they would
change what the scores mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import echelon.server.protocols.base as api
from echelon.errors import InvalidInput, check_positive
from echelon.types import Chunking, RerankRequest

if TYPE_CHECKING:
    from echelon.types import Pair

Texts = str | list[str | dict[str, Any]]


class Common(api.CommonFields, kw_only=True):
    """Fields of both requests."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
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
    """Body of ``/score``: one text with each of many, or two lists of the same length."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    items: Texts | None = None


def _read_rerank(
    body: VllmRerank, texts: api.RequestTexts
) -> tuple[RerankRequest, api.ResponseOptions]:
    pairs = texts.pairs(body.query, body.documents)
    check_positive(max_tokens_per_query=body.max_tokens_per_query)
    tokens = body.max_tokens_per_doc
    request = RerankRequest(
        pairs,
        max_length=_max_length(body),
        max_query_tokens=body.max_tokens_per_query,
        chunking=None if tokens is None else Chunking(max_tokens=tokens),
        side=api.side_of(body.truncation_side, "truncation_side"),
        instruction=_instruction(body),
    )
    documents, top_n = [text for _, text in pairs], api.limit_of(body.top_n)
    return request, api.ResponseOptions(documents, top_n, raw_scores=_raw_scores(body))


def _read_score(
    body: VllmScore, texts: api.RequestTexts
) -> tuple[RerankRequest, api.ResponseOptions]:
    name, first = _one_of(body, texts, ("text_1", "queries", "data_1"))
    noun, second = _one_of(body, texts, ("text_2", "documents", "data_2", "items"))
    request = RerankRequest(
        _joined(name, first, noun, second),
        max_length=_max_length(body),
        side=api.side_of(body.truncation_side, "truncation_side"),
        instruction=_instruction(body),
    )
    return request, api.ResponseOptions(ranked=False, raw_scores=_raw_scores(body))


def _joined(name: str, first: list[str], noun: str, second: list[str]) -> list[Pair]:
    for field, texts in ((name, first), (noun, second)):
        if not texts:
            raise InvalidInput(field, "is empty", "Send at least one text.")
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidInput(
            name,
            f"has {len(first)} texts and {noun} has {len(second)}",
            "Send one text, or as many as there are on the other side.",
        )
    return list(zip(first, second, strict=True))


def _one_of(
    body: VllmScore, texts: api.RequestTexts, names: tuple[str, ...]
) -> tuple[str, list[str]]:
    for name in names:
        value = getattr(body, name)
        if value is not None:
            return name, texts.of([value] if isinstance(value, str) else value, name)
    raise InvalidInput(names[0], "is missing", f"Send one of {', '.join(names)}.")


def _raw_scores(body: Common) -> bool:
    if body.normalize is not None:
        raise InvalidInput("normalize", "means nothing to a cross-encoder", "Leave it out.")
    return False in (body.use_activation, body.activation, body.softmax)


def _instruction(body: Common) -> str | None:
    """The instruction among the values for a chat template, of which a reranker reads no other."""
    values = body.chat_template_kwargs or {}
    for name, value in values.items():
        if name != "instruction" or not isinstance(value, str):
            field = f"chat_template_kwargs.{name}"
            raise InvalidInput(field, "is no instruction", "Send only an instruction, as text.")
    return values.get("instruction")


def _max_length(body: Common) -> int | None:
    tokens = None if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    check_positive(truncate_prompt_tokens=tokens)
    return tokens


class VllmResult(TypedDict):
    """One document's score."""

    index: int
    document: dict[str, str | None]
    relevance_score: float


class VllmRerankResponse(api.Explained):
    """Response of ``/rerank``."""

    id: str
    model: str
    usage: api.Usage
    results: list[VllmResult]


class VllmScoreData(TypedDict):
    """One pair's score."""

    index: int
    object: str
    score: float


class VllmScoreResponse(api.Explained):
    """Response of ``/score``."""

    id: str
    object: str
    created: int
    model: str
    data: list[VllmScoreData]
    usage: api.Usage


class VllmErrorInfo(TypedDict):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(TypedDict):
    """An error."""

    error: VllmErrorInfo


def _write_rerank(response: api.RerankResponse) -> VllmRerankResponse:
    results: list[VllmResult] = [
        {
            "index": one.index,
            "document": {"text": one.document, "multi_modal": None},
            "relevance_score": one.score,
        }
        for one in response.results
    ]
    return {
        "id": f"rerank-{response.request_id}",
        "model": response.model,
        "usage": api.usage_of(response),
        "results": results,
    }


def _write_score(response: api.RerankResponse) -> VllmScoreResponse:
    data: list[VllmScoreData] = [
        {"index": one.index, "object": "score", "score": one.score} for one in response.results
    ]
    return {
        "id": f"score-{response.request_id}",
        "object": "list",
        "created": response.created,
        "model": response.model,
        "data": data,
        "usage": api.usage_of(response),
    }


_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    **dict.fromkeys((405, 408, 413, 415, 421), "BadRequestError"),
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def _write_error(response: api.ErrorResponse) -> tuple[int, VllmError]:
    status = response.status_without_422
    error: VllmErrorInfo = {
        "message": response.message,
        "type": _KINDS.get(status, "InternalServerError"),
        "param": getattr(response.error, "field", None),
        "code": status,
    }
    return status, {"error": error}


_SHARED = {*api.CommonFields.__struct_fields__, "model"}
_CLAIMS = {*Common.__struct_fields__, "max_tokens_per_query"} - _SHARED
"""Fields that only vLLM's clients send."""

VLLM_RERANK = api.ApiProtocol(
    name="vllm",
    title="vLLM rerank",
    paths=("/rerank", "/v1/rerank", "/v2/rerank"),
    body=VllmRerank,
    claims=api.holds(*_CLAIMS),
    read=_read_rerank,
    write=_write_rerank,
    write_error=_write_error,
    response=VllmRerankResponse,
    errors=(VllmError,),
    example={
        "model": "BAAI/bge-reranker-v2-m3",
        **api.EXAMPLE,
        "top_n": 1,
        "truncate_prompt_tokens": -1,
    },
)

VLLM_SCORE = api.ApiProtocol(
    name="vllm_score",
    title="vLLM score",
    paths=("/score", "/v1/score"),
    body=VllmScore,
    claims=api.holds("text_1", "queries", "data_1"),
    read=_read_score,
    write=_write_score,
    write_error=_write_error,
    response=VllmScoreResponse,
    errors=(VllmError,),
    noun="text_2",
    example={
        "model": "BAAI/bge-reranker-v2-m3",
        "text_1": "how do I reset my router?",
        "text_2": ["Hold the button for ten seconds.", "Bananas are yellow."],
    },
)
