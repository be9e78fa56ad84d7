"""Which dialects are spoken on which path, and how those that share one are told apart.

A body is of the first dialect of its path that claims it, else of the last. Each dialect also has
paths of its own under its family's name (``/jina/v1/rerank``), for clients whose bodies do not
tell: those ask for nothing that another dialect would not have as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from echelon.api.dialects.cohere import COHERE_V1, COHERE_V2
from echelon.api.dialects.infinity import INFINITY
from echelon.api.dialects.jina import JINA
from echelon.api.dialects.nim import NIM
from echelon.api.dialects.tei import TEI
from echelon.api.dialects.vllm import VLLM_RERANK, VLLM_SCORE
from echelon.api.dialects.voyage import VOYAGE
from echelon.api.wire import Fields
from echelon.errors import InvalidInput, Malformed

if TYPE_CHECKING:
    from echelon.api.wire import Dialect, Wanted

DIALECTS: tuple[Dialect, ...] = (
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

SHARED: dict[str, tuple[Dialect, ...]] = {
    "/v1/rerank": (VOYAGE, INFINITY, VLLM_RERANK, JINA, COHERE_V1),
    "/v2/rerank": (VLLM_RERANK, COHERE_V2),
    "/rerank": (TEI, INFINITY, VLLM_RERANK),
    "/score": (VLLM_SCORE,),
    "/v1/score": (VLLM_SCORE,),
    "/v1/ranking": (NIM,),
}
"""Paths as their clients know them."""


def _own() -> dict[str, tuple[Dialect, ...]]:
    paths: dict[str, tuple[Dialect, ...]] = {}
    for dialect in DIALECTS:
        family = dialect.name.partition("_")[0]
        paths |= {f"/{family}{path}": (dialect,) for path in dialect.paths}
    return paths


PATHS: dict[str, tuple[Dialect, ...]] = SHARED | _own()
"""Every path that ranks."""

_FIELDS = msgspec.json.Decoder(Fields)
_READERS = {dialect.name: msgspec.json.Decoder(dialect.request) for dialect in DIALECTS}


def choose(candidates: tuple[Dialect, ...], body: bytes) -> Dialect:
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


def read(dialect: Dialect, body: bytes) -> Wanted:
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
