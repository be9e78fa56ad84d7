"""Types that every API protocol shares: body fields, response options, results and errors.

A protocol is a table of pure functions. It knows the shapes of one API and nothing of HTTP,
services or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from sys import getsizeof
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import msgspec

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from echelon.errors import EchelonError
    from echelon.server.limits import ServerLimits
    from echelon.types import Pair, Priority, RerankRequest, Side

Fields = dict[str, msgspec.Raw]
"""A request's body, its values still unread."""

Body = Mapping[str, object] | Sequence[Any] | None
"""What becomes JSON; None is an empty body."""


# Parts of bodies that several protocols write. Types of bodies are also their OpenAPI schemas.


class Usage(TypedDict):
    """Token counts, as several APIs spell them."""

    prompt_tokens: int
    total_tokens: int


class RelevanceResult(TypedDict):
    """One document's score."""

    index: int
    relevance_score: float
    document: NotRequired[str | dict[str, Any]]


class Explanation(TypedDict):
    """What happened to a request (``explain``); the headers of answers say the same."""

    queue_ms: float
    tokenise_ms: float
    compute_ms: float
    total_ms: float
    tokens: int
    cost_tokens: int
    truncated_documents: int
    truncated_tokens: list[int]
    batch_sizes: list[int]
    ladder: list[dict[str, str]]
    fallback: dict[str, int] | None


class Explained(TypedDict):
    """Fields of every response that is an object."""

    echelon: NotRequired[Explanation]


class DetailError(TypedDict):
    """An error in the form of FastAPI's."""

    detail: str


class CommonFields(msgspec.Struct, kw_only=True):
    """Fields that the bodies of every protocol may have besides their own.

    Here and in the protocols every optional field may be null, which means the same as leaving it
    out: many clients send all that they know.
    """

    timeout_ms: float | None = None  # milliseconds after which the answer is useless
    raw_scores: bool | None = None
    explain: bool | None = None  # the answer's body says what happened, under ``echelon``
    # a name, or a number of which lower is sooner and 0 is normal
    priority: int | str | None = None
    instruction: str | None = None  # what a language model is asked to judge


EXAMPLE = {
    "query": "how do I reset my router?",
    "documents": ["Hold the button for ten seconds.", "Bananas are yellow."],
}
"""Fields of most protocols' examples."""


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How a request wants its response; scoring does not depend on it."""

    # returned with the results, one for each pair; None returns none
    documents: Sequence[Any] | None = None
    top_n: int | None = None
    ranked: bool = True  # best first; else in input order
    raw_scores: bool = False  # logits instead of their sigmoid
    explain: bool = False


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One document; the score is the sigmoid of the logit, or with raw scores the logit."""

    index: int
    score: float
    logit: float
    document: Any = None


@dataclass(frozen=True, slots=True)
class RerankResponse:
    """The response to a request, before a protocol writes it."""

    request_id: str  # hexadecimal
    created: int  # unix time, whole seconds
    model: str
    results: Sequence[RerankResult]
    tokens: int  # tokens that the model saw
    with_documents: bool = False
    warnings: tuple[str, ...] = ()  # truncated documents, and actions of the OOM ladder


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An error, before a protocol writes it; the message has the protocol's name for documents."""

    error: EchelonError
    message: str
    request_id: str

    @property
    def status(self) -> int:
        """The HTTP status that Echelon gives it; a protocol may use another."""
        return self.error.status

    @property
    def status_without_422(self) -> int:
        """The status for APIs that answer 400 to every invalid request."""
        return 400 if self.status == 422 else self.status  # noqa: PLR2004 - HTTP's own


@dataclass(frozen=True, slots=True)
class ApiProtocol:
    """One API's shapes."""

    name: str  # its name in paths, metrics and logs
    title: str  # its name in documentation
    paths: tuple[str, ...]  # where its clients send requests
    body: type[CommonFields]
    read: Callable[[Any, RequestTexts], tuple[RerankRequest, ResponseOptions]]
    write: Callable[[RerankResponse], Body]
    write_error: Callable[[ErrorResponse], tuple[int, Body]]
    response: Any  # the type of what ``write`` returns
    errors: tuple[Any, ...]  # the types of bodies that ``write_error`` returns
    example: Mapping[str, Any]  # a body
    # whether a body can be of this protocol only, on a path that several share
    claims: Callable[[Fields], bool] = lambda _: False
    noun: str = "documents"  # its name for documents, used in messages

    @property
    def own_paths(self) -> list[str]:
        """Paths under its family's name, such as ``/jina/v1/rerank``."""
        return [f"/{self.name.partition('_')[0]}{path}" for path in self.paths]


def holds(*names: str) -> Callable[[Fields], bool]:
    """A claim on bodies that have one of these fields."""
    return lambda fields: any(name in fields for name in names)


PAIR_BYTES = 64
"""Memory of a pair besides its texts: a tuple, and its place in a list."""


REPR_GROWTH = 10
"""Most times the memory of a list that its text may take: one letter may become ``\\U000e0001``."""


