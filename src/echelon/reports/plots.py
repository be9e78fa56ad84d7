"""Round labels of a logarithmic axis, as data for plotly. Pure.

The report's charts as plain data, in the form that plotly.js draws. Pure.

Colours of text and grid are not here: the page sets them, so that both themes can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from echelon.messages import N_, tr, units
from echelon.reports import wording
from echelon.reports.profile_view import knees
from echelon.reports.statistics import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.profile import Profile
    from echelon.reports.wording import Entry

FAR = 1000
"""Times apart beyond which only powers of ten have labels."""


def log_ticks(least: float, most: float, say: Callable[[float], str]) -> dict[str, Any]:
    """The axis from below ``least`` to above ``most``, both above 0."""
    digits = (1, 2, 5) if most < FAR * least else (1,)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [say(tick) for tick in ticks]}


if TYPE_CHECKING:
    Trace = dict[str, Any]


COLOURS = ("#0077bb", "#d95f02", "#1b9e77", "#9a5fc4", "#e7298a", "#7f7f7f")
"""Told apart by colour-blind readers too, and at least 3:1 against a white and a dark page."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
"""The second sign of a line, next to its colour; as 6 and 7 share no factor, 42 lines differ."""

SIGNS = {"out_of_memory": "x-open", "skipped": "circle-open", "not_reached": "diamond-open"}
"""The hollow sign at the chart's foot of a size without a number, by its status."""

HOVER_WIDTH = 40
"""Letters of a line that a phone shows beside a point."""

MOST_TICKS = 8
"""Labels on the size axis that a phone's width holds."""

UNITS = {"batch_size": N_("batch size"), "token_budget": N_("token budget")}

AXES = {
    "batch_size": N_("Batch size (pairs per step)"),
    "token_budget": N_("Token budget (tokens per step)"),
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a chart's vertical axis shows.

    Attributes:
        name: short, for ids.
        title: heading of the chart.
        value: the number of an entry; None where it was not measured.
        bounds: lower and upper end of the number's interval; None where there is none.
        unit: heading of the axis.
        axis: plotly's settings of the axis.
    """

    name: str
    title: str
    value: Callable[[Entry], float | None]
    bounds: Callable[[Entry], tuple[float, float] | None]
    unit: str
    axis: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the report.

    Attributes:
        name: id in the page.
        title: heading.
        note: how to read it.
        figure: ``data`` and ``layout`` for plotly.js.
    """

    name: str
    title: str
    note: str
    figure: dict[str, Any]


def _latency_bounds(entry: Entry) -> tuple[float, float] | None:
    low, high = entry["latency_s"]["low"], entry["latency_s"]["high"]
    return None if low is None or high is None else (low, high)


def _throughput_bounds(entry: Entry) -> tuple[float, float] | None:
    """The latency's interval turned over: the slowest end is the lowest throughput."""
    bounds = _latency_bounds(entry)
    return None if bounds is None else (entry["pairs"] / bounds[1], entry["pairs"] / bounds[0])


def _gibibytes(entry: Entry) -> float | None:
    return None if entry["peak_bytes"] is None else entry["peak_bytes"] / units.GIB


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
    _gibibytes,
    lambda _: None,
    "GiB",
    {"rangemode": "tozero"},
)

CHARTS = (
    (THROUGHPUT, "batch_size"),
    (LATENCY, "batch_size"),
    (THROUGHPUT, "token_budget"),
    (LATENCY, "token_budget"),
    (MEMORY, "batch_size"),
    (MEMORY, "token_budget"),
)


def charts(profile: Profile) -> list[Chart]:
    """All charts that the profile has points for."""
    drawn = (_chart(profile, quantity, unit) for quantity, unit in CHARTS)
    return [chart for chart in drawn if chart is not None]


def _chart(profile: Profile, quantity: Quantity, unit: str) -> Chart | None:
    entries = sorted((e for e in profile.points if e[unit]), key=lambda e: (e["pairs"], e[unit]))
    known = [e for e in entries if wording.measured(e) and quantity.value(e) is not None]
    if not known:
        return None
    gaps = [e for e in entries if e["status"] in SIGNS]
    pen = Pen(quantity, unit, _looks(entries))
    traces = [pen.line([e for e in known if e["pairs"] == count]) for count in pen.looks]
    traces.append(pen.rings([e for e in known if _is_best(profile, e, unit)]))
    if quantity is not MEMORY:
        traces.append(pen.stars(knees(known, unit)))
    traces += pen.gaps(gaps)
    return Chart(
        name=f"{quantity.name}-{unit}",
        title=title_of(quantity, unit),
        note=_note(quantity, known),
        figure={
            "data": [trace for trace in traces if trace is not None],
            "layout": layout(unit, entries, "y2" if gaps else "y") | upright(quantity, known, gaps),
        },
    )


