"""The report's charts of the sweep, and what all charts share, as data for plotly.js.

Colours of text and grid are not here: the page sets them, so that both themes are legible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import cycle
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from echelon.messages import N_, tr, units
from echelon.reports import wording
from echelon.reports.profile_view import certain, knees
from echelon.reports.statistics import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.profile import Profile
    from echelon.reports.wording import Entry

Trace = dict[str, Any]

COLOURS = ("#0077bb", "#d95f02", "#1b9e77", "#9a5fc4", "#e7298a", "#7f7f7f")
"""Distinct for colour-blind readers, with a contrast of 3:1 on a white and on a dark page."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
"""A symbol for each line besides its colour: 6 colours and 7 symbols make 42 different lines."""

HOLLOW = {"out_of_memory": "x-open", "skipped": "circle-open", "not_reached": "diamond-open"}
"""Symbol at the bottom of the chart for a size that was not measured, by its status."""

RING = {"symbol": "circle-open", "size": 19, "line": {"width": 2.5}}
"""Around each point that tuning chose."""

STAR = {"symbol": "star", "size": 15}
"""On the knee of each line."""

HOVER_WIDTH = 40
"""Characters per line that a phone shows beside a point."""

MAX_TICKS = 8
"""Labels that fit on the size axis of a phone."""

FAR = 1000
"""Ratio of the ends of a logarithmic axis above which only powers of ten have labels."""

WIDE = 8
"""Ratio of latencies above which the axis is logarithmic, or the short ones lie flat."""

STRIP_ROW, MAX_STRIP = 0.08, 0.4
"""Shares of a chart's height: one row of the strip for sizes not measured, and all of it."""

ABOVE = 1.08
"""Height of the memory axis over the highest peak."""

SHADE = "rgba(128, 128, 128, 0.12)"

GRID = "rgba(128, 128, 128, 0.28)"
"""Visible on white and on black."""

LINES = {"gridcolor": GRID, "zerolinecolor": GRID, "fixedrange": True, "automargin": True}
"""Both axes of every chart; fixed, because a finger that scrolls the page must not zoom."""

PAPER: dict[str, Any] = {
    "autosize": True,
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "dragmode": False,
    "hovermode": "closest",
    "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
}
"""Layout of every chart."""

UNITS = {"batch_size": N_("batch size"), "token_budget": N_("token budget")}

