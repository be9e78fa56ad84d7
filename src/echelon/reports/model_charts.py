"""The report's charts of predictions beside measurements, and of rank agreement, as data."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from echelon.engine.agreement import MIN_TAU
from echelon.messages import N_, listed, tr, translated, units
from echelon.reports import wording
from echelon.reports.plots import (
    COLOURS,
    WIDE,
    Chart,
    Trace,
    log_ticks,
    panel,
    straight,
    time_tick,
    trace,
)
from echelon.scheduling.cost_model import Work
from echelon.scheduling.fit import CostFit, MemoryFit
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.profile import Profile

Shape = dict[str, Any]
"""A probe as the profile's cost model holds it, see :class:`echelon.scheduling.fit.CostFit`."""

UNSEEN = {
    False: (N_("used for the fit"), COLOURS[0], "circle"),
    True: (N_("used to check the fit"), COLOURS[1], "square"),
}
"""Name, colour and symbol of the shapes that were fitted, and of those that check the fit."""

LINE_POINTS = 24
"""Points of the model's line, evenly spaced in the logarithm of tokens."""

TYPICAL_TOKENS = 128
"""Tokens per pair where the profile does not hold the lengths of its texts."""

PERCENTILES = {
    "p50_s": ("P50", COLOURS[0]),
    "p95_s": ("P95", COLOURS[2]),
    "p99_s": ("P99", COLOURS[1]),
}
"""Name and colour of each line."""

MARGIN = 0.01
"""Space above and below the lowest and the highest agreement."""


def model_charts(profile: Profile) -> list[Chart]:
    """Predicted step time and memory against the measured ones; none without a model."""
    if profile.cost is None:
        return []
    fit = CostFit.from_dict(profile.cost)
    if not fit.shapes:
        return []
    found = [_time_chart(fit)]
    shapes = [shape for shape in fit.shapes if shape["peak_bytes"]]
    if profile.memory is not None and shapes:
        found.append(_memory_chart(MemoryFit.from_dict(profile.memory), shapes))
    return found


def _time_chart(fit: CostFit) -> Chart:
    note = tr(
        "Each point is one step shape; points on the line are predicted exactly. Error: "
        "{error}. Repeated measurements differ by {spread}.",
        error=translated(fit.error.words),
        spread=units.percent(fit.spread, 1),
    )
    rows = [(shape, shape["seconds"], shape["predicted_s"]) for shape in fit.shapes]
    axis = {"type": "log", "dtick": 1, "tickformat": "~s", "ticksuffix": "s"}
    title = tr("Step time, predicted and measured")
    return Chart("predicted-time", title, note, _figure(rows, axis, units.duration))


def _memory_chart(fit: MemoryFit, shapes: Sequence[Shape]) -> Chart:
    rows = []
    for shape in shapes:
        predicted = fit.model.peak_bytes(Work(1, shape["tokens"], shape["squares"]))
        rows.append((shape, shape["peak_bytes"] / units.GIB, predicted / units.GIB))
    note = tr("In GiB, including the model. Error: {error}.", error=translated(fit.error.words))
    title = tr("Peak memory, predicted and measured")
    figure = _figure(rows, {}, lambda gib: units.size(round(gib * units.GIB)))
    return Chart("predicted-memory", title, note, figure)


def _figure(
    rows: Sequence[tuple[Shape, float, float]], axis: dict[str, Any], text: Callable[[float], str]
) -> dict[str, Any]:
    """A point for each shape, measured and predicted value, and the line where both are equal."""
    values = [value for row in rows for value in row[1:]]
    ends = [min(values), max(values)]
    line = straight(tr("predicted = measured"), "diagonal", ends, ends, "dot", COLOURS[5])
    groups = [_points([r for r in rows if r[0]["unseen"] == u], *UNSEEN[u], text) for u in UNSEEN]
    across = {**axis, "title": {"text": tr("Measured")}}
    upright = {**axis, "title": {"text": tr("Predicted")}}
    return panel([line, *(group for group in groups if group["x"])], across, upright)