def title_of(quantity: Quantity, unit: str) -> str:
    """A chart's heading."""
    return tr("{quantity} by {unit}", quantity=tr(quantity.title), unit=tr(UNITS[unit]))


def _is_best(profile: Profile, entry: Entry, unit: str) -> bool:
    """Whether tuning chose this entry: for its number of pairs, or as the token budget."""
    if unit == "token_budget":
        return bool(entry[unit] == profile.settings.token_budget)
    return any((b["pairs"], b[unit]) == (entry["pairs"], entry[unit]) for b in profile.best)


def _note(quantity: Quantity, known: Sequence[Entry]) -> str:
    if quantity is MEMORY:
        return tr("Peak during a call, including the model.")
    bars = sum(quantity.bounds(entry) is not None for entry in known)
    interval = units.percent(CONFIDENCE)
    if bars == 0:
        return tr(
            "No point has enough runs for an error bar ({interval} confidence interval of the "
            "median).",
            interval=interval,
        )
    if bars == len(known):
        return tr("Error bars: {interval} confidence interval of the median.", interval=interval)
    return tr(
        "Error bars: {interval} confidence interval of the median, for points with enough runs "
        "({bars} of {all}).",
        interval=interval,
        bars=bars,
        all=len(known),
    )


@dataclass(frozen=True, slots=True)
class Look:
    """Colour and sign of a line."""

    colour: str
    symbol: str


def _looks(entries: Iterable[Entry]) -> dict[int, Look]:
    """Colour and sign for each number of pairs."""
    counts = sorted({entry["pairs"] for entry in entries})
    return {
        count: Look(COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)])
        for i, count in enumerate(counts)
    }


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws the traces of one chart."""

    quantity: Quantity
    unit: str
    looks: dict[int, Look]

    def line(self, entries: Sequence[Entry]) -> Trace | None:
        """The measured points of one number of pairs."""
        if not entries:
            return None
        look = self.looks[entries[0]["pairs"]]
        trace = self._trace(entries, wording.pairs(entries[0]["pairs"]), mode="lines+markers")
        trace["meta"] = "measured"
        trace["line"] = {"color": look.colour, "width": 2}
        trace["marker"] = {"color": look.colour, "symbol": look.symbol, "size": 8}
        bars = self._bars(entries, trace["y"])
        return trace if bars is None else trace | {"error_y": bars}

    def rings(self, entries: Sequence[Entry]) -> Trace | None:
        """A ring around each point that tuning chose."""
        if not entries:
            return None
        trace = self._trace(entries, tr("best"), mode="markers")
        colours = [self.looks[entry["pairs"]].colour for entry in entries]
        trace["meta"] = "best"
        trace["marker"] = {"symbol": "circle-open", "size": 19, "color": colours}
        trace["marker"]["line"] = {"width": 2.5}
        return trace

    def stars(self, entries: Sequence[Entry]) -> Trace | None:
        """A star on each line's knee."""
        if not entries:
            return None
        trace = self._trace(entries, tr("knee"), mode="markers")
        colours = [self.looks[entry["pairs"]].colour for entry in entries]
        trace["meta"] = "knee"
        trace["marker"] = {"symbol": "star", "size": 15, "color": colours}
        return trace

    def gaps(self, entries: Sequence[Entry]) -> list[Trace]:
        """Hollow signs in a strip of their own for sizes without a number, a row per line."""
        rows = sorted({entry["pairs"] for entry in entries})
        heights = {count: (row + 0.5) / len(rows) for row, count in enumerate(rows)}
        kinds = ([e for e in entries if e["status"] == status] for status in SIGNS)
        return [self._gap(kind, heights) for kind in kinds if kind]

    def _gap(self, entries: Sequence[Entry], heights: dict[int, float]) -> Trace:
        status = entries[0]["status"]
        trace = self._trace(entries, wording.missing(status), mode="markers")
        trace["meta"] = "missing"
        trace["y"] = [heights[entry["pairs"]] for entry in entries]
        trace["yaxis"] = "y2"
        colours = [self.looks[entry["pairs"]].colour for entry in entries]
        trace["marker"] = {"symbol": SIGNS[status], "size": 9, "color": colours}
        trace["marker"]["line"] = {"width": 2}
        return trace

    def _trace(self, entries: Sequence[Entry], name: str, mode: str) -> Trace:
        values = [self.quantity.value(e) if wording.measured(e) else None for e in entries]
        return {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [entry[self.unit] for entry in entries],
            "y": values,
            "text": [_say(entry) for entry in entries],
            "hoverinfo": "text",
        }

    def _bars(self, entries: Sequence[Entry], values: Sequence[float]) -> dict[str, Any] | None:
        """Error bars; None where no point has an interval, null for a single one without."""
        bounds = [self.quantity.bounds(entry) for entry in entries]
        if not any(bounds):
            return None
        pairs = list(zip(values, bounds, strict=True))
        return {
            "type": "data",
            "symmetric": False,
            "array": [None if ends is None else ends[1] - value for value, ends in pairs],
            "arrayminus": [None if ends is None else value - ends[0] for value, ends in pairs],
            "thickness": 1.5,
            "width": 4,
        }


