"""NVIDIA NIM's ranking: passages in objects, logits as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from echelon.errors import InvalidInput
from echelon.server.protocols.base import (
    ApiProtocol,
    ErrorResponse,
    Extras,
    RerankRequest,
    extras,
    limit_of,
    pairs_of,
)

if TYPE_CHECKING:
    from echelon.server.protocols.base import Body, Fields, RerankResponse


class NimText(msgspec.Struct):
    """A query or a passage."""

    text: str


class NimRequest(Extras, kw_only=True):
    """Body of ``/v1/ranking``."""

    query: NimText
    passages: list[NimText]
    model: str | None = None
    truncate: str | None = None
    top_n: int | None = None


def _read(body: NimRequest) -> RerankRequest:
    truncate = body.truncate or "NONE"
    if truncate not in {"NONE", "END"}:
        raise InvalidInput("truncate", f"{truncate!r} is unknown", "Use NONE or END.")
    return RerankRequest(
        pairs=pairs_of(body.query.text, [passage.text for passage in body.passages], "passages"),
        top_n=limit_of(body.top_n),
        whole=truncate == "NONE",
        **(extras(body) | {"raw": True}),
    )


def _write(outcome: RerankResponse) -> Body:
    return {
        "rankings": [{"index": hit.index, "logit": hit.logit} for hit in outcome.hits],
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
    }


def _complain(complaint: ErrorResponse) -> tuple[int, Body]:
    callers = complaint.status < 500  # noqa: PLR2004 - HTTP's own
    return complaint.status, {
        "object": "error",
        "message": str(complaint),
        "detail": {},
        "type": "invalid_request_error" if callers else "internal_server_error",
    }


def _claims(fields: Fields) -> bool:
    return "passages" in fields


NIM = ApiProtocol(
    name="nim",
    title="NVIDIA NIM",
    paths=("/v1/ranking",),
    request=NimRequest,
    claims=_claims,
    read=_read,
    write=_write,
    complain=_complain,
    noun="passages",
    example={
        "model": "nvidia/llama-3.2-nv-rerankqa-1b-v2",
        "query": {"text": "how do I reset my router?"},
        "passages": [{"text": "Hold the button for ten seconds."}, {"text": "Bananas are yellow."}],
        "truncate": "END",
    },
)