def _points(
    rows: Sequence[tuple[Shape, float, float]],
    name: str,
    colour: str,
    symbol: str,
    text: Callable[[float], str],
) -> Trace:
    texts = [
        tr(
            "{shape}:<br>{predicted} predicted, {measured} measured",
            shape=_shape(shape),
            predicted=text(predicted),
            measured=text(measured),
        )
        for shape, measured, predicted in rows
    ]
    x, y = [row[1] for row in rows], [row[2] for row in rows]
    marker = {"color": colour, "symbol": symbol, "size": 8}
    return trace("markers", tr(name), "predicted", x, y, text=texts, marker=marker)


def _shape(shape: Shape) -> str:
    return listed([wording.pairs(shape["pairs"]), wording.tokens(shape["tokens"])])


# Memory by tokens per step.


def limit_of(profile: Profile) -> tuple[float, str] | None:
    """Bytes that a step may need, and what sets this limit; None where it is not known."""
    asked = (profile.scenario or {}).get("asked", {}).get("memory_limit_bytes")
    if asked is not None:
        return float(asked), tr("requested limit")
    kind, _, index = profile.key.device.partition(":")
    if kind == "cpu":
        found, source = profile.machine.get("memory_bytes"), tr("memory of the machine")
    else:
        gpus = profile.machine.get("gpus") or []
        place = int(index or 0)
        found = gpus[place].get("memory_bytes") if place < len(gpus) else None
        source = tr("memory of the GPU")
    return (float(found), source) if found else None


def memory_charts(profile: Profile) -> list[Chart]:
    """Measured peaks, the model's line and the limit; none without a memory model."""
    if profile.cost is None or profile.memory is None:
        return []
    shapes = [s for s in CostFit.from_dict(profile.cost).shapes if s["peak_bytes"] and s["tokens"]]
    if not shapes:
        return []
    fit = MemoryFit.from_dict(profile.memory)
    length = round((profile.data.get("tokens") or {}).get("mean", TYPICAL_TOKENS)) or 1
    sizes = sorted(shape["tokens"] for shape in shapes)
    low, high = sizes[0], sizes[-1]
    traces = [_line(fit, low, high, length), _peaks(shapes)]
    limit = limit_of(profile)
    if limit is not None:
        ends = [limit[0] / units.GIB] * 2
        traces.append(straight(limit[1], "limit", [low, high], ends, "dash", COLOURS[4]))
    heights = [height for one in traces for height in one["y"]]
    upright: dict[str, Any] = {"rangemode": "tozero"}
    if max(heights) >= WIDE * min(heights):
        upright = log_ticks(min(heights), max(heights), lambda tick: f"{tick:g}")
    upright["title"] = {"text": "GiB"}
    across = log_ticks(low, high, lambda tick: f"{tick:,.0f}")
    across["title"] = {"text": tr("Tokens per step")}
    title, figure = tr("Peak memory by tokens per step"), panel(traces, across, upright)
    return [Chart("memory-tokens", title, _note(fit, limit, length), figure)]


def _line(fit: MemoryFit, low: int, high: int, length: int) -> Trace:
    tokens = [low * (high / low) ** (i / (LINE_POINTS - 1)) for i in range(LINE_POINTS)]
    works = [Work(1, round(count), round(count * length)) for count in tokens]
    gib = [fit.model.peak_bytes(work) / units.GIB for work in works]
    sizes, line = [work.tokens for work in works], {"color": COLOURS[1], "width": 2}
    return trace("lines", tr("predicted"), "predicted", sizes, gib, line=line)


def _peaks(shapes: list[Shape]) -> Trace:
    sizes, gib = [s["tokens"] for s in shapes], [s["peak_bytes"] / units.GIB for s in shapes]
    texts = [f"{_shape(shape)}<br>{units.size(shape['peak_bytes'])}" for shape in shapes]
    marker = {"color": COLOURS[0], "symbol": "circle", "size": 8}
    return trace("markers", tr("measured"), "measured", sizes, gib, text=texts, marker=marker)


