"""Reads one long text window by window, as far as its tokens are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.tokenization.boundaries import Boundaries
    from echelon.types import IntArray, Side


class Reading:
    """The tokens of one text, as far as they are known.

    Args:
        name: of the text, for errors.
        text: the text.
        enough: tokens to read; None reads all.
        side: side from which tokens are removed; with ``left`` the last tokens are read.
        boundaries: where the text can be divided.
    """

    def __init__(
        self, name: str, text: str, enough: int | None, side: Side, boundaries: Boundaries
    ) -> None:
        self._name, self._text, self._enough = name, text, enough
        self._boundaries = boundaries
        self._left = side == "left"
        self._begin, self._end = 0, len(text)  # what is not read yet
        self._parts: list[IntArray] = []
        self._open: IntArray = np.zeros(0, dtype=np.int32)  # tokens that end at no boundary
        self._window = (0, 0)
        self._final = False  # whether the window ends at no boundary
        self._reach = self._reaches()

    @property
    def done(self) -> bool:
        """Whether enough tokens are known."""
        known = sum(map(len, self._parts)) + len(self._open)
        return self._begin == self._end or (self._enough is not None and known >= self._enough)

    @property
    def ids(self) -> IntArray:
        """int32 tokens that are known: the first of the text, or with ``left`` the last."""
        parts = [*self._parts, self._open]
        return np.concatenate(parts[::-1] if self._left else parts)

    def window(self) -> str:
        """The characters to tokenize next; their tokens go to :meth:`add`.

        Raises:
            TooLarge: the text has no boundary that is near enough.
        """
        begin: int | None = self._begin
        end: int | None = self._end
        if self._left:
            begin = self._boundaries.begin(self._text, self._end)
        else:
            end = self._boundaries.end(self._text, self._begin)
            self._final = end is None
            end = next(self._reach, None) if end is None else end
        if begin is None or end is None:
            raise self._indivisible()
        self._window = begin, end
        return self._text[begin:end]

    def add(self, ids: IntArray) -> None:
        """Take the tokens of the window."""
        begin, end = self._window
        if self._final:
            self._open = ids
        elif self._left:
            self._parts.append(ids)
            self._end = begin
        else:
            self._parts.append(ids)
            self._begin = end

    def _indivisible(self) -> TooLarge:
        place = f"before character {self._end}" if self._left else f"after character {self._begin}"
        return TooLarge(
            self._name,
            f"the {self._boundaries.longest_run} characters {place} have no place at which the "
            "tokenizer could divide them",
            "Put spaces or line breaks between words, or cut the text.",
        )

    def _reaches(self) -> Iterator[int]:
        """Ends of windows at which tokens are final though they are no boundaries, near and far."""
        bounds = self._boundaries
        for reach in (bounds.window, bounds.longest_run - bounds.window):
            place = self._boundaries.final(self._text, self._begin, self._begin + reach)
            if place is not None:
                yield place
