"""Sentences on the terminal: in lines that do not cut a flag, or unfolded in a pipe."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

from echelon.messages.lines import wrapped

WIDE = 10_000
"""Columns where there is no terminal: no line is folded."""


def open_console() -> Console:
    """The terminal, or standard output with lines of any length."""
    folded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if folded else Console(width=WIDE)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is, without markup: names may hold square brackets.

    rich itself breaks a Chinese sentence anywhere, also inside of a flag, as it has no spaces.
    """
    console.print(Text("\n".join(wrapped(text, console.width)), style=style))
