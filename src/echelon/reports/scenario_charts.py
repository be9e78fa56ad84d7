"""The report's chart of latency over load, with the goal and what the proof measured. Pure.

The report's chart of how each precision ranks against fp32. Pure.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import MIN_TAU
from echelon.messages import tr, units
from echelon.reports.plots import COLOURS, LINES, PAPER, Chart, log_ticks, time_tick
from echelon.reports.summary import agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile

PERCENTILES = {"p50_s": ("P50", 0), "p95_s": ("P95", 2), "p99_s": ("P99", 1)}
"""Name and colour of each line."""


def curve_chart(profile: Profile) -> Chart | None:
    """Predicted latency at rising rates; None where the profile has none."""
    found = profile.scenario
    curve = None if found is None else found.get("curve")
    if found is None or curve is None:
        return None
    goal_s, points = found["asked"]["slo_p99_s"], curve["points"]
    ends = [0.0, max(curve["rate"], *(point["rate"] for point in points))]
    traces = [_line(points, name) for name in PERCENTILES]
    traces.append(_straight(tr("goal"), "goal", ends, [goal_s, goal_s], "dash"))
    height = _height(points, goal_s)
    traces.append(_straight(tr("requested rate"), "rate", [curve["rate"]] * 2, height, "dot"))
    if found["measured"] is not None:
        traces.append(_measured(curve["rate"], found["measured"]))
    return Chart(
        "load-curve", tr("Latency over load"), _note(curve, goal_s), _figure(traces, *height)
    )


def _note(curve: dict[str, Any], goal_s: float) -> str:
    goal = units.duration(goal_s)
    if curve["most_rate"] is None:
        most = tr("No rate keeps P99 within {goal}.", goal=goal)
    else:
        rate = units.number(curve["most_rate"])
        most = tr(
            "Up to {rate} requests/s, P99 stays within {goal} and no request is refused.",
            rate=rate,
            goal=goal,
        )
    return f"{tr('Lines are predictions; diamonds were measured during validation.')} {most}"


def _height(points: Sequence[dict[str, Any]], goal_s: float) -> list[float]:
    known = [point[name] for point in points for name in PERCENTILES if point[name]]
    return [min([goal_s, *known]), max([goal_s, *known])]


def _line(points: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    label, colour = PERCENTILES[name]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "meta": name,
        "x": [point["rate"] for point in points],
        "y": [point[name] for point in points],
        "text": [_hover(point, label, name) if point[name] else "" for point in points],
        "hoverinfo": "text",
        "line": {"color": COLOURS[colour], "width": 2},
        "marker": {"color": COLOURS[colour], "size": 4},
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


def _straight(name: str, meta: str, x: list[float], y: list[float], dash: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "meta": meta,
        "x": x,
        "y": y,
        "hoverinfo": "skip",
        "line": {"color": COLOURS[5], "dash": dash, "width": 1.5},
    }


def _measured(rate: float, measured: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in PERCENTILES if measured[name] is not None]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": tr("measured"),
        "meta": "measured",
        "x": [rate] * len(known),
        "y": [measured[name] for name in known],
        "text": [
            tr(
                "measured: {label} {latency}",
                label=PERCENTILES[name][0],
                latency=units.duration(measured[name]),
            )
            for name in known
        ],
        "hoverinfo": "text",
        "marker": {
            "color": [COLOURS[PERCENTILES[name][1]] for name in known],
            "symbol": "diamond",
            "size": 11,
        },
    }


def _figure(traces: list[dict[str, Any]], lowest: float, highest: float) -> dict[str, Any]:
    latency = log_ticks(lowest, highest, time_tick)
    return {
        "data": traces,
        "layout": {
            **PAPER,
            "xaxis": {"title": {"text": tr("Requests/s")}, "rangemode": "tozero", **LINES},
            "yaxis": {**latency, "title": {"text": tr("Latency")}, **LINES},
        },
    }


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
        "name": tr("required to pass"),
        "meta": "needed",
        "x": names,
        "y": [MIN_TAU] * len(names),
        "hoverinfo": "skip",
        "line": {"color": COLOURS[5], "dash": "dash", "width": 2},
    }
    least = min(MIN_TAU, *(row[key] for row in rows for key in ("tau", "overlap")))
    upright = {"range": [least - ROOM, 1 + ROOM], "title": {"text": tr("Agreement with fp32")}}
    return [
        Chart(
            name="agreement",
            title=tr("Rank agreement by precision"),
            note=tr(
                "1 means the same ranking as fp32. A precision below the dashed line is not used."
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
