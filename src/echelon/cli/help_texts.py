"""The sentences of a command's help, in the language of the command line."""

from __future__ import annotations

import re
from copy import copy
from typing import TYPE_CHECKING

from echelon.messages import tr
from echelon.messages.lines import wrapped

if TYPE_CHECKING:
    import click

RAW = "\b"
"""Click keeps the lines of a paragraph that begins with this."""

COLUMN_MAX, COLUMN_GAP = 30, 2
"""Click's own: columns of the longest name beside its help, and the room after it."""

_RAW_LINE = re.compile(r"( +\d+ +|)(\S.*)")
"""A line that is translated, perhaps after a number; others are commands to copy."""


def translated_help(text: str, width: int) -> str:
    """A help in the command's language, in lines of at most ``width`` columns."""
    found = []
    for paragraph in filter(None, text.split("\n\n")):
        first, *lines = paragraph.splitlines()
        if first == RAW:
            found.append("\n".join([RAW, *map(_translated_line, lines)]))
        else:
            found.append(_wrapped(tr(_joined(paragraph)), width))
    return "\n\n".join(found)


def summary(text: str | None) -> str:
    """The first paragraph of a help, as a list of commands shows it."""
    return tr(_joined(text.split("\n\n")[0])).rstrip(".。") if text else ""


def write_list(formatter: click.HelpFormatter, rows: list[tuple[str, str]]) -> None:
    """Write names and, beside them, their help."""
    beside = min(max(len(name) for name, _ in rows), COLUMN_MAX) + COLUMN_GAP
    width = formatter.width - formatter.current_indent - beside
    formatter.write_dl([(name, _wrapped(words, width)) for name, words in rows])


def help_record(option: click.Option, context: click.Context) -> tuple[str, str] | None:
    """An option's names, and its help in the command's language."""
    shown = copy(option)
    shown.help = tr(option.help) if option.help else ""
    if option.required:  # click has no translation of this word
        shown.required = False
        shown.help += f"  [{tr('required')}]"
    return shown.get_help_record(context)


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _translated_line(line: str) -> str:
    found = _RAW_LINE.fullmatch(line)
    return line if found is None else found[1] + tr(found[2])


def _wrapped(text: str, width: int) -> str:
    """A paragraph that click does not wrap again."""
    return "\n".join([RAW, *wrapped(text, width)])
