"""The report's charts as plain data, in the form that plotly.js draws. Pure.

Colours of text and grid are not here: the page sets them, so that both themes can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.tune.stats import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.tune.profile import Profile

    Entry = dict[str, Any]
    Trace = dict[str, Any]

COLOURS = ("#0077bb", "#d95f02", "#1b9e77", "#9a5fc4", "#e7298a", "#7f7f7f")
"""Told apart by colour-blind readers too, and at least 3:1 against a white and a dark page."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
"""The second sign of a line, next to its colour; as 6 and 7 share no factor, 42 lines differ."""

MISSING = {
    "out_of_memory": ("out of memory", "x-open"),
    "skipped": ("skipped", "circle-open"),
    "not_reached": ("not reached", "diamond-open"),
}
"""Per status without a number: its words and its hollow sign at the chart's foot."""

MOST_TICKS = 8
"""Labels on the size axis that a phone's width holds."""

GIB = 2**30

UNITS = {"batch_size": "pairs a step", "token_budget": "tokens a step"}

AXES = {
    "batch_size": "Batch size (pairs a step)",
    "token_budget": "Token budget (tokens a step)",
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a chart's vertical axis shows.

    Attributes:
        name: short, for ids.
        title: heading of the chart.
        value: the number of an entry; None where it was not measured.
        bounds: lower and upper end of the number's interval; None where there is none.
        axis: plotly's settings of the axis.
    """

    name: str
    title: str
    value: Callable[[Entry], float | None]
    bounds: Callable[[Entry], tuple[float, float] | None]
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
    return None if entry["peak_bytes"] is None else entry["peak_bytes"] / GIB


THROUGHPUT = Quantity(
    "throughput",
    "Throughput",
    lambda entry: float(entry["pairs_per_s"]),
    _throughput_bounds,
    {"title": {"text": "Pairs/s"}, "rangemode": "tozero"},
)
LATENCY = Quantity(
    "latency",
    "Latency",
    lambda entry: float(entry["latency_s"]["median"]),
    _latency_bounds,
    {
        "title": {"text": "Median of a call"},
        "type": "log",
        "dtick": "D2",
        "tickformat": "~s",
        "ticksuffix": "s",
    },
)
MEMORY = Quantity(
    "memory",
    "Peak memory",
    _gibibytes,
    lambda _: None,
    {"title": {"text": "GiB"}, "rangemode": "tozero"},
)

CHARTS = (
    (THROUGHPUT, "batch_size"),
    (LATENCY, "batch_size"),
    (THROUGHPUT, "token_budget"),
    (LATENCY, "token_budget"),
    (MEMORY, "batch_size"),
    (MEMORY, "token_budget"),
)


def charts(profile: Profile, say: Callable[[Entry], str]) -> list[Chart]:
    """All charts that the profile has points for.

    Args:
        profile: what tuning found.
        say: an entry in a line of safe HTML, shown when it is pointed at.
    """
    drawn = (_chart(profile, quantity, unit, say) for quantity, unit in CHARTS)
    return [chart for chart in drawn if chart is not None]


def measured(entry: Entry) -> bool:
    """Whether an entry of the profile has numbers."""
    return "latency_s" in entry


def _chart(
    profile: Profile, quantity: Quantity, unit: str, say: Callable[[Entry], str]
) -> Chart | None:
    entries = sorted((e for e in profile.points if e[unit]), key=lambda e: (e["pairs"], e[unit]))
    known = [e for e in entries if measured(e) and quantity.value(e) is not None]
    if not known:
        return None
    pen = _Pen(quantity, unit, say, _looks(entries))
    lines = [pen.line([e for e in known if e["pairs"] == n]) for n in sorted(pen.looks)]
    best = [e for e in known if _is_best(profile, e, unit)]
    gaps = [pen.gaps([e for e in entries if e["status"] == status]) for status in MISSING]
    traces = [trace for trace in (*lines, pen.rings(best), *gaps) if trace is not None]
    return Chart(
        name=f"{quantity.name}-{unit}",
        title=f"{quantity.title} against {UNITS[unit]}",
        note=_note(quantity, known),
        figure={"data": traces, "layout": _layout(quantity, unit, entries)},
    )


def _is_best(profile: Profile, entry: Entry, unit: str) -> bool:
    """Whether tuning chose this entry: for its number of pairs, or as the token budget."""
    if unit == "token_budget":
        return bool(entry[unit] == profile.settings.token_budget)
    return any((b["pairs"], b[unit]) == (entry["pairs"], entry[unit]) for b in profile.best)


def _note(quantity: Quantity, known: Sequence[Entry]) -> str:
    if quantity is MEMORY:
        return "Highest during a call, the model included."
    bars = sum(quantity.bounds(entry) is not None for entry in known)
    whose = {0: "No point", len(known): "Every point"}.get(bars, f"{bars} of {len(known)} points")
    verb = "has" if bars in {0, 1, len(known)} else "have"
    return f"{whose} {verb} enough runs for an error bar ({CONFIDENCE:.0%} interval of the median)."


@dataclass(frozen=True, slots=True)
class _Look:
    colour: str
    symbol: str
    place: int


def _looks(entries: Iterable[Entry]) -> dict[int, _Look]:
    """Colour and sign for each number of pairs."""
    counts = sorted({entry["pairs"] for entry in entries})
    return {
        count: _Look(COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)], i)
        for i, count in enumerate(counts)
    }


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws the traces of one chart."""

    quantity: Quantity
    unit: str
    say: Callable[[Entry], str]
    looks: dict[int, _Look]

    def line(self, entries: Sequence[Entry]) -> Trace | None:
        """The measured points of one number of pairs."""
        if not entries:
            return None
        look = self.looks[entries[0]["pairs"]]
        trace = self._trace(entries, f"{entries[0]['pairs']} pairs", mode="lines+markers")
        trace["meta"] = "measured"
        trace["line"] = {"color": look.colour, "width": 2}
        trace["marker"] = {"color": look.colour, "symbol": look.symbol, "size": 8}
        bars = self._bars(entries, trace["y"])
        return trace if bars is None else trace | {"error_y": bars}

    def rings(self, entries: Sequence[Entry]) -> Trace | None:
        """A ring around each point that tuning chose."""
        if not entries:
            return None
        trace = self._trace(entries, "chosen", mode="markers")
        colours = [self.looks[entry["pairs"]].colour for entry in entries]
        trace["meta"] = "chosen"
        trace["marker"] = {"symbol": "circle-open", "size": 19, "color": colours}
        trace["marker"]["line"] = {"width": 2.5}
        return trace

    def gaps(self, entries: Sequence[Entry]) -> Trace | None:
        """Hollow signs at the foot, on an axis of their own, for sizes without a number."""
        if not entries:
            return None
        words, symbol = MISSING[entries[0]["status"]]
        looks = [self.looks[entry["pairs"]] for entry in entries]
        return {
            "type": "scatter",
            "mode": "markers",
            "meta": "missing",
            "name": words,
            "x": [entry[self.unit] for entry in entries],
            "y": [0.04 + 0.07 * look.place for look in looks],
            "yaxis": "y2",
            "text": [self.say(entry) for entry in entries],
            "hoverinfo": "text",
            "marker": {
                "symbol": symbol,
                "size": 10,
                "color": [look.colour for look in looks],
                "line": {"width": 2},
            },
        }

    def _trace(self, entries: Sequence[Entry], name: str, mode: str) -> Trace:
        return {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [entry[self.unit] for entry in entries],
            "y": [self.quantity.value(entry) for entry in entries],
            "text": [self.say(entry) for entry in entries],
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


GRID = "rgba(128, 128, 128, 0.28)"
"""Seen on white and on black."""


def _layout(quantity: Quantity, unit: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """Still pictures: a finger that scrolls the page must not zoom them."""
    lines = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "fixedrange": True}
    return {
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "dragmode": False,
        "hovermode": "closest",
        "margin": {"l": 60, "r": 12, "t": 8, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"type": "log", "title": {"text": AXES[unit]}, **_ticks(unit, entries), **lines},
        "yaxis": {**quantity.axis, **lines},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }


def _ticks(unit: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """A label at each measured size, or at every second, third … where they are many."""
    sizes = sorted({entry[unit] for entry in entries})
    sizes = sizes[:: -(-len(sizes) // MOST_TICKS)]
    return {"tickvals": sizes, "ticktext": [f"{size:,}" for size in sizes]}
