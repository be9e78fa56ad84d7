"""Reads one long text window by window, as far as its tokens are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        self._open: IntArray = np.zeros(0, dtype=np.int32)  # tokens behind the last boundary
        self._next: tuple[int, int] | None = None  # the window, if it ends at boundaries
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

    def windows(self) -> list[str]:
        """The characters to tokenize next: a window, or parts of one that agree at their begin.

        Raises:
            TooLarge: the text has no boundary that is near enough.
        """
        begin: int | None = self._begin
        end: int | None = self._end
        if self._left:
            begin = self._boundaries.begin(self._text, self._end)
        else:
            end = self._boundaries.end(self._text, self._begin)
        self._next = None if begin is None or end is None else (begin, end)
        if self._next is not None:
            return [self._text[begin:end]]
        ends = None if self._left else next(self._reach, None)
        if ends is None:
            raise self._indivisible()
        return [self._text[self._begin : end] for end in ends]

    def add(self, found: Sequence[IntArray]) -> None:
        """Take the tokens of each of the windows."""
        if self._next is None:
            self._open = _common(found)
            return
        self._parts += found
        begin, end = self._next
        self._begin, self._end = (self._begin, begin) if self._left else (end, self._end)

    def _indivisible(self) -> TooLarge:
        place = f"before character {self._end}" if self._left else f"after character {self._begin}"
        return TooLarge(
            self._name,
            f"the {self._boundaries.longest_run} characters {place} have no place at which the "
            "tokenizer could divide them",
            "Put spaces or line breaks between words, or cut the text.",
        )

    def _reaches(self) -> Iterator[range]:
        """Ends of windows that have final tokens, though they end at no boundary; near, then far.

        Each is read as often as the longest piece has characters, so they are shorter than others.
        """
        window = self._boundaries.window
        for least in (window // 4, window):
            ends = self._boundaries.final(self._text, self._begin, self._begin + least)
            if ends is not None:
                yield ends


def _common(found: Sequence[IntArray]) -> IntArray:
    """The first tokens, as far as all have the same."""
    shortest = min(map(len, found))
    same = np.all([tokens[:shortest] == found[0][:shortest] for tokens in found], axis=0)
    return found[0][: shortest if same.all() else int(same.argmin())]
