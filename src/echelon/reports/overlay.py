"""Throughput of both profiles in one chart, as data for plotly. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.tune import words
from echelon.tune.lang import tr
from echelon.tune.plots import (
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
    from collections.abc import Iterable

    from echelon.reports.side import Side
    from echelon.tune.words import Entry

DASHES = ("solid", "dash")
"""The lines of A and of B, so that they are told apart without colours too."""


def overlays(a: Side, b: Side) -> list[Chart]:
    """A chart for each way to bound a step that either side has points for."""
    drawn = (_overlay(a, b, unit) for unit in UNITS)
    return [chart for chart in drawn if chart is not None]


def _overlay(a: Side, b: Side, unit: str) -> Chart | None:
    found = [_known(side, unit) for side in (a, b)]
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
            "A in blue and solid, B in orange and dashed; another sign is another number of "
            "pairs. Sizes without a number are in the table of all points."
        ),
        figure={
            "data": traces,
            "layout": layout(unit, both, "y") | upright(THROUGHPUT, both, []),
        },
    )


def _known(side: Side, unit: str) -> list[Entry]:
    entries = (e for e in side.profile.points if e[unit] and words.measured(e))
    return sorted(entries, key=lambda entry: (entry["pairs"], entry[unit]))


def _lines(
    entries: list[Entry], index: int, counts: list[int], unit: str
) -> Iterable[dict[str, Any]]:
    """One line for each number of pairs; the side gives the colour, the number the sign."""
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
