"""A comparison of two profiles as one HTML page that needs no other file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.messages import in_language, tr
from echelon.profile import write_text
from echelon.reports import comparison_tables, ratio, wording
from echelon.reports.html import fill
from echelon.reports.plots import (
    COLOURS,
    SYMBOLS,
    THROUGHPUT,
    UNITS,
    Chart,
    Look,
    Pen,
    layout,
    title_of,
    upright,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from echelon.reports.profile_view import ProfileView
    from echelon.reports.wording import Entry

DASHES = ("solid", "dash")
"""Line styles of A and B, to distinguish them without colours."""


def overlays(a: ProfileView, b: ProfileView) -> list[Chart]:
    """A throughput chart by batch size and one by token budget, where there are points."""
    drawn = (_overlay(a, b, unit) for unit in UNITS)
    return [chart for chart in drawn if chart is not None]


def _overlay(a: ProfileView, b: ProfileView, unit: str) -> Chart | None:
    found = [_known(view, unit) for view in (a, b)]
    both = [entry for entries in found for entry in entries]
    if not both:
        return None
    counts = sorted({entry["pairs"] for entry in both})
    traces = [
        trace
        for index, entries in enumerate(found)
        for trace in _lines(entries, index, counts, unit)
    ]
    return Chart(
        name=f"overlay-{unit}",
        title=title_of(THROUGHPUT, unit),
        note=tr(
            "A is blue and solid, B is orange and dashed; each number of pairs has its own "
            "symbol. Sizes that were not measured are listed under All points."
        ),
        figure={
            "data": traces,
            "layout": layout(unit, both, "y") | upright(THROUGHPUT, both, []),
        },
    )


def _known(view: ProfileView, unit: str) -> list[Entry]:
    entries = (e for e in view.profile.points if e[unit] and wording.measured(e))
    return sorted(entries, key=lambda entry: (entry["pairs"], entry[unit]))


def _lines(
    entries: list[Entry], index: int, counts: list[int], unit: str
) -> Iterable[dict[str, Any]]:
    """One line for each number of pairs; the profile sets its colour, the number its symbol."""
    looks = {n: Look(COLOURS[index], SYMBOLS[i % len(SYMBOLS)]) for i, n in enumerate(counts)}
    pen = Pen(THROUGHPUT, unit, looks)
    name = "AB"[index]
    for count in counts:
        trace = pen.line([entry for entry in entries if entry["pairs"] == count])
        if trace is not None:
            trace["name"] = tr("{side}, {line}", side=name, line=trace["name"])
            trace["text"] = [f"{name}: {text}" for text in trace["text"]]
            trace["line"]["dash"] = DASHES[index]
            yield trace


PageRow = dict[str, Any]


def write_page(
    a: ProfileView,
    b: ProfileView,
    found: PageRow,
    path: str | os.PathLike[str],
    *,
    lang: str = "en",
) -> None:
    """Write the page, whole or not at all.

    Args:
        a: one profile.
        b: the other.
        found: the result of :func:`echelon.reports.compare.compare`.
        path: the HTML file.
        lang: language of the page, ``en`` or ``zh``.

    Raises:
        InvalidInput: there is no such language.
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(a, b, found, lang=lang))


def render(a: ProfileView, b: ProfileView, found: PageRow, *, lang: str = "en") -> str:
    """The page as HTML; arguments as in :func:`write_page`."""
    with in_language(lang):
        return fill("echelon.reports", "templates/compare.html.j2", _content(a, b, found))


def _content(a: ProfileView, b: ProfileView, found: PageRow) -> PageRow:
    drawn = overlays(a, b)
    return {
        "headline": ratio.headline(found),
        "sides": [_about(name, found[name]) for name in "ab"],
        "notes": ratio.notes(found),
        "first": [
            comparison_tables.keys(found),
            comparison_tables.settings(found),
            comparison_tables.best(found),
        ],
        "then": [
            comparison_tables.precisions(found),
            comparison_tables.cost(found),
            comparison_tables.memory(found),
            comparison_tables.points(found),
        ],
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
    }


def _about(name: str, side: PageRow) -> PageRow:
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
        "created": wording.when(str(side["created"])),
    }
