"""A comparison for people at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.reports import grids

if TYPE_CHECKING:
    from echelon.reports.grids import Grid

SHOWN = (grids.keys, grids.settings, grids.best, grids.precisions, grids.cost, grids.memory)
"""All but every single point: those are on the page and in the JSON."""


def print_comparison(found: dict[str, Any]) -> None:
    """The verdict, then the tables."""
    console = Console()
    for name in "ab":
        side = found[name]
        about = f"{name.upper()}: {side['file']}: {side['key']['model']} on "
        console.print(Text(f"{about}{side['key']['device_name']}"))
    console.print(Text(f"\n{found['verdict']}\n", style="bold"))
    for make in SHOWN:
        grid = make(found)
        if grid.rows:
            console.print(_table(grid))
    for note in found["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))


def _table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", header_style="bold")
    for column in grid.columns:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(grid.rows):
        mark = "≠ " if index in grid.marked else ""
        # Text, not markup: a file's or model's name may hold square brackets.
        cells = [Text(mark + row[0]), *map(Text, row[1:])]
        table.add_row(*cells, style="cyan" if mark else None)
    return table
