"""What every dialect is translated to and from: a wish, and its outcome. Plain data.

A dialect is a table of pure functions. It knows the shapes of one API and nothing of HTTP,
services or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from echelon.errors import EchelonError
    from echelon.options import Truncation
    from echelon.scheduling.fair_queue import Priority
    from echelon.tokenization.chunking import Chunking, Side
    from echelon.types import Pair

Fields = dict[str, msgspec.Raw]
"""A request's body, its values still unread."""

Body = dict[str, Any] | list[Any] | None
"""What becomes JSON; None is an empty body."""


class Extras(msgspec.Struct, kw_only=True):
    """What a request of any dialect may hold besides its own fields.

    Here and in the dialects every field but those that must be there may be null, which means what
    leaving it out means: many clients send all that they know.

    Attributes:
        timeout_ms: milliseconds until the answer is of no use.
        raw_scores: logits instead of their sigmoid.
        explain: the answer's body says what happened, under ``echelon``.
        priority: low, normal or high; or a number of which lower is sooner and 0 is normal.
    """

    timeout_ms: float | None = None
    raw_scores: bool | None = None
    explain: bool | None = None
    priority: int | str | None = None


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """What a request asks for.

    Attributes:
        pairs: (query, document) texts.
        documents: what to give back as documents, one for each pair; None gives none.
        top_n: results at most; None gives all.
        ranked: best first; else in input order.
        raw: logits instead of their sigmoid.
        explain: say in the body what happened.
        timeout_ms: milliseconds until the answer is of no use.
        max_length: tokens of a pair; None is the server's own.
        max_query_tokens: tokens kept of a query.
        truncation: what gives way when a pair is longer; None is the server's own.
        chunking: how longer documents are read.
        whole: refuse documents that would be cut.
        side: the end at which longer texts are cut; None is the model's own.
        priority: share of the device; None where the body does not say.
    """

    pairs: Sequence[Pair]
    documents: Sequence[Any] | None = None
    top_n: int | None = None
    ranked: bool = True
    raw: bool = False
    explain: bool = False
    timeout_ms: float | None = None
    max_length: int | None = None
    max_query_tokens: int | None = None
    truncation: Truncation | None = None
    chunking: Chunking | None = None
    whole: bool = False
    side: Side | None = None
    priority: Priority | None = None


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One result.

    Attributes:
        index: the document's position in the request.
        score: what the wire says of it: sigmoid of the logit, or the logit where that was asked.
        logit: the model's raw output.
        document: the document, where it was asked for.
    """

    index: int
    score: float
    logit: float
    document: Any = None


@dataclass(frozen=True, slots=True)
class RerankResponse:
    """What a request gets.

    Attributes:
        number: the request's id, hexadecimal.
        created: unix time, whole seconds.
        model: the served model's name.
        hits: results, in the order of the answer.
        tokens: tokens that the model saw.
        with_documents: whether results hold documents.
        warnings: what the caller should know.
    """

    number: str
    created: int
    model: str
    hits: Sequence[RerankResult]
    tokens: int
    with_documents: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An error on its way out.

    Attributes:
        error: what is wrong.
        words: its message, with the caller's names for things.
        number: the request's id.
    """

    error: EchelonError
    words: str
    number: str

    @property
    def status(self) -> int:
        """The HTTP status that Echelon gives it; a dialect may know another."""
        return self.error.status

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True, slots=True)
class ApiProtocol:
    """One API's shapes.

    Attributes:
        name: what paths, metrics and logs call it.
        title: what people call it.
        paths: where its clients send requests.
        request: the body's fields.
        claims: whether a body can be of this dialect only, on a path that several share.
        read: a body in our words.
        write: an answer in its words.
        complain: status and body of an error in its words.
        noun: what it calls documents, for messages.
        example: a body.
    """

    name: str
    title: str
    paths: tuple[str, ...]
    request: type[Extras]
    claims: Callable[[Fields], bool]
    read: Callable[[Any], RerankRequest]
    write: Callable[[RerankResponse], Body]
    complain: Callable[[ErrorResponse], tuple[int, Body]]
    noun: str
    example: Mapping[str, Any]


def extras(body: Extras) -> dict[str, Any]:
    """What the fields of every dialect say, as arguments of :class:`RerankRequest`."""
    return {
        "raw": bool(body.raw_scores),
        "explain": bool(body.explain),
        "timeout_ms": body.timeout_ms,
        "priority": priority_of(body.priority),
    }


def holds(*names: str) -> Callable[[Fields], bool]:
    """A claim on bodies with one of these fields."""

    def claims(fields: Fields) -> bool:
        return any(name in fields for name in names)

    return claims


def pairs_of(query: str, texts: Sequence[str], noun: str = "documents") -> list[Pair]:
    """One query with each document.

    Raises:
        InvalidInput: there is no document.
    """
    if not texts:
        raise InvalidInput(noun, "is empty", "Send at least one text.")
    return [(query, text) for text in texts]


def text_of(document: str | dict[str, Any], index: int, fields: Sequence[str] = ()) -> str:
    """A document's text: itself, its ``text``, or the named fields, each on a line.

    Raises:
        InvalidInput: it has none.
    """
    if isinstance(document, str):
        return document
    if fields:
        lines = [f"{name}: {document[name]}" for name in fields if name in document]
        if lines:
            return "\n".join(lines)
        raise InvalidInput(
            f"documents[{index}]",
            f"has none of the rank_fields {', '.join(fields)}",
            "Name fields that it has.",
        )
    text = document.get("text")
    if not isinstance(text, str):
        raise InvalidInput(
            f"documents[{index}]", "has no 'text' that is a string", "Send a string or {text: …}."
        )
    return text


def side_of(word: str | None, field: str) -> Side | None:
    """The end at which texts are cut.

    Raises:
        InvalidInput: neither left nor right.
    """
    if word is None:
        return None
    match word.lower():
        case "left":
            return "left"
        case "right":
            return "right"
    raise InvalidInput(field, f"{word!r} is unknown", "Use left or right.")


def limit_of(top_n: int | None, field: str = "top_n") -> int | None:
    """Results at most; 0 and None give all.

    Raises:
        InvalidInput: negative.
    """
    if top_n is not None and top_n < 0:
        raise InvalidInput(field, f"{top_n} is negative", "Give 1 or more, or leave it out.")
    return top_n or None


def priority_of(told: int | str | None, field: str = "priority") -> Priority | None:
    """Share of the device, by name or by a number of which lower is sooner and 0 is normal.

    Raises:
        InvalidInput: an unknown name.
    """
    if told is None:
        return None
    if isinstance(told, int):
        return "low" if told > 0 else "high" if told < 0 else "normal"
    match told.lower():
        case "low":
            return "low"
        case "normal":
            return "normal"
        case "high":
            return "high"
    raise InvalidInput(field, f"{told!r} is unknown", "Use low, normal or high.")
