"""The report's charts of the fitted models: predicted against measured. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.plan.cost import Work
from echelon.tune import words
from echelon.tune.fit import CostFit, MemoryFit
from echelon.tune.plots import COLOURS, LINES, Chart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.tune.profile import Profile

    Shape = dict[str, Any]

UNSEEN = {False: ("fitted", COLOURS[0], "circle"), True: ("unseen", COLOURS[1], "square")}
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
    note = (
        "Each point is a step of another shape; on the line, the model is right. Error: "
        f"{fit.error.words}. Repeats differ by {words.percent(fit.spread, 1)}."
    )
    pairs = [(shape, shape["seconds"], shape["predicted_s"]) for shape in fit.shapes]
    traces = [_points(pairs, unseen=unseen, say=words.duration) for unseen in UNSEEN]
    axis = {"type": "log", "dtick": 1, "tickformat": "~s", "ticksuffix": "s"}
    return Chart(
        name="predicted-time",
        title="Step time, predicted against measured",
        note=note,
        figure=_figure(pairs, [t for t in traces if t["x"]], axis),
    )


def _memory_chart(fit: MemoryFit, shapes: Sequence[Shape]) -> Chart:
    gib = float(words.GIB)
    pairs = [
        (
            shape,
            shape["peak_bytes"] / gib,
            fit.model.peak_bytes(Work(1, shape["tokens"], shape["squares"])) / gib,
        )
        for shape in shapes
    ]
    traces = [
        _points(pairs, unseen=unseen, say=lambda value: words.size(round(value * gib)))
        for unseen in UNSEEN
    ]
    return Chart(
        name="predicted-memory",
        title="Peak memory, predicted against measured",
        note=f"In GiB, the model included. Error: {fit.error.words}.",
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
        "name": name,
        "meta": "predicted",
        "x": [measured for _, measured, _ in chosen],
        "y": [predicted for _, _, predicted in chosen],
        "text": [
            f"{shape['pairs']:,} pairs, {shape['tokens']:,} tokens:<br>"
            f"{say(predicted)} predicted, {say(measured)} measured"
            for shape, measured, predicted in chosen
        ],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 8},
    }


def _figure(
    pairs: Sequence[tuple[Shape, float, float]], traces: list[dict[str, Any]], axis: dict[str, Any]
) -> dict[str, Any]:
    ends = [min(min(row[1:]) for row in pairs), max(max(row[1:]) for row in pairs)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "as measured",
        "meta": "diagonal",
        "x": ends,
        "y": ends,
        "hoverinfo": "skip",
        "line": {"color": COLOURS[5], "dash": "dot", "width": 1.5},
    }
    return {
        "data": [line, *traces],
        "layout": {
            "autosize": True,
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "dragmode": False,
            "hovermode": "closest",
            "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": {**axis, "title": {"text": "Measured"}, **LINES},
            "yaxis": {**axis, "title": {"text": "Predicted"}, **LINES},
        },
    }
