"""A load test as one HTML page that needs no network, with charts for plotly.js."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.loadtest.result import (
    KIND_NAMES,
    LoadTestResult,
    headline,
    over_time,
    probe_row,
    problem_rows,
    shown_percentile,
)
from echelon.loadtest.summary import DriveResult, LoadSummary, latencies, percentiles
from echelon.messages import N_, tr, translated, units
from echelon.profile import write_text
from echelon.reports import fill, wording
from echelon.reports.plots import COLOURS, LINES, PAPER, SHADE, Chart

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from echelon.loadtest.run import RateProbe
    from echelon.loadtest.summary import Column

    Trace = dict[str, Any]

BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]

STEPS_A_DECADE = 10
"""Points of the spectrum between 90 % and 99 %, 99 % and 99.9 %, and so on."""

LATENCY_AXIS = {"rangemode": "tozero", "tickformat": "~s", "ticksuffix": "s", **LINES}


def charts(result: LoadTestResult) -> list[Chart]:
    """The charts for which there are numbers."""
    goal_s = None if result.plan.goal is None else result.plan.goal.latency_s
    drawn = []
    if result.found is not None and result.found.probes:
        drawn.append(_load(result.found.probes, goal_s))
    if result.run is not None and result.run.summary.latency_s:
        outcome = result.run.outcome
        drawn += [_spectrum(latencies(outcome), goal_s), _over_time(outcome, goal_s)]
    return drawn


def _load(probes: Sequence[RateProbe], goal_s: float | None) -> Chart:
    """Latency against load."""
    ordered = sorted(probes, key=lambda probe: probe.rate)
    rates = [probe.rate for probe in ordered]
    traces = [
        _line(name, rates, [p.run.summary.latency_s.get(q) for p in ordered], colour)
        for name, q, colour in (("P99", 99.0, ORANGE), ("P50", 50.0, BLUE))
    ]
    for trace in traces:
        trace["marker"] = {"size": 9, "symbol": ["circle" if p.held else "x" for p in ordered]}
        trace["text"] = [_hover_text(probe) for probe in ordered]
        trace["hoverinfo"] = "text"
    across = {"title": {"text": tr("Requests/s")}, "rangemode": "tozero", **LINES}
    layout = _layout(across, goal_s)
    note = tr("A cross marks a rate that did not hold. The dashed line is the goal.")
    return Chart("load", tr("Latency over load"), note, {"data": traces, "layout": layout})


def _hover_text(probe: RateProbe) -> str:
    summary = probe.run.summary
    p99_s = summary.p99_s
    p99 = tr("nothing answered") if p99_s is None else f"P99 {1000 * p99_s:.0f} ms"
    failed = tr("{share} failed", share=units.percent(summary.failure_share, 2))
    return f"{probe.rate:.3g}/s: {p99}<br>{failed}"


def _spectrum(latency_s: Column, goal_s: float | None) -> Chart:
    """Latency by percentile, on an axis that stretches the highest ones."""
    answered = len(latency_s)
    decades = max(1.0, math.log10(answered))
    shares = [10 ** (-i / STEPS_A_DECADE) for i in range(int(decades * STEPS_A_DECADE) + 1)]
    found = percentiles(latency_s, tuple(100 * (1 - share) for share in shares))
    # Across goes one over the share that is slower: 90 % is 10, 99 % is 100.
    trace = _line(tr("Latency"), [1 / share for share in shares], list(found.values()), BLUE)
    trace["mode"] = "lines"
    trace["text"] = [f"P{p:.4g}: {1000 * s:.1f} ms" for p, s in found.items()]
    trace["hoverinfo"] = "text"
    whole = range(int(decades) + 1)
    across = {
        "type": "log",
        "title": {"text": tr("Percentile")},
        "range": [0, 1.04 * decades],  # its end would take the place of the last label
        "tickvals": [10**n for n in whole],
        "ticktext": [
            "0 %" if n == 0 else f"{100 * (1 - 10**-n):.{max(0, n - 2)}f} %" for n in whole
        ],
        **LINES,
    }
    layout = _layout(across, goal_s) | {"showlegend": False}
    note = tr("Of {answered} answered requests, from when each was due.", answered=f"{answered:,}")
    return Chart("spectrum", tr("Latency by percentile"), note, {"data": [trace], "layout": layout})


def _over_time(outcome: DriveResult, goal_s: float | None) -> Chart:
    """Latency and failures over time."""
    rows = over_time(outcome)
    times = [row["at_s"] + row["width_s"] / 2 for row in rows]
    traces = []
    for name, key, colour in (("P99", "p99_ms", ORANGE), ("P50", "p50_ms", BLUE)):
        values = [None if row[key] is None else row[key] / 1000 for row in rows]
        traces.append(_line(name, times, values, colour))
    across = {"title": {"text": tr("Seconds since the start")}, "rangemode": "tozero", **LINES}
    layout = _layout(across, goal_s)
    if any(row["failed"] for row in rows):
        failed = _line(tr("Failed"), times, [row["failed"] for row in rows], PURPLE)
        traces.append(failed | {"type": "bar", "yaxis": "y2", "marker": {"color": PURPLE}})
        layout["xaxis"]["anchor"] = "y2"
        layout["yaxis"]["domain"] = [0.34, 1]
        axis = {"title": {"text": tr("Failed")}, "domain": [0, 0.22], "rangemode": "tozero"}
        layout["yaxis2"] = axis | LINES
    shade = {"type": "rect", "xref": "x", "x0": 0, "x1": outcome.warmup_s}
    shade |= {"yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
    layout["shapes"].append(shade | {"fillcolor": SHADE})
    note = tr("By when requests were due. The shaded warm-up does not count.")
    return Chart("time", tr("Latency over time"), note, {"data": traces, "layout": layout})


def _line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str) -> Trace:
    line, marker = {"color": colour, "width": 2}, {"size": 5}
    shown = {"type": "scatter", "mode": "lines+markers", "name": name, "line": line}
    return {**shown, "marker": marker, "x": list(x), "y": list(y)}


def _layout(across: dict[str, Any], goal_s: float | None) -> dict[str, Any]:
    shapes = []
    if goal_s is not None:
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": goal_s, "y1": goal_s}
        shapes.append(line | {"line": {"color": GREEN, "width": 2, "dash": "dash"}})
    margin = PAPER["margin"] | {"l": 60}
    upright = LATENCY_AXIS | {"title": {"text": tr("Latency")}}
    return {**PAPER, "margin": margin, "xaxis": across, "yaxis": upright, "shapes": shapes}


def write_page(result: LoadTestResult, path: str | os.PathLike[str]) -> None:
    """Write the page whole or not at all.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(result))


