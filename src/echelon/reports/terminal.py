"""Sentences on the terminal: in lines that do not cut a flag, or unfolded in a pipe."""

from __future__ import annotations

import os
import sys

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from echelon.messages.lines import columns, wrapped

WIDE = 10_000
"""Columns where there is no terminal: no line is folded."""


def open_console() -> Console:
    """The terminal, or standard output with lines of any length."""
    folded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if folded else Console(width=WIDE)


def say(console: Console, text: str, style: str = "", hang: int = 0) -> None:
    """Print a text as it is, without markup: names may hold square brackets.

    Lines that go on are indented by ``hang`` columns.

    rich itself breaks a Chinese sentence anywhere, also inside of a flag, as it has no spaces.
    """
    console.print(Text("\n".join(wrapped(text, console.width, hang)), style=style))


def say_row(console: Console, name: str, width: int, *parts: str) -> None:
    """Print a name in a column and, beside it, parts: each on a line of its own if not all fit.

    So a command in them stays whole as long as there is room for it.
    """
    beside = 2 + width + 1
    line = f"  {set_cell_size(name, width)} "
    apart = columns(line + " ".join(parts)) > console.width
    say(console, line + ("\n" + " " * beside if apart else " ").join(parts), hang=beside)
