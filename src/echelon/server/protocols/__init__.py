"""One file for each API shape, and the table of paths.

Which dialects are spoken on which path, and how those that share one are told apart.

A body is of the first dialect of its path that claims it, else of the last. Each dialect also has
paths of its own under its family's name (``/jina/v1/rerank``), for clients whose bodies do not
tell: those ask for nothing that another dialect would not have as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from echelon.errors import InvalidInput, Malformed
from echelon.server.protocols.base import Fields
from echelon.server.protocols.cohere import COHERE_V1, COHERE_V2
from echelon.server.protocols.infinity import INFINITY
from echelon.server.protocols.jina import JINA
from echelon.server.protocols.nim import NIM
from echelon.server.protocols.tei import TEI
from echelon.server.protocols.vllm import VLLM_RERANK, VLLM_SCORE
from echelon.server.protocols.voyage import VOYAGE

if TYPE_CHECKING:
    from echelon.server.protocols.base import ApiProtocol, RerankRequest

DIALECTS: tuple[ApiProtocol, ...] = (
    COHERE_V1,
    COHERE_V2,
    JINA,
    TEI,
    VLLM_RERANK,
    VLLM_SCORE,
    INFINITY,
    VOYAGE,
    NIM,
)

SHARED: dict[str, tuple[ApiProtocol, ...]] = {
    "/v1/rerank": (VOYAGE, INFINITY, VLLM_RERANK, JINA, COHERE_V1),
    "/v2/rerank": (VLLM_RERANK, COHERE_V2),
    "/rerank": (TEI, INFINITY, VLLM_RERANK),
    "/score": (VLLM_SCORE,),
    "/v1/score": (VLLM_SCORE,),
    "/v1/ranking": (NIM,),
}
"""Paths as their clients know them."""


def _own() -> dict[str, tuple[ApiProtocol, ...]]:
    paths: dict[str, tuple[ApiProtocol, ...]] = {}
    for dialect in DIALECTS:
        family = dialect.name.partition("_")[0]
        paths |= {f"/{family}{path}": (dialect,) for path in dialect.paths}
    return paths


PATHS: dict[str, tuple[ApiProtocol, ...]] = SHARED | _own()
"""Every path that ranks."""

_FIELDS = msgspec.json.Decoder(Fields)
_READERS = {dialect.name: msgspec.json.Decoder(dialect.request) for dialect in DIALECTS}


def choose(candidates: tuple[ApiProtocol, ...], body: bytes) -> ApiProtocol:
    """The dialect of a body.

    Raises:
        Malformed: it is no JSON object.
    """
    if len(candidates) == 1:
        return candidates[0]
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    return next((d for d in candidates[:-1] if d.claims(fields)), candidates[-1])


def read(dialect: ApiProtocol, body: bytes) -> RerankRequest:
    """A body in our words.

    Raises:
        Malformed: it is no JSON object.
        InvalidInput: a field is missing or wrong.
    """
    try:
        request: Any = _READERS[dialect.name].decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    return dialect.read(request)


def _malformed(error: Exception) -> Malformed:
    return Malformed("body", f"is no JSON object ({error})", "Send JSON in UTF-8.")


def _invalid(words: str) -> InvalidInput:
    """Name the field: the words are ``Expected `str`, got `int` - at `$.documents[1]```."""
    problem, _, path = words.partition(" - at `$.")
    missing = problem.partition("missing required field `")[2].rstrip("`")
    field = ".".join(part for part in (path.rstrip("`"), missing) if part)
    told = "is missing" if missing else problem.replace("`", "")
    return InvalidInput(field or "body", told, "See /docs for the fields of this route.")
