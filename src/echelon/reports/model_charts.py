"""The report's charts of the fitted models: predicted against measured. Pure.

The report's chart of memory against the tokens of a step, with the limit. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.messages import N_, listed, tr, translated, units
from echelon.reports import wording
from echelon.reports.plots import COLOURS, LINES, PAPER, WIDE, Chart, log_ticks
from echelon.scheduling.cost_model import Work
from echelon.scheduling.fit import CostFit, MemoryFit
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile

if TYPE_CHECKING:
    Shape = dict[str, Any]

UNSEEN = {
    False: (N_("used for the fit"), COLOURS[0], "circle"),
    True: (N_("used to check the fit"), COLOURS[1], "square"),
}
"""Name, colour and sign of the shapes that were fitted, and of those that check the fit."""


def model_charts(profile: Profile) -> list[Chart]:
    """Step time and memory as predicted, beside what was measured; none without a model."""
    if profile.cost is None:
        return []
    fit = CostFit.from_dict(profile.cost)
    if not fit.shapes:
        return []
    found = [_time_chart(fit)]
    peaks = [shape for shape in fit.shapes if shape["peak_bytes"]]
    if profile.memory is not None and peaks:
        found.append(_memory_chart(MemoryFit.from_dict(profile.memory), peaks))
    return found


def _time_chart(fit: CostFit) -> Chart:
    note = tr(
        "Each point is one step shape; points on the line are predicted exactly. Error: "
        "{error}. Repeated measurements differ by {spread}.",
        error=translated(fit.error.words),
        spread=units.percent(fit.spread, 1),
    )
    pairs = [(shape, shape["seconds"], shape["predicted_s"]) for shape in fit.shapes]
    traces = [_points(pairs, unseen=unseen, say=units.duration) for unseen in UNSEEN]
    axis = {"type": "log", "dtick": 1, "tickformat": "~s", "ticksuffix": "s"}
    return Chart(
        name="predicted-time",
        title=tr("Step time, predicted and measured"),
        note=note,
        figure=_figure(pairs, [t for t in traces if t["x"]], axis),
    )


def _memory_chart(fit: MemoryFit, shapes: Sequence[Shape]) -> Chart:
    gib = float(units.GIB)
    pairs = [
        (
            shape,
            shape["peak_bytes"] / gib,
            fit.model.peak_bytes(Work(1, shape["tokens"], shape["squares"])) / gib,
        )
        for shape in shapes
    ]
    traces = [
        _points(pairs, unseen=unseen, say=lambda value: units.size(round(value * gib)))
        for unseen in UNSEEN
    ]
    return Chart(
        name="predicted-memory",
        title=tr("Peak memory, predicted and measured"),
        note=tr("In GiB, including the model. Error: {error}.", error=translated(fit.error.words)),
        figure=_figure(pairs, [t for t in traces if t["x"]], {}),
    )


def _points(
    pairs: Sequence[tuple[Shape, float, float]], *, unseen: bool, say: Any
) -> dict[str, Any]:
    name, colour, symbol = UNSEEN[unseen]
    chosen = [row for row in pairs if row[0]["unseen"] == unseen]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": tr(name),
        "meta": "predicted",
        "x": [measured for _, measured, _ in chosen],
        "y": [predicted for _, _, predicted in chosen],
        "text": [
            tr(
                "{shape}:<br>{predicted} predicted, {measured} measured",
                shape=shape_of(shape),
                predicted=say(predicted),
                measured=say(measured),
            )
            for shape, measured, predicted in chosen
        ],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 8},
    }


def shape_of(shape: Shape) -> str:
    """A step's shape in words."""
    return listed([wording.pairs(shape["pairs"]), wording.tokens(shape["tokens"])])


def _figure(
    pairs: Sequence[tuple[Shape, float, float]], traces: list[dict[str, Any]], axis: dict[str, Any]
) -> dict[str, Any]:
    ends = [min(min(row[1:]) for row in pairs), max(max(row[1:]) for row in pairs)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": tr("predicted = measured"),
        "meta": "diagonal",
        "x": ends,
        "y": ends,
        "hoverinfo": "skip",
        "line": {"color": COLOURS[5], "dash": "dot", "width": 1.5},
    }
    return {
        "data": [line, *traces],
        "layout": {
            **PAPER,
            "xaxis": {**axis, "title": {"text": tr("Measured")}, **LINES},
            "yaxis": {**axis, "title": {"text": tr("Predicted")}, **LINES},
        },
    }


