"""The report's charts of the fitted models: predicted against measured. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.scheduling.cost_model import Work
from echelon.tune import words
from echelon.tune.lang import listed, mark, told, tr
from echelon.tune.plots import COLOURS, LINES, PAPER, Chart
from echelon.tuning.fit import CostFit, MemoryFit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile

    Shape = dict[str, Any]

UNSEEN = {
    False: (mark("fitted"), COLOURS[0], "circle"),
    True: (mark("unseen"), COLOURS[1], "square"),
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
        "Each point is a step of another shape; on the line, the model is right. Error: {error}. "
        "Repeats differ by {spread}.",
        error=told(fit.error.words),
        spread=words.percent(fit.spread, 1),
    )
    pairs = [(shape, shape["seconds"], shape["predicted_s"]) for shape in fit.shapes]
    traces = [_points(pairs, unseen=unseen, say=words.duration) for unseen in UNSEEN]
    axis = {"type": "log", "dtick": 1, "tickformat": "~s", "ticksuffix": "s"}
    return Chart(
        name="predicted-time",
        title=tr("Step time, predicted against measured"),
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
        title=tr("Peak memory, predicted against measured"),
        note=tr("In GiB, the model included. Error: {error}.", error=told(fit.error.words)),
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
    return listed([words.pairs(shape["pairs"]), words.tokens(shape["tokens"])])


def _figure(
    pairs: Sequence[tuple[Shape, float, float]], traces: list[dict[str, Any]], axis: dict[str, Any]
) -> dict[str, Any]:
    ends = [min(min(row[1:]) for row in pairs), max(max(row[1:]) for row in pairs)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": tr("as measured"),
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