class RequestTexts:
    """Makes the pairs of one request of its texts, which it counts before it makes more of them.

    Args:
        limits: of documents, characters and ``rank_fields``.
        use_memory: takes the bytes that all texts take, whenever they become more; raises where
            there is no room for them.
    """

    def __init__(self, limits: ServerLimits, use_memory: Callable[[int], None]) -> None:
        self._limits = limits
        self._use_memory = use_memory
        self._characters = 0
        self._bytes = 0

    def decoded(self, body: object) -> None:
        """Count the memory of a decoded body."""
        self._use(memory_of(body))

    def pairs(
        self,
        query: str,
        documents: Sequence[str | dict[str, Any]],
        noun: str = "documents",
        fields: Sequence[str] = (),
    ) -> list[Pair]:
        """Pair one query with each document; see :meth:`of`.

        Raises:
            InvalidInput: there is no document.
        """
        self._count("query", len(query))
        if not documents:
            raise InvalidInput(noun, "is empty", "Send at least one text.")
        return [(query, text) for text in self.of(documents, noun, fields)]

    def of(
        self,
        documents: Sequence[str | dict[str, Any]],
        noun: str = "documents",
        fields: Sequence[str] = (),
    ) -> list[str]:
        """The texts of documents: each itself, its ``text``, or its named fields, one a line.

        Raises:
            TooLarge: there are too many documents, characters or fields.
            InvalidInput: a document has none of the fields, or a field is named twice.
        """
        count = len(documents)
        if count > self._limits.max_documents:
            raise self._limits.exceeded("max_documents", noun, f"{count:_} {noun}")
        if fields:
            self._check_fields(fields)
        self._use(count * PAIR_BYTES)
        self._count(noun, sum(len(one) for one in documents if isinstance(one, str)))
        return [
            one if isinstance(one, str) else self._text_of(one, noun, index, fields)
            for index, one in enumerate(documents)
        ]

    def _text_of(
        self, document: dict[str, Any], noun: str, index: int, fields: Sequence[str]
    ) -> str:
        if not fields:
            text = document.get("text")
            if isinstance(text, str):
                self._count(noun, len(text))
                return text
            problem, remedy = "has no 'text' that is a string", "Send a string or {text: …}."
            raise InvalidInput(f"{noun}[{index}]", problem, remedy)
        lines = []
        for name in fields:
            if name in document:
                value = self._str(document[name])
                self._count(noun, len(name) + len(value) + 3)  # with ": " and the end of the line
                self._use(getsizeof(value))
                lines.append(f"{name}: {value}")
        if not lines:
            problem = f"has none of the rank_fields {', '.join(fields)}"
            raise InvalidInput(f"{noun}[{index}]", problem, "Name fields that it has.")
        return "\n".join(lines)

    def _str(self, value: object) -> str:
        if isinstance(value, list | dict):
            self._use_memory(self._bytes + REPR_GROWTH * memory_of(value))  # while it is made
        return str(value)

    def _check_fields(self, fields: Sequence[str]) -> None:
        if len(fields) > self._limits.max_rank_fields:
            raise self._limits.exceeded("max_rank_fields", "rank_fields", f"{len(fields):_} names")
        seen = set()
        for name in fields:
            if name in seen:
                raise InvalidInput("rank_fields", f"{name!r} is twice in it", "Name a field once.")
            seen.add(name)

    def _count(self, noun: str, characters: int) -> None:
        self._characters += characters
        if self._characters > self._limits.max_characters:
            value = f"{self._characters:_} characters or more"
            raise self._limits.exceeded("max_characters", noun, value)

    def _use(self, size: int) -> None:
        self._bytes += size
        self._use_memory(self._bytes)


def memory_of(value: object) -> int:
    """Bytes of memory that a decoded value and all in it take."""
    total, level = 0, [value]
    while level:
        total += sum(map(getsizeof, level))
        level = [part for one in level if type(one) is not str for part in _parts_of(one)]
    return total


def _parts_of(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return chain(value, value.values())
    if isinstance(value, list):
        return value
    return msgspec.structs.astuple(value) if isinstance(value, msgspec.Struct) else ()


def side_of(word: str | None, field: str) -> Side | None:
    """Read the end from which tokens are removed."""
    match word and word.lower():
        case None | "left" | "right" as side:
            return side
    raise InvalidInput(field, f"{word!r} is unknown", "Use left or right.")


def limit_of(top_n: int | None, field: str = "top_n") -> int | None:
    """Read the number of results at most; 0 and None give all."""
    if top_n is not None and top_n < 0:
        raise InvalidInput(field, f"{top_n} is negative", "Give 1 or more, or leave it out.")
    return top_n or None


def priority_of(value: int | str | None, field: str = "priority") -> Priority | None:
    """Read a priority, given by name or by a number of which lower is sooner and 0 is normal."""
    if isinstance(value, int):
        return "low" if value > 0 else "high" if value < 0 else "normal"
    match value and value.lower():
        case None | "low" | "normal" | "high" as priority:
            return priority
    raise InvalidInput(field, f"{value!r} is unknown", "Use low, normal or high.")


def usage_of(response: RerankResponse) -> Usage:
    """Token counts of a response."""
    return {"prompt_tokens": response.tokens, "total_tokens": response.tokens}


def relevance_results(response: RerankResponse) -> list[RelevanceResult]:
    """Results with ``index`` and ``relevance_score``, and documents where they were asked for."""
    results: list[RelevanceResult] = [
        {"index": one.index, "relevance_score": one.score} for one in response.results
    ]
    if response.with_documents:
        for result, one in zip(results, response.results, strict=True):
            result["document"] = one.document
    return results
