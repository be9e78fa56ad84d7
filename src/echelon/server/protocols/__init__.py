"""API protocols, one file each, and the table of their paths.

On a path that several protocols share, a body belongs to the first that claims it, else to the
last. Each protocol also has paths under its family's name (``/jina/v1/rerank``), for clients whose
bodies use no field that tells protocols apart.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from echelon.errors import InvalidInput, Malformed
from echelon.server.protocols.base import Fields, priority_of
from echelon.server.protocols.cohere import COHERE_V1, COHERE_V2
from echelon.server.protocols.infinity import INFINITY
from echelon.server.protocols.jina import JINA
from echelon.server.protocols.nim import NIM
from echelon.server.protocols.tei import TEI
from echelon.server.protocols.vllm import VLLM_RERANK, VLLM_SCORE
from echelon.server.protocols.voyage import VOYAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echelon.server.protocols.base import ApiProtocol, RequestTexts, ResponseOptions
    from echelon.types import RerankRequest

PROTOCOLS = (COHERE_V1, COHERE_V2, JINA, TEI, VLLM_RERANK, VLLM_SCORE, INFINITY, VOYAGE, NIM)

HOSTED_NIM = "/v1/retrieval/{model}/reranking"
"""Path of NVIDIA's hosted models, whose names contain a slash; clients of NIM use it too."""

SHARED: dict[str, tuple[ApiProtocol, ...]] = {
    "/v1/rerank": (VOYAGE, INFINITY, VLLM_RERANK, JINA, COHERE_V1),
    "/v2/rerank": (VLLM_RERANK, COHERE_V2),
    "/rerank": (TEI, INFINITY, VLLM_RERANK),
    "/score": (VLLM_SCORE,),
    "/v1/score": (VLLM_SCORE,),
    "/v1/ranking": (NIM,),
    HOSTED_NIM: (NIM,),
}
"""Paths as clients of the original APIs know them."""

PATHS: dict[str, tuple[ApiProtocol, ...]] = SHARED | {
    path: (protocol,) for protocol in PROTOCOLS for path in protocol.own_paths
}
"""Every path that ranks."""


def protocol_of(path: str) -> ApiProtocol:
    """The protocol of errors on a path. TEI's clients send requests to / too."""
    if path == "/":
        return TEI
    if path.startswith("/v1/retrieval/") and path.endswith("/reranking"):
        return NIM
    return PATHS.get(path, (COHERE_V1,))[-1]


TIMEOUT_HEADER = "X-Request-Timeout-Ms"
PRIORITY_HEADER = "X-Request-Priority"

_FIELDS = msgspec.json.Decoder(Fields)
_DECODERS = {protocol.name: msgspec.json.Decoder(protocol.body) for protocol in PROTOCOLS}


def choose(candidates: tuple[ApiProtocol, ...], body: bytes | bytearray) -> ApiProtocol:
    """Find the protocol of a body; raises Malformed where it is no JSON object."""
    if len(candidates) == 1:
        return candidates[0]
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    return next((p for p in candidates[:-1] if p.claims(fields)), candidates[-1])


def read(
    protocol: ApiProtocol,
    body: bytes | bytearray,
    headers: Mapping[str, str],
    now: float,
    texts: RequestTexts,
) -> tuple[RerankRequest, ResponseOptions]:
    """Read a request; its time limit and priority may be in the body or in headers.

    Args:
        protocol: the body's.
        body: JSON.
        headers: by their names in lower case.
        now: time from which the time limit counts.
        texts: makes and counts its texts.

    Raises:
        Malformed: the body is no JSON object.
        InvalidInput: a field is missing or wrong.
        TooLarge, Overloaded: its texts exceed a limit.
    """
    try:
        fields: Any = _DECODERS[protocol.name].decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    texts.decoded(fields)
    request, options = protocol.read(fields, texts)
    # The body's come first; the headers are checked in any case.
    header_s = _timeout_of(headers.get(TIMEOUT_HEADER.lower()), TIMEOUT_HEADER)
    header_priority = priority_of(headers.get(PRIORITY_HEADER.lower()), PRIORITY_HEADER)
    timeout_s = _timeout_of(fields.timeout_ms, "timeout_ms") or header_s
    priority = priority_of(fields.priority) or header_priority
    deadline = None if timeout_s is None else now + timeout_s
    raw_scores = options.raw_scores or bool(fields.raw_scores)
    instruction = fields.instruction or request.instruction
    asked = replace(request, deadline=deadline, instruction=instruction)
    return (
        replace(asked, priority=priority or "normal"),
        replace(options, raw_scores=raw_scores, explain=bool(fields.explain)),
    )


def _timeout_of(milliseconds: float | str | None, field: str) -> float | None:
    """Seconds until the answer is useless; None is no limit."""
    if milliseconds is None:
        return None
    try:
        timeout_s = float(milliseconds) / 1000
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < math.inf:
        raise InvalidInput(field, "is no positive number of milliseconds", "Give 1 or more.")
    return timeout_s


def _malformed(error: Exception) -> Malformed:
    return Malformed("body", f"is no JSON object ({error})", "Send JSON in UTF-8.")


def _invalid(message: str) -> InvalidInput:
    """Name the field of a message such as ``Expected `str`, got `int` - at `$.documents[1]```."""
    problem, _, path = message.partition(" - at `$.")
    missing = problem.partition("missing required field `")[2].rstrip("`")
    field = ".".join(part for part in (path.rstrip("`"), missing) if part)
    problem = "is missing" if missing else problem.replace("`", "")
    return InvalidInput(field or "body", problem, "See /docs for the fields of this route.")