if TYPE_CHECKING:
    Trace = dict[str, Any]


POINTS = 24
"""Of the model's line, evenly in the logarithm of tokens."""

TYPICAL = 128
"""Tokens of the model's pairs where the profile does not say how long the texts' are."""


def limit_of(profile: Profile) -> tuple[float, str] | None:
    """Bytes that a step may not pass, and whose limit that is; None where it is not known."""
    asked = (profile.scenario or {}).get("asked", {}).get("memory_limit_bytes")
    if asked is not None:
        return float(asked), tr("requested limit")
    kind, _, index = profile.key.device.partition(":")
    if kind == "cpu":
        found, whose = profile.machine.get("memory_bytes"), tr("memory of the machine")
    else:
        cards = profile.machine.get("gpus") or []
        place = int(index or 0)
        found = cards[place].get("memory_bytes") if place < len(cards) else None
        whose = tr("memory of the GPU")
    return (float(found), whose) if found else None


def memory_charts(profile: Profile) -> list[Chart]:
    """Measured peaks, the model's line and the limit; none without a memory model."""
    if profile.cost is None or profile.memory is None:
        return []
    shapes = [s for s in CostFit.from_dict(profile.cost).shapes if s["peak_bytes"] and s["tokens"]]
    if not shapes:
        return []
    fit = MemoryFit.from_dict(profile.memory)
    length = round((profile.data.get("tokens") or {}).get("mean", TYPICAL)) or 1
    sizes = sorted(shape["tokens"] for shape in shapes)
    traces = [_line(fit, sizes[0], sizes[-1], length), _memory_points(shapes)]
    limit = limit_of(profile)
    if limit is not None:
        traces.append(_limit(limit, sizes[0], sizes[-1]))
    heights = [height for trace in traces for height in trace["y"]]
    return [
        Chart(
            name="memory-tokens",
            title=tr("Peak memory by tokens per step"),
            note=_note(fit, limit, length),
            figure={
                "data": traces,
                "layout": {
                    **PAPER,
                    "xaxis": {
                        **log_ticks(sizes[0], sizes[-1], lambda tick: f"{tick:,.0f}"),
                        "title": {"text": tr("Tokens per step")},
                        **LINES,
                    },
                    "yaxis": {**_upright(min(heights), max(heights)), **LINES},
                },
            },
        )
    ]


def _line(fit: MemoryFit, least: int, most: int, length: int) -> Trace:
    tokens = [least * (most / least) ** (i / (POINTS - 1)) for i in range(POINTS)]
    works = [Work(1, round(count), round(count * length)) for count in tokens]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": tr("predicted"),
        "meta": "predicted",
        "x": [work.tokens for work in works],
        "y": [fit.model.peak_bytes(work) / units.GIB for work in works],
        "hoverinfo": "skip",
        "line": {"color": COLOURS[1], "width": 2},
    }


def _memory_points(shapes: list[dict[str, Any]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": tr("measured"),
        "meta": "measured",
        "x": [shape["tokens"] for shape in shapes],
        "y": [shape["peak_bytes"] / units.GIB for shape in shapes],
        "text": [f"{shape_of(shape)}<br>{units.size(shape['peak_bytes'])}" for shape in shapes],
        "hoverinfo": "text",
        "marker": {"color": COLOURS[0], "symbol": "circle", "size": 8},
    }


def _limit(limit: tuple[float, str], least: int, most: int) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": limit[1],
        "meta": "limit",
        "x": [least, most],
        "y": [limit[0] / units.GIB] * 2,
        "hoverinfo": "skip",
        "line": {"color": COLOURS[4], "dash": "dash", "width": 2},
    }


def _upright(least: float, most: float) -> dict[str, Any]:
    title = {"text": "GiB"}
    if most < WIDE * least:
        return {"title": title, "rangemode": "tozero"}
    return {**log_ticks(least, most, lambda tick: f"{tick:g}"), "title": title}


def _note(fit: MemoryFit, limit: tuple[float, str] | None, length: int) -> str:
    line = tr("The line is the model's prediction for pairs of {length} tokens.", length=length)
    if limit is None:
        return line
    told = tr("Dashed line: {whose}, {size}.", whose=limit[1], size=units.size(round(limit[0])))
    room = fit.model.tokens_within(limit[0], length)
    if room >= NO_BUDGET:
        return f"{line} {told}"
    reached = tr(
        "The model predicts that steps of {tokens} tokens reach it.", tokens=units.number(room)
    )
    return f"{line} {told} {reached}"
