"""Texts of requests: the user's or the built-in ones, cut to length and made unique.

Servers score a pair once that several requests hold, and some cache pairs or prefixes of texts. A
load test of a few hundred texts would measure that cache. So each query and each document begins
with a mark of a few tokens, different in every request and every run. Lengths are exact where the
model's tokenizer is at hand, and approximate, by words, where only a server's address is known.
"""

from __future__ import annotations

import random
import re
import secrets
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.data import Topic
    from echelon.simulation.workload import Arrival

TOKENS_PER_WORD = 1.2
"""Of the demo model's tokenizer on the built-in English texts, special tokens included. A server's
tokenizer is not known, so lengths in tokens are approximate."""

TOKENS_OF_MARKS = 12
"""Of a query's and a document's mark together, by the same tokenizer."""

_PIECES = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u9fff\uac00-\ud7af]+\s*")
"""Words with the space behind them; single characters in scripts without spaces."""

CACHED_TEXTS = 4096
"""Texts whose tokens are not counted again."""


class LengthPolicy(Protocol):
    """Cuts texts so that pairs have the wanted lengths; ``marks`` stand before the texts."""

    def query(self, text: str, length: int, marks: tuple[str, str]) -> str:
        """Cut a query so that a pair of ``length`` tokens holds a document too."""
        ...

    def cut(self, text: str, length: int, query: str, marks: tuple[str, str]) -> str:
        """Cut or repeat a document so that its pair has ``length`` tokens; never empty."""
        ...


class WordLengths:
    """Cuts by words, for a server whose tokenizer is not known."""

    def query(self, text: str, length: int, marks: tuple[str, str]) -> str:
        """The query as it is."""
        del length, marks
        return text

    def cut(self, text: str, length: int, query: str, marks: tuple[str, str]) -> str:
        """See :class:`LengthPolicy`."""
        taken = TOKENS_OF_MARKS if any(marks) else 0
        words = round((length - taken) / TOKENS_PER_WORD) - len(_PIECES.findall(query))
        return of_words(text, max(1, words))


class TokenLengths:
    """Cuts by the model's own tokens.

    ``ends`` gives where each token of a text ends, in characters; ``specials`` is the number of
    special tokens of a pair.
    """

    def __init__(self, ends: Callable[[str], Sequence[int]], specials: int) -> None:
        self._ends = lru_cache(CACHED_TEXTS)(ends)
        self._specials = specials

    def query(self, text: str, length: int, marks: tuple[str, str]) -> str:
        """The query, cut to half of the tokens of a pair."""
        limit = max(1, (length - self._spent(marks)) // 2)
        ends = self._ends(text)
        return text if len(ends) <= limit else text[: ends[limit - 1]]

    def cut(self, text: str, length: int, query: str, marks: tuple[str, str]) -> str:
        """See :class:`LengthPolicy`."""
        text = text if self._ends(text) else "word"
        ends = self._ends(text)
        whole, rest = divmod(max(1, length - self._spent((query, *marks))), len(ends))
        return (f"{text} " * whole + text[: ends[rest - 1] if rest else 0]).rstrip()

    def _spent(self, texts: Sequence[str]) -> int:
        return self._specials + sum(len(self._ends(text)) for text in texts)


class TextSource:
    """Queries with documents for any number of requests.

    Args:
        topics: texts to draw from; at least one document in all.
        marked: make the texts of each request unique.
        salt: part of this run's marks; None draws one.
        length_policy: cuts texts to length; None cuts by words.
    """

    def __init__(
        self,
        topics: Sequence[Topic],
        *,
        seed: int = 0,
        marked: bool = True,
        salt: str | None = None,
        length_policy: LengthPolicy | None = None,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - draws texts, guards nothing
        self._topics = [topic for topic in topics if topic.documents]
        self._pool = [document for topic in self._topics for document in topic.documents]
        sizes = (len(topic.documents) for topic in self._topics)
        self._starts = list(accumulate(sizes, initial=0))
        self._marked = marked
        self._salt = secrets.token_hex(2) if salt is None else salt
        self._number = 0
        self._length_policy: LengthPolicy = length_policy or WordLengths()

    def request(self, arrival: Arrival) -> tuple[str, list[str]]:
        """A query with its own documents, then those of the following topics."""
        drawn = self._random.randrange(len(self._topics))
        query, start = self._topics[drawn].query, self._starts[drawn]
        documents = [self._pool[(start + i) % len(self._pool)] for i in range(arrival.documents)]
        query_mark, marks = self._marks(arrival.documents)
        if arrival.lengths:
            query = self._length_policy.query(query, min(arrival.lengths), (query_mark, marks[-1]))
            documents = [
                self._length_policy.cut(text, length, query, (query_mark, mark))
                for text, length, mark in zip(documents, arrival.lengths, marks, strict=True)
            ]
        return query_mark + query, [m + text for m, text in zip(marks, documents, strict=True)]

    def _marks(self, documents: int) -> tuple[str, list[str]]:
        if not self._marked:
            return "", [""] * documents
        self._number += 1
        mark = f"{self._salt}{self._number:x}"
        return f"{mark} ", [f"{mark}.{i} " for i in range(documents)]


def of_words(text: str, words: int) -> str:
    """A text cut or repeated to a number of words."""
    pieces = _PIECES.findall(text) or ["word "]
    whole, rest = divmod(words, len(pieces))
    again = "".join(pieces) + ("" if pieces[-1][-1].isspace() else " ")
    return (again * whole + "".join(pieces[:rest])).rstrip()