AXES = {
    "batch_size": N_("Batch size (pairs per step)"),
    "token_budget": N_("Token budget (tokens per step)"),
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """The quantity on a chart's vertical axis; None for a value not measured or not bounded."""

    name: str
    title: str
    value: Callable[[Entry], float | None]
    bounds: Callable[[Entry], tuple[float, float] | None]
    unit: str
    axis: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a page: its id, heading, explanation, and plotly's ``data`` and ``layout``."""

    name: str
    title: str
    note: str
    figure: dict[str, Any]


def trace(mode: str, name: str, meta: str, x: list[Any], y: list[Any], **style: Any) -> Trace:
    """A trace with the hover texts ``text``, if any; ``meta`` names its kind for the page."""
    shown = {"type": "scatter", "mode": mode, "name": name, "meta": meta, "x": x, "y": y}
    return {**shown, "hoverinfo": "text" if "text" in style else "skip", **style}


def straight(name: str, meta: str, x: list[Any], y: list[float], dash: str, colour: str) -> Trace:
    """A line between given points: a goal, a limit or the diagonal."""
    return trace("lines", name, meta, x, y, line={"color": colour, "dash": dash, "width": 2})


def panel(traces: list[Trace], across: dict[str, Any], upright: dict[str, Any]) -> dict[str, Any]:
    """A figure with a horizontal and a vertical axis."""
    layout = {**PAPER, "xaxis": {**across, **LINES}, "yaxis": {**upright, **LINES}}
    return {"data": traces, "layout": layout}


def log_ticks(low: float, high: float, text: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic axis with round labels from below ``low`` to above ``high``, both above 0."""
    digits = (1, 2, 5) if high < FAR * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [text(tick) for tick in ticks]}


def time_tick(seconds: float) -> str:
    """A time as plotly labels the linear axis."""
    return f"{seconds:g}s" if seconds >= 1 else f"{1000 * seconds:g}ms"


# The sweep.


def _latency_bounds(entry: Entry) -> tuple[float, float] | None:
    low, high = entry["latency_s"]["low"], entry["latency_s"]["high"]
    return None if low is None or high is None else (low, high)


def _throughput_bounds(entry: Entry) -> tuple[float, float] | None:
    """The latency's interval inverted: the longest latency is the lowest throughput."""
    bounds = _latency_bounds(entry)
    return None if bounds is None else (entry["pairs"] / bounds[1], entry["pairs"] / bounds[0])


THROUGHPUT = Quantity(
    "throughput",
    N_("Throughput"),
    lambda entry: float(entry["pairs_per_s"]),
    _throughput_bounds,
    N_("Pairs/s"),
    {"rangemode": "tozero"},
)
LATENCY = Quantity(
    "latency",
    N_("Latency"),
    lambda entry: float(entry["latency_s"]["median"]),
    _latency_bounds,
    N_("Median time of a call"),
    {"rangemode": "tozero", "tickformat": "~s", "ticksuffix": "s"},
)
MEMORY = Quantity(
    "memory",
    N_("Peak memory"),
    lambda entry: entry["peak_bytes"] and entry["peak_bytes"] / units.GIB,
    lambda _: None,
    "GiB",
    {"rangemode": "tozero"},
)


def charts(profile: Profile) -> list[Chart]:
    """All charts that the profile has points for."""
    shown = [(quantity, unit) for unit in UNITS for quantity in (THROUGHPUT, LATENCY)]
    shown += [(MEMORY, unit) for unit in UNITS]
    drawn = (_chart(profile, quantity, unit) for quantity, unit in shown)
    return [chart for chart in drawn if chart is not None]


def _chart(profile: Profile, quantity: Quantity, unit: str) -> Chart | None:
    entries = sorted((e for e in profile.points if e[unit]), key=lambda e: (e["pairs"], e[unit]))
    known = [e for e in entries if wording.measured(e) and quantity.value(e) is not None]
    if not known:
        return None
    gaps = [e for e in entries if e["status"] in HOLLOW]
    counts = sorted({entry["pairs"] for entry in entries})
    looks = dict(zip(counts, zip(cycle(COLOURS), cycle(SYMBOLS), strict=False), strict=False))
    pen = Pen(quantity, unit, looks)
    chosen = [e for e in known if _is_best(profile, e, unit)]
    traces = [*pen.lines(known), *pen.marks("best", chosen, tr("best"), RING)]
    if quantity is not MEMORY:
        traces += pen.marks("knee", knees(known, unit), tr("knee"), STAR)
    if quantity is not MEMORY:
        traces += pen.predicted([e for e in entries if e["status"] == "predicted"])
    traces += pen.gaps(gaps)
    axes = layout(unit, entries, "y2" if gaps else "y") | upright(quantity, known, gaps)
    if quantity is MEMORY:  # one scale for all sizes, so that the charts can be compared
        most = max(e.get("peak_bytes") or 0 for e in profile.points)
        axes["yaxis"]["range"] = [0, ABOVE * most / units.GIB]
    figure = {"data": traces, "layout": axes}
    name, title = f"{quantity.name}-{unit}", title_of(quantity, unit)
    return Chart(name, title, _note(quantity, known), figure)


def title_of(quantity: Quantity, unit: str) -> str:
    """A chart's heading."""
    return tr("{quantity} by {unit}", quantity=tr(quantity.title), unit=tr(UNITS[unit]))


def _is_best(profile: Profile, entry: Entry, unit: str) -> bool:
    """Whether this entry is surely the best for its number of pairs, or as the token budget."""
    if not certain(profile, entry):
        return False
    if unit == "token_budget":
        return bool(entry[unit] == profile.settings.token_budget)
    return any((b["pairs"], b[unit]) == (entry["pairs"], entry[unit]) for b in profile.best)


def _note(quantity: Quantity, known: Sequence[Entry]) -> str:
    if quantity is MEMORY:
        return tr("Peak during a call, including the model.")
    bars = sum(quantity.bounds(entry) is not None for entry in known)
    values = {"interval": units.percent(CONFIDENCE), "bars": bars, "all": len(known)}
    if bars == 0:
        return tr(
            "No point has enough runs for an error bar ({interval} confidence interval of the "
            "median).",
            **values,
        )
    if bars == len(known):
        return tr("Error bars: {interval} confidence interval of the median.", **values)
    return tr(
        "Error bars: {interval} confidence interval of the median, for points with enough runs "
        "({bars} of {all}).",
        **values,
    )


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws the traces of one chart; ``looks`` are each line's colour and symbol, by pairs."""

    quantity: Quantity
    unit: str
    looks: dict[int, tuple[str, str]]

    def lines(self, entries: Sequence[Entry]) -> list[Trace]:
        """A line through the measured points of each number of pairs."""
        traces = []
        for pairs, (colour, symbol) in self.looks.items():
            points = [entry for entry in entries if entry["pairs"] == pairs]
            if points:
                found = self._trace("lines+markers", "measured", points, wording.pairs(pairs))
                found["line"] = {"color": colour, "width": 2}
                found["marker"] = {"color": colour, "symbol": symbol, "size": 8}
                traces.append(found | self._bars(points))
        return traces

    def marks(
        self, meta: str, entries: Sequence[Entry], name: str, marker: dict[str, Any]
    ) -> list[Trace]:
        """Symbols in the colours of their lines; no trace without entries."""
        colours = [self.looks[entry["pairs"]][0] for entry in entries]
        found = self._trace("markers", meta, entries, name) | {
            "marker": marker | {"color": colours}
        }
        return [found] if entries else []

    def predicted(self, entries: Sequence[Entry]) -> list[Trace]:
        """Hollow symbols where a size was predicted; no trace without any."""
        marker = {"symbol": "diamond-open", "size": 8, "line": {"width": 1.5}}
        drawn = self.marks("predicted", entries, tr("predicted"), marker)
        seconds = [entry["predicted_s"]["median"] for entry in entries]
        rates = [e["pairs"] / s for e, s in zip(entries, seconds, strict=True)]
        heights = rates if self.quantity is THROUGHPUT else seconds
        return [found | {"y": heights} for found in drawn]

    def gaps(self, entries: Sequence[Entry]) -> list[Trace]:
        """Hollow symbols in a separate strip for sizes not measured, one row per line."""
        rows = sorted({entry["pairs"] for entry in entries})
        heights = {count: (row + 0.5) / len(rows) for row, count in enumerate(rows)}
        traces = []
        for status, symbol in HOLLOW.items():
            missing = [entry for entry in entries if entry["status"] == status]
            strip = {"y": [heights[entry["pairs"]] for entry in missing], "yaxis": "y2"}
            marker = {"symbol": symbol, "size": 9, "line": {"width": 2}}
            drawn = self.marks("missing", missing, wording.missing(status), marker)
            traces += [found | strip for found in drawn]
        return traces

    def _trace(self, mode: str, meta: str, entries: Sequence[Entry], name: str) -> Trace:
        sizes = [entry[self.unit] for entry in entries]
        values = [self.quantity.value(e) if wording.measured(e) else None for e in entries]
        return trace(mode, name, meta, sizes, values, text=[_hover(entry) for entry in entries])

    def _bars(self, entries: Sequence[Entry]) -> Trace:
        """Error bars where a point has an interval; null for a point without one."""
        ends = [self.quantity.bounds(entry) for entry in entries]
        if not any(ends):
            return {}
        pairs = [(self.quantity.value(e) or 0.0, end) for e, end in zip(entries, ends, strict=True)]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [None if end is None else end[1] - value for value, end in pairs],
            "arrayminus": [None if end is None else value - end[0] for value, end in pairs],
            "thickness": 1.5,
            "width": 4,
        }
        return {"error_y": bars}


def _hover(entry: Entry) -> str:
    """A point's hover text; plotly reads tags there, so they are escaped."""
    lines = wrap(wording.point(entry), HOVER_WIDTH)
    return "<br>".join(escape(line, quote=False) for line in lines)


def layout(unit: str, entries: Sequence[Entry], foot: str) -> dict[str, Any]:
    """The layout without vertical axes; the sizes are labelled below the axis ``foot``."""
    sizes = sorted({entry[unit] for entry in entries})
    sizes = sizes[:: -(-len(sizes) // MAX_TICKS)]  # with many sizes, every second, third …
    ticks = {"tickvals": sizes, "ticktext": [f"{size:,}" for size in sizes]}
    across = {"type": "log", "title": {"text": tr(AXES[unit])}, "anchor": foot}
    return {**PAPER, "xaxis": {**across, **ticks, **LINES}}


def upright(quantity: Quantity, known: Sequence[Entry], gaps: Sequence[Entry]) -> dict[str, Any]:
    """The vertical axis; below it a shaded strip for sizes not measured, if there are any."""
    axis = {**quantity.axis, "title": {"text": tr(quantity.unit)}, **LINES}
    if quantity is LATENCY:
        medians = [entry["latency_s"]["median"] for entry in known]
        low, high = min(medians), max(medians)
        axis |= log_ticks(low, high, time_tick) if high >= WIDE * low else {}
    if not gaps:
        return {"yaxis": axis}
    strip = min(MAX_STRIP, STRIP_ROW * len({entry["pairs"] for entry in gaps}))
    shade = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "paper", "y0": 0}
    return {
        "yaxis": axis | {"domain": [strip + STRIP_ROW / 3, 1]},
        "yaxis2": {"domain": [0, strip], "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": [shade | {"y1": strip, "line": {"width": 0}, "fillcolor": SHADE}],
    }
