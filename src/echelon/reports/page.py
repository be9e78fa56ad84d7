"""A comparison as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.profile import write_text
from echelon.reports import grids, say
from echelon.reports.overlay import overlays
from echelon.tune import words
from echelon.tune.lang import speaking, tr
from echelon.tune.page import fill

if TYPE_CHECKING:
    import os

    from echelon.reports.side import Side

Row = dict[str, Any]


def write_page(
    a: Side, b: Side, found: Row, path: str | os.PathLike[str], *, lang: str = "en"
) -> None:
    """Write the page whole or not at all.

    Args:
        a: one profile.
        b: the other.
        found: what :func:`echelon.reports.compare.compare` says of them.
        path: the HTML file.
        lang: language of the page, ``en`` or ``zh``.

    Raises:
        InvalidInput: there is no such language.
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(a, b, found, lang=lang))


def render(a: Side, b: Side, found: Row, *, lang: str = "en") -> str:
    """The page as HTML; arguments as in :func:`write_page`."""
    with speaking(lang):
        return fill("echelon.reports", "compare.html.j2", _content(a, b, found))


def _content(a: Side, b: Side, found: Row) -> Row:
    drawn = overlays(a, b)
    return {
        "verdict": say.verdict(found),
        "sides": [_side(name, found[name]) for name in "ab"],
        "notes": say.notes(found),
        "first": [grids.keys(found), grids.settings(found), grids.best(found)],
        "then": [
            grids.precisions(found),
            grids.cost(found),
            grids.memory(found),
            grids.points(found),
        ],
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
    }


def _side(name: str, side: Row) -> Row:
    key = side["key"]
    return {
        "name": name.upper(),
        "file": side["file"],
        "model": str(key["model"]),
        "device": tr(
            "{name} ({device}), {precision}",
            name=key["device_name"],
            device=key["device"],
            precision=key["precision"],
        ),
        "created": words.when(str(side["created"])),
    }
