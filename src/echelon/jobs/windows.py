"""Where a file is cut into windows: a window is scored whole, and kept whole.

Pure. The cut depends on the rows and the token budget alone, so that a run that goes on where
another stopped forms the same steps of the same pairs, which gives the same scores to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.jobs.rows import BadRow, Row, Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.jobs.readers import Reader

STEPS = 64
"""Steps of a window. Its last step is half empty on average: less than 1 % of 64. Two windows are
all that is lost when a run is killed."""

MOST_PAIRS = 32_768
MOST_CHARACTERS = 16 * 2**20
"""Bounds of a window whatever its tokens, so that memory stays flat."""

CHARACTERS_A_TOKEN = 4
"""English text; elsewhere a window holds more steps, up to four times as many."""


def estimated_tokens(query: str, document: str, max_length: int) -> int:
    """About how many tokens a pair has, from its characters alone."""
    return min(3 + (len(query) + len(document)) // CHARACTERS_A_TOKEN, max_length)


def window_tokens(token_budget: int, batch_size: int | None, max_length: int) -> int:
    """Estimated tokens after which a window is full."""
    step = token_budget if batch_size is None else min(token_budget, batch_size * max_length)
    return STEPS * step


def windows(reader: Reader, full: int, max_length: int) -> Iterator[Window]:
    """The reader's rows in windows.

    Args:
        reader: rows from where it stands.
        full: estimated tokens after which a window ends.
        max_length: tokens a pair may have.
    """
    room = _Room(full, max_length)
    for entry in reader:
        for item in entry:
            room.add(item)
        if room.full:
            yield room.window(reader)
            room = _Room(full, max_length)
    if room.entries:
        yield room.window(reader)


class _Room:
    """A window that is being filled."""

    def __init__(self, full: int, max_length: int) -> None:
        self._limit, self._max_length = full, max_length
        self._rows: list[Row] = []
        self._bad: list[BadRow] = []
        self._tokens: list[int] = []
        self._paid = self._characters = 0

    @property
    def entries(self) -> int:
        return len(self._rows) + len(self._bad)

    @property
    def full(self) -> bool:
        return (
            self._paid >= self._limit
            or self._characters >= MOST_CHARACTERS
            or max(self.entries, len(self._tokens)) >= MOST_PAIRS
        )

    def add(self, item: Row | BadRow) -> None:
        if isinstance(item, BadRow):
            self._bad.append(item)
            return
        self._rows.append(item)
        for document in item.documents:
            tokens = estimated_tokens(item.query, document, self._max_length)
            self._tokens.append(tokens)
            self._paid += tokens
            self._characters += len(document)
        self._characters += len(item.query)

    def window(self, reader: Reader) -> Window:
        rows, bad = tuple(self._rows), tuple(self._bad)
        return Window(rows, bad, reader.mark(), tuple(self._tokens), reader.share)
