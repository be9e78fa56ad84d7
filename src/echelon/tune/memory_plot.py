"""The report's chart of memory against the tokens of a step, with the limit. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.scheduling.cost_model import Work
from echelon.scheduling.packing import NO_BUDGET
from echelon.tune import words
from echelon.tune.lang import tr
from echelon.tune.model_plots import shape_of
from echelon.tune.plots import COLOURS, LINES, PAPER, WIDE, Chart
from echelon.tune.ticks import log_ticks
from echelon.tuning.fit import CostFit, MemoryFit

if TYPE_CHECKING:
    from echelon.profile import Profile

    Trace = dict[str, Any]

POINTS = 24
"""Of the model's line, evenly in the logarithm of tokens."""

TYPICAL = 128
"""Tokens of the model's pairs where the profile does not say how long the texts' are."""


def limit_of(profile: Profile) -> tuple[float, str] | None:
    """Bytes that a step may not pass, and whose limit that is; None where it is not known."""
    asked = (profile.scenario or {}).get("asked", {}).get("memory_limit_bytes")
    if asked is not None:
        return float(asked), tr("limit asked for")
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
    traces = [_line(fit, sizes[0], sizes[-1], length), _points(shapes)]
    limit = limit_of(profile)
    if limit is not None:
        traces.append(_limit(limit, sizes[0], sizes[-1]))
    heights = [height for trace in traces for height in trace["y"]]
    return [
        Chart(
            name="memory-tokens",
            title=tr("Peak memory against tokens of a step"),
            note=_note(fit, limit, length),
            figure={
                "data": traces,
                "layout": {
                    **PAPER,
                    "xaxis": {
                        **log_ticks(sizes[0], sizes[-1], lambda tick: f"{tick:,.0f}"),
                        "title": {"text": tr("Tokens of a step")},
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
        "y": [fit.model.peak_bytes(work) / words.GIB for work in works],
        "hoverinfo": "skip",
        "line": {"color": COLOURS[1], "width": 2},
    }


def _points(shapes: list[dict[str, Any]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": tr("measured"),
        "meta": "measured",
        "x": [shape["tokens"] for shape in shapes],
        "y": [shape["peak_bytes"] / words.GIB for shape in shapes],
        "text": [f"{shape_of(shape)}<br>{words.size(shape['peak_bytes'])}" for shape in shapes],
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
        "y": [limit[0] / words.GIB] * 2,
        "hoverinfo": "skip",
        "line": {"color": COLOURS[4], "dash": "dash", "width": 2},
    }


def _upright(least: float, most: float) -> dict[str, Any]:
    title = {"text": "GiB"}
    if most < WIDE * least:
        return {"title": title, "rangemode": "tozero"}
    return {**log_ticks(least, most, lambda tick: f"{tick:g}"), "title": title}


def _note(fit: MemoryFit, limit: tuple[float, str] | None, length: int) -> str:
    line = tr("The line is the model, for pairs of {length} tokens.", length=length)
    if limit is None:
        return line
    told = tr("Dashed: {whose}, {size}.", whose=limit[1], size=words.size(round(limit[0])))
    room = fit.model.tokens_within(limit[0], length)
    if room >= NO_BUDGET:
        return f"{line} {told}"
    reached = tr("By the model, steps of {tokens} tokens reach it.", tokens=words.number(room))
    return f"{line} {told} {reached}"
