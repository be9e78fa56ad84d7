"""NVIDIA NIM's ranking: passages in objects, logits as they are."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

import echelon.server.protocols.base as api
from echelon.errors import InvalidInput
from echelon.types import RerankRequest


class NimText(msgspec.Struct):
    """A query or a passage."""

    text: str


class NimRequest(api.CommonFields, kw_only=True):
    """Body of ``/v1/ranking``."""

    query: NimText
    passages: list[NimText]
    model: str | None = None
    truncate: str | None = None
    top_n: int | None = None


def _read(body: NimRequest, texts: api.RequestTexts) -> tuple[RerankRequest, api.ResponseOptions]:
    truncate = body.truncate or "NONE"
    if truncate not in {"NONE", "END"}:
        raise InvalidInput("truncate", f"{truncate!r} is unknown", "Use NONE or END.")
    pairs = texts.pairs(body.query.text, [passage.text for passage in body.passages], "passages")
    request = RerankRequest(pairs, refuse_truncation=truncate == "NONE")
    return request, api.ResponseOptions(top_n=api.limit_of(body.top_n), raw_scores=True)


class NimRanking(TypedDict):
    """One passage's logit."""

    index: int
    logit: float


class NimResponse(api.Explained):
    """Response of ``/v1/ranking``."""

    rankings: list[NimRanking]
    usage: api.Usage


class NimError(TypedDict):
    """An error."""

    object: str
    message: str
    detail: dict[str, Any]
    type: str


def _write(response: api.RerankResponse) -> NimResponse:
    return {
        "rankings": [{"index": one.index, "logit": one.logit} for one in response.results],
        "usage": api.usage_of(response),
    }


def _write_error(response: api.ErrorResponse) -> tuple[int, NimError]:
    caller = response.status < 500  # noqa: PLR2004 - HTTP's own
    return response.status, {
        "object": "error",
        "message": response.message,
        "detail": {},
        "type": "invalid_request_error" if caller else "internal_server_error",
    }


NIM = api.ApiProtocol(
    name="nim",
    title="NVIDIA NIM",
    paths=("/v1/ranking",),
    body=NimRequest,
    claims=api.holds("passages"),
    read=_read,
    write=_write,
    write_error=_write_error,
    response=NimResponse,
    errors=(NimError,),
    noun="passages",
    example={
        "model": "nvidia/llama-3.2-nv-rerankqa-1b-v2",
        "query": {"text": "how do I reset my router?"},
        "passages": [{"text": "Hold the button for ten seconds."}, {"text": "Bananas are yellow."}],
        "truncate": "END",
    },
)