def _say(entry: Entry) -> str:
    """What a point shows when it is pointed at; plotly reads tags there, so they are escaped."""
    return "<br>".join(
        escape(line, quote=False) for line in wrap(wording.point(entry), HOVER_WIDTH)
    )


STRIP_ROW, MOST_STRIP = 0.08, 0.4
"""Shares of a chart's height: one row of the strip for sizes without a number, and all of it."""

SHADE = "rgba(128, 128, 128, 0.12)"

GRID = "rgba(128, 128, 128, 0.28)"
"""Seen on white and on black."""


LINES = {"gridcolor": GRID, "zerolinecolor": GRID, "fixedrange": True, "automargin": True}
"""Of both axes; fixed, because a finger that scrolls the page must not zoom."""

PAPER: dict[str, Any] = {
    "autosize": True,
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "dragmode": False,
    "hovermode": "closest",
    "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
}
"""Of every chart's layout."""

WIDE = 8
"""Latencies this many times apart are drawn on a logarithmic axis, or the short ones lie flat."""


def layout(unit: str, entries: Sequence[Entry], foot: str) -> dict[str, Any]:
    """Everything but the vertical axes; ``foot`` is the one that the sizes stand under."""
    across = {"type": "log", "title": {"text": tr(AXES[unit])}, "anchor": foot}
    return {
        **PAPER,
        "xaxis": {**across, **_ticks(unit, entries), **LINES},
    }


def _ticks(unit: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """A label at each measured size, or at every second, third … where they are many."""
    sizes = sorted({entry[unit] for entry in entries})
    sizes = sizes[:: -(-len(sizes) // MOST_TICKS)]
    return {"tickvals": sizes, "ticktext": [f"{size:,}" for size in sizes]}


def upright(quantity: Quantity, known: Sequence[Entry], gaps: Sequence[Entry]) -> dict[str, Any]:
    """The vertical axis; beneath it a shaded strip for sizes without a number, if there are any."""
    axis = {**quantity.axis, "title": {"text": tr(quantity.unit)}, **LINES}
    if quantity is LATENCY:
        axis |= _latency_ticks([entry["latency_s"]["median"] for entry in known])
    if not gaps:
        return {"yaxis": axis}
    strip = min(MOST_STRIP, STRIP_ROW * len({entry["pairs"] for entry in gaps}))
    shade = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "paper", "y0": 0}
    return {
        "yaxis": axis | {"domain": [strip + STRIP_ROW / 3, 1]},
        "yaxis2": {"domain": [0, strip], "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": [shade | {"y1": strip, "line": {"width": 0}, "fillcolor": SHADE}],
    }


def _latency_ticks(medians: Sequence[float]) -> dict[str, Any]:
    """Logarithmic where the latencies are far apart, with round labels."""
    least, most = min(medians), max(medians)
    return {} if most < WIDE * least else log_ticks(least, most, time_tick)


def time_tick(seconds: float) -> str:
    """A time as plotly labels the linear axis."""
    return f"{seconds:g}s" if seconds >= 1 else f"{1000 * seconds:g}ms"
