"""The report's chart of how each precision ranks against fp32. Pure."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import LEAST_TAU
from echelon.tune.card import agreement
from echelon.tune.lang import tr
from echelon.tune.plots import COLOURS, LINES, PAPER, Chart

if TYPE_CHECKING:
    from echelon.profile import Profile

ROOM = 0.01
"""Above and below what is drawn."""


def agreement_charts(profile: Profile) -> list[Chart]:
    """Kendall τ and overlap of the top ten by precision; none where nothing was compared."""
    rows = profile.precisions
    if not rows:
        return []
    names = [row["precision"] for row in rows]
    hovers = [f"{escape(str(row['precision']))}<br>{agreement(row)}" for row in rows]
    series = (
        ("tau", tr("Kendall τ"), COLOURS[0], "circle"),
        ("overlap", tr("Top-10 overlap"), COLOURS[1], "square-open"),
    )
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "meta": key,
            "x": names,
            "y": [row[key] for row in rows],
            "text": hovers,
            "hoverinfo": "text",
            "marker": {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}},
        }
        for key, name, colour, symbol in series
    ]
    needed = {
        "type": "scatter",
        "mode": "lines",
        "name": tr("needed to serve"),
        "meta": "needed",
        "x": names,
        "y": [LEAST_TAU] * len(names),
        "hoverinfo": "skip",
        "line": {"color": COLOURS[5], "dash": "dash", "width": 2},
    }
    least = min(LEAST_TAU, *(row[key] for row in rows for key in ("tau", "overlap")))
    upright = {"range": [least - ROOM, 1 + ROOM], "title": {"text": tr("Agreement with fp32")}}
    return [
        Chart(
            name="agreement",
            title=tr("Rank agreement by precision"),
            note=tr(
                "1 is the very ranking of fp32. Below the dashed line a precision may not serve."
            ),
            figure={
                "data": [needed, *traces],
                "layout": {
                    **PAPER,
                    "xaxis": {"type": "category", **LINES},
                    "yaxis": {**upright, **LINES},
                },
            },
        )
    ]