def render(result: LoadTestResult) -> str:
    """The page as HTML."""
    drawn, found = charts(result), result.found
    summary = None if result.run is None else result.run.summary
    probes = () if found is None else sorted(found.probes, key=lambda probe: probe.rate)
    content = {
        "url": result.plan.target.url,
        "headline": headline(result),
        "doubts": [translated(doubt) for doubt in result.doubts],
        "notes": [translated(note) for note in result.notes],
        "tiles": [] if summary is None else _tiles(summary),
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
        "probes": [(probe.held, probe_row(probe)) for probe in probes],
        "latencies": [] if summary is None else _latencies(summary),
        "counts": [] if summary is None else _counts(summary),
        "problems": [] if summary is None else problem_rows(summary),
        "settings": _settings_rows(result),
    }
    return fill("echelon.loadtest", "page.html.j2", content)


def _tiles(summary: LoadSummary) -> list[tuple[str, str, str]]:
    """Label, value and note of each tile."""
    p99 = units.UNKNOWN if summary.p99_s is None else units.duration(summary.p99_s)
    goal = ""
    if summary.goal is not None:
        goal = tr("goal {time}", time=units.duration(summary.goal.latency_s))
    offered = tr("{rate}/s offered", rate=units.number(summary.offered_per_s))
    count, requests = f"{summary.failures:,}", f"{summary.requests:,}"
    failed = tr("{count} of {requests}", count=count, requests=requests)
    tiles = [
        ("P99", p99, goal),
        (tr("Answered"), f"{units.number(summary.answered_per_s)}/s", offered),
        (tr("Documents"), f"{units.number(summary.documents_per_s)}/s", ""),
        (tr("Failed"), units.percent(summary.failure_share, 2), failed),
    ]
    if summary.goodput_per_s is not None:
        good = f"{units.number(summary.goodput_per_s)}/s"
        tiles.insert(2, (tr("Goodput"), good, tr("answered within the goal")))
    return tiles


def _latencies(summary: LoadSummary) -> list[tuple[str, str]]:
    return [(shown_percentile(p), units.duration(s)) for p, s in summary.latency_s.items()]


def _counts(summary: LoadSummary) -> list[tuple[str, str]]:
    return [(tr(KIND_NAMES[kind]), f"{count:,}") for kind, count in summary.kinds.items()]


SETTING_NAMES = {
    "arrivals": N_("Arrivals"),
    "rate": N_("Requests/s"),
    "clients": N_("Clients"),
    "documents": N_("Documents"),
    "tokens": N_("Tokens per pair"),
    "data": N_("Texts"),
    "marked": N_("Unique texts"),
    "seed": N_("Seed"),
    "warmup_s": N_("Warm-up (s)"),
    "duration_s": N_("Duration (s)"),
    "timeout_ms": N_("Timeout (ms)"),
    "max_connections": N_("Maximum connections"),
    "model": N_("Model"),
}

SETTING_VALUES = {
    "open": N_("open loop"),
    "closed": N_("closed loop"),
    "True": N_("yes"),
    "False": N_("no"),
}
"""Values in words; the others are shown as they are given."""


def _settings_rows(result: LoadTestResult) -> list[tuple[str, str]]:
    content = result.as_dict()
    rows = [(tr("Dialect"), content["dialect"]), (tr("Mode"), _value(content["mode"]))]
    rows.append((tr("Created"), wording.when(content["created"])))
    given = {name: value for name, value in content["settings"].items() if value is not None}
    rows += [(tr(SETTING_NAMES[name]), _value(value)) for name, value in given.items()]
    if result.run is not None:
        summary = result.run.summary
        rows.append((tr("Sent late (P99)"), units.duration(summary.send_lag_s)))
        rows.append((tr("Generator's CPU"), units.percent(summary.health.cpu_share)))
    return rows


def _value(value: object) -> str:
    words = SETTING_VALUES.get(str(value))
    return translated(value) if words is None else tr(words)
