"""A recommendation for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.tune.card import card

if TYPE_CHECKING:
    from echelon.profile import Profile

STYLES = {"held": "green", "missed": "bold red", "unproved": "yellow"}


def print_scenario(profile: Profile) -> None:
    """The settings, predicted beside measured, and what to know."""
    shown = card(profile)
    if shown is None:
        return
    console = Console()
    console.print(Text(f"\n{shown['title']}: {shown['asked']}", style="bold"))
    for label, value in (*shown["settings"], ("Accuracy", shown["accuracy"])):
        console.print(Text(f"  {label:13} {value}"))
    table = Table(header_style="bold")
    table.add_column("")
    for column in ("Predicted", "Measured", "Off"):
        table.add_column(column, justify="right")
    for row in shown["rows"]:
        table.add_row(*row)
    console.print(table)
    console.print(Text(shown["verdict"], style=STYLES[shown["state"]]))
    for note in shown["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))
