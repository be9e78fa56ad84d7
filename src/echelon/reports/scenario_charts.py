"""The report's charts of latency over load and of rank agreement by precision, as data."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import MIN_TAU
from echelon.messages import tr, units
from echelon.reports.plots import (
    COLOURS,
    Chart,
    Trace,
    log_ticks,
    panel,
    straight,
    time_tick,
    trace,
)
from echelon.reports.summary import agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile

PERCENTILES = {
    "p50_s": ("P50", COLOURS[0]),
    "p95_s": ("P95", COLOURS[2]),
    "p99_s": ("P99", COLOURS[1]),
}
"""Name and colour of each line."""

MARGIN = 0.01
"""Space above and below the lowest and the highest agreement."""


def curve_chart(profile: Profile) -> Chart | None:
    """Predicted latency at rising rates; None where the profile has none."""
    found = profile.scenario
    curve = None if found is None else found.get("curve")
    if found is None or curve is None:
        return None
    goal_s, points = found["asked"]["slo_p99_s"], curve["points"]
    known = [point[name] for point in points for name in PERCENTILES if point[name]]
    low, high = min([goal_s, *known]), max([goal_s, *known])
    ends = [0.0, max(curve["rate"], *(point["rate"] for point in points))]
    rates = [curve["rate"]] * 2
    traces = [
        *(_line(points, name) for name in PERCENTILES),
        straight(tr("goal"), "goal", ends, [goal_s, goal_s], "dash", COLOURS[5]),
        straight(tr("requested rate"), "rate", rates, [low, high], "dot", COLOURS[5]),
    ]
    if found["measured"] is not None:
        traces.append(_measured(curve["rate"], found["measured"]))
    across = {"title": {"text": tr("Requests/s")}, "rangemode": "tozero"}
    upright = {**log_ticks(low, high, time_tick), "title": {"text": tr("Latency")}}
    figure = panel(traces, across, upright)
    return Chart("load-curve", tr("Latency over load"), _note(curve, goal_s), figure)


def _note(curve: dict[str, Any], goal_s: float) -> str:
    goal = units.duration(goal_s)
    if curve["most_rate"] is None:
        highest = tr("No rate keeps P99 within {goal}.", goal=goal)
    else:
        highest = tr(
            "Up to {rate} requests/s, P99 stays within {goal} and no request is refused.",
            rate=units.number(curve["most_rate"]),
            goal=goal,
        )
    return f"{tr('Lines are predictions; diamonds were measured during validation.')} {highest}"


def _line(points: Sequence[dict[str, Any]], name: str) -> Trace:
    label, colour = PERCENTILES[name]
    rates, seconds = [point["rate"] for point in points], [point[name] for point in points]
    return trace("lines+markers", label, name, rates, seconds) | {
        "text": [_hover(point, label, name) if point[name] else "" for point in points],
        "hoverinfo": "text",
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 4},
    }


def _hover(point: dict[str, Any], label: str, name: str) -> str:
    return tr(
        "{rate} requests/s:<br>{label} {latency}, {goodput} within the goal,<br>{refused} refused",
        rate=units.number(point["rate"]),
        label=label,
        latency=units.duration(point[name]),
        goodput=units.number(point["goodput"]),
        refused=units.percent(point["refused"], 1),
    )


def _measured(rate: float, measured: dict[str, Any]) -> Trace:
    known = {PERCENTILES[n]: measured[n] for n in PERCENTILES if measured[n] is not None}
    texts = [
        tr("measured: {label} {latency}", label=label, latency=units.duration(seconds))
        for (label, _), seconds in known.items()
    ]
    colours = [colour for _, colour in known]
    found = trace("markers", tr("measured"), "measured", [rate] * len(known), list(known.values()))
    marker = {"color": colours, "symbol": "diamond", "size": 11}
    return found | {"text": texts, "hoverinfo": "text", "marker": marker}


def agreement_charts(profile: Profile) -> list[Chart]:
    """Kendall τ and overlap of the top ten by precision; none where nothing was compared."""
    rows = profile.precisions
    if not rows:
        return []
    names = [row["precision"] for row in rows]
    texts = [f"{escape(str(row['precision']))}<br>{agreement(row)}" for row in rows]
    needed = straight(
        tr("required to pass"), "needed", names, [MIN_TAU] * len(names), "dash", COLOURS[5]
    )
    traces = [needed]
    for key, name, colour, symbol in (
        ("tau", tr("Kendall τ"), COLOURS[0], "circle"),
        ("overlap", tr("Top-10 overlap"), COLOURS[1], "square-open"),
    ):
        marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}}
        found = trace("markers", name, key, names, [row[key] for row in rows])
        traces.append(found | {"text": texts, "hoverinfo": "text", "marker": marker})
    low = min(MIN_TAU, *(row[key] for row in rows for key in ("tau", "overlap")))
    upright = {"range": [low - MARGIN, 1 + MARGIN], "title": {"text": tr("Agreement with fp32")}}
    note = tr("1 means the same ranking as fp32. A precision below the dashed line is not used.")
    figure = panel(traces, {"type": "category"}, upright)
    return [Chart("agreement", tr("Rank agreement by precision"), note, figure)]