def _note(fit: MemoryFit, limit: tuple[float, str] | None, length: int) -> str:
    parts = [tr("The line is the model's prediction for pairs of {length} tokens.", length=length)]
    if limit is None:
        return parts[0]
    shown = units.size(round(limit[0]))
    parts.append(tr("Dashed line: {whose}, {size}.", whose=limit[1], size=shown))
    tokens = fit.model.tokens_within(limit[0], length)
    if tokens < NO_BUDGET:
        shown = units.number(tokens)
        parts.append(tr("The model predicts that steps of {tokens} tokens reach it.", tokens=shown))
    return " ".join(parts)


# Latency over load, and rank agreement.


def curve_chart(profile: Profile) -> Chart | None:
    """Predicted latency at rising rates; None where the profile has none."""
    found = profile.scenario or {}
    curve = found.get("curve")
    if curve is None:
        return None
    goal_s, points = found["asked"]["slo_p99_s"], curve["points"]
    known = [point[name] for point in points for name in PERCENTILES if point[name]]
    low, high = min([goal_s, *known]), max([goal_s, *known])
    ends = [0.0, max(curve["rate"], *(point["rate"] for point in points))]
    rates = [curve["rate"]] * 2
    traces = [
        *(_percentile(points, name) for name in PERCENTILES),
        straight(tr("goal"), "goal", ends, [goal_s, goal_s], "dash", COLOURS[5]),
        straight(tr("requested rate"), "rate", rates, [low, high], "dot", COLOURS[5]),
    ]
    if found["measured"] is not None:
        traces.append(_measured(curve["rate"], found["measured"]))
    across = {"title": {"text": tr("Requests/s")}, "rangemode": "tozero"}
    upright = {**log_ticks(low, high, time_tick), "title": {"text": tr("Latency")}}
    figure = panel(traces, across, upright)
    return Chart("load-curve", tr("Latency over load"), _curve_note(curve, goal_s), figure)


def _curve_note(curve: dict[str, Any], goal_s: float) -> str:
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


def _percentile(points: Sequence[dict[str, Any]], name: str) -> Trace:
    label, colour = PERCENTILES[name]
    rates, seconds = [point["rate"] for point in points], [point[name] for point in points]
    texts = [_hover(point, label, name) if point[name] else "" for point in points]
    style = {"line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 4}}
    return trace("lines+markers", label, name, rates, seconds, text=texts, **style)


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
    marker = {"color": [colour for _, colour in known], "symbol": "diamond", "size": 11}
    rates, seconds = [rate] * len(known), list(known.values())
    return trace("markers", tr("measured"), "measured", rates, seconds, text=texts, marker=marker)


def agreement_charts(profile: Profile) -> list[Chart]:
    """Kendall τ and overlap of the top ten by precision; none where nothing was compared."""
    rows = profile.precisions
    if not rows:
        return []
    names = [row["precision"] for row in rows]
    texts = [f"{escape(str(row['precision']))}<br>{wording.agreement(row)}" for row in rows]
    needed = [MIN_TAU] * len(names)
    traces = [straight(tr("required to pass"), "needed", names, needed, "dash", COLOURS[5])]
    for key, name, colour, symbol in (
        ("tau", tr("Kendall τ"), COLOURS[0], "circle"),
        ("overlap", tr("Top-10 overlap"), COLOURS[1], "square-open"),
    ):
        marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}}
        heights = [row[key] for row in rows]
        traces.append(trace("markers", name, key, names, heights, text=texts, marker=marker))
    low = min(MIN_TAU, *(row[key] for row in rows for key in ("tau", "overlap")))
    upright = {"range": [low - MARGIN, 1 + MARGIN], "title": {"text": tr("Agreement with fp32")}}
    note = tr("1 means the same ranking as fp32. A precision below the dashed line is not used.")
    figure = panel(traces, {"type": "category"}, upright)
    return [Chart("agreement", tr("Rank agreement by precision"), note, figure)]
