"""What requests are made of: the user's texts or the built-in ones, cut to length and told apart.

Servers score a pair once that several requests ask for, and some remember pairs or the beginnings
of texts. A load test of a few hundred texts would then measure that memory. So each query begins
with a mark of its own, and so does each document: a few tokens, different in every request and
every run. Pure, but for the run's salt.
"""

from __future__ import annotations

import random
import re
import secrets
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.plan.workload import Arrival
    from echelon.tune.texts import Topic

TOKENS_PER_WORD = 1.2
"""Of the demo model's tokenizer on the built-in texts in English, pairs' special tokens included;
no server tells its tokenizer, so lengths asked for in tokens are met about so."""

TOKENS_OF_MARKS = 12
"""Of a query's mark and a document's, by the same tokenizer; taken off a pair's length."""

_PIECES = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u9fff\uac00-\ud7af]+\s*")
"""Words with the space behind them; where words are not set apart, letters."""


class Material:
    """Queries with documents, for as many requests as are asked for.

    Args:
        topics: texts to draw from; at least one document in all.
        seed: which query comes when.
        marked: tell requests apart; else texts are sent as they are.
        salt: tells this run's marks from another's; None takes a new one.
    """

    def __init__(
        self,
        topics: Sequence[Topic],
        *,
        seed: int = 0,
        marked: bool = True,
        salt: str | None = None,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - draws texts, guards nothing
        self._topics = [topic for topic in topics if topic.documents]
        self._pool = [document for topic in self._topics for document in topic.documents]
        sizes = (len(topic.documents) for topic in self._topics)
        self._starts = list(accumulate(sizes, initial=0))
        self._marked = marked
        self._salt = secrets.token_hex(2) if salt is None else salt
        self._number = 0

    def request(self, arrival: Arrival) -> tuple[str, list[str]]:
        """A query and its documents: its own, then those of the topics that follow."""
        drawn = self._random.randrange(len(self._topics))
        query, start = self._topics[drawn].query, self._starts[drawn]
        documents = [self._pool[(start + i) % len(self._pool)] for i in range(arrival.documents)]
        if arrival.lengths:
            spent = len(_PIECES.findall(query))
            marks = TOKENS_OF_MARKS if self._marked else 0
            words = [round((n - marks) / TOKENS_PER_WORD) - spent for n in arrival.lengths]
            documents = [of_words(t, max(1, n)) for t, n in zip(documents, words, strict=True)]
        if not self._marked:
            return query, documents
        self._number += 1
        mark = f"{self._salt}{self._number:x}"
        return f"{mark} {query}", [f"{mark}.{i} {text}" for i, text in enumerate(documents)]


def of_words(text: str, words: int) -> str:
    """A text of so many words: its first ones, or itself several times."""
    pieces = _PIECES.findall(text) or ["word "]
    whole, rest = divmod(words, len(pieces))
    again = "".join(pieces) if pieces[-1][-1].isspace() else "".join(pieces) + " "
    return (again * whole + "".join(pieces[:rest])).rstrip()
