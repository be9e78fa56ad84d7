"""Text in lines of a terminal's width: a Chinese character takes two columns. Pure."""

from __future__ import annotations

import re
from unicodedata import east_asian_width

_PIECE = re.compile(r"\s*[（“]*(?:[!-\u2dff]+|\S)[，。；：、）”？！]*")  # noqa: RUF001 - Chinese marks
"""What stays on one line: a word in Latin letters or one Chinese character, with its marks."""


def wrapped(text: str, width: int, hang: int = 0) -> list[str]:
    """The lines of a text, at most ``width`` columns each; a longer word has a line of its own.

    A line may end after any Chinese character, but not inside of a word or a flag such as
    ``--time-limit``, which people copy. Spaces at the start stay; lines that go on are indented by
    ``hang`` columns.
    """
    lines = []
    for paragraph in text.split("\n"):
        lines.append(paragraph[: len(paragraph) - len(paragraph.lstrip())])
        for piece in _PIECE.findall(paragraph.lstrip()):
            if lines[-1].strip() and columns(lines[-1] + piece) > width:
                lines.append(" " * hang + piece.lstrip())
            else:
                lines[-1] += piece
    return lines


def columns(text: str) -> int:
    """The columns that a text takes on a terminal."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
