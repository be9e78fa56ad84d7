"""A comparison of two profiles as tables, charts and one HTML page that needs no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.messages import N_, in_language, listed, tr, translated, units
from echelon.profile import write_text
from echelon.reports import fill, wording
from echelon.reports.compare import headline, notes
from echelon.reports.plots import (
    COLOURS,
    SYMBOLS,
    THROUGHPUT,
    UNITS,
    Chart,
    Pen,
    layout,
    title_of,
    upright,
)
from echelon.reports.statistics import TIE

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from echelon.reports.profile_view import ProfileView
    from echelon.reports.wording import Entry

Row = dict[str, Any]

NAMES = {
    "model": N_("Model"),
    "revision": N_("Revision"),
    "device": N_("Device"),
    "device_name": N_("Device name"),
    "precision": N_("Precision"),
    "machine.cpu": N_("Processor"),
    "machine.usable_cpus": N_("Usable cores"),
    "machine.memory_bytes": N_("Memory"),
    "machine.system": N_("System"),
    "machine.python": "Python",
    "data.name": N_("Texts"),
    "data.pairs": N_("Number of pairs in the texts"),
    "data.tokens.mean": N_("Tokens per pair, mean"),
    "data.tokens.max": N_("Tokens per pair, maximum"),
    "token_budget": N_("Token budget"),
    "batch_size": N_("Batch size"),
    "threads": N_("Threads"),
    "max_length": N_("Maximum length of a pair"),
    "learned_token_budget": N_("Token budget learned after running out of memory"),
}
"""Labels of keys and settings; library versions are labelled by the library's name."""

COST_COEFFICIENTS = {
    "base_s": N_("Fixed time of a step"),
    "token_s": N_("Each token"),
    "square_s": N_("Each squared token"),
    "beyond_s": N_("Each token beyond the knee"),
}

MEMORY_COEFFICIENTS = {
    "fixed_bytes": N_("Fixed"),
    "token_bytes": N_("Each token"),
    "square_bytes": N_("Each squared token"),
}

JUDGEMENTS = {
    "tie": N_("a tie"),
    "beyond": N_("beyond the variation between runs"),
    "within": N_("within the variation between runs"),
    "unknown": N_("no interval"),
}

SPREAD = N_(
    "±: the larger half of the median's confidence interval; n=…: the number of runs, if they "
    "are too few for an interval. Ratios are B divided by A, with an interval if both have one; "
    "ratios within {tie} of 1 are a tie."
)


@dataclass(frozen=True, slots=True)
class Grid:
    """One table; ``marked`` are the indices of rows that differ, ``note`` explains it."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    marked: set[int] = field(default_factory=set)
    note: str = ""


def keys(found: Row) -> Grid:
    """Model, machine and texts."""
    return _values("keys", tr("Compared profiles"), found["keys"])


def settings(found: Row) -> Grid:
    """Chosen settings."""
    return _values("settings", tr("Chosen settings"), found["settings"])


def _values(name: str, title: str, rows: list[Row]) -> Grid:
    shown = [row for row in rows if row["a"] is not None or row["b"] is not None]
    cells = []
    for row in shown:
        label = tr(NAMES.get(row["name"], row["name"].removeprefix("versions.")))
        text = units.size if row["name"] == "machine.memory_bytes" else _value
        cells.append([label, *_both(row, text)])
    marked = {index for index, row in enumerate(shown) if row["differs"]}
    return Grid(name, title, ("", "A", "B"), cells, marked, tr("≠ marks rows that differ."))


def best(found: Row) -> Grid:
    """The best batch size for each number of pairs, and the chosen setting."""
    columns = (tr("Pairs"), tr("Step"), tr("Throughput B/A"), tr("Latency B/A"), "A", "B")
    kinds = ((tr("best batch size"), found["best"]), (tr("chosen"), found["chosen"]))
    rows = []
    for kind, numbers in kinds:
        for row in numbers:
            ratios = [factor(row["throughput"]), factor(row["latency"])]
            rows.append([str(row["pairs"]), kind, *ratios, *_both(row, _point)])
    note = tr(SPREAD, tie=units.percent(TIE))
    return Grid("best", tr("Best batch size and chosen setting"), columns, rows, note=note)


def precisions(found: Row) -> Grid:
    """Speed and agreement of each precision."""
    columns = (
        tr("Precision"),
        *(tr("Tokens/s of A"), tr("Tokens/s of B"), tr("Speed B/A")),
        *(tr("Agreement of A"), tr("Agreement of B")),
    )
    rows = [
        [
            row["precision"],
            *_both(row, lambda precision: units.number(precision["tokens_per_s"])),
            factor(row["speed"], timed=False),
            *_both(row, _agreement),
        ]
        for row in found["precisions"]
    ]
    note = tr(
        "Agreement with fp32: Kendall τ, overlap of the top 10, and whether the precision "
        "passed. Each speed was timed once, so it has no interval."
    )
    return Grid("precisions", tr("Precisions"), columns, rows, note=note)


def cost(found: Row) -> Grid:
    """Cost coefficients and predicted step times."""
    rows = _coefficients(found["cost"], COST_COEFFICIENTS, _short_time)
    for step in found["cost"]["steps"]:
        times = [_cell(step[name], units.duration) for name in ("a_s", "b_s")]
        rows.append([_step(step), *times, factor(step["time"], timed=False)])
    note = tr(
        "Predicted by each profile's cost model, for pairs of equal length. The error is "
        "that on shapes not used for the fit."
    )
    return Grid("cost", tr("Cost model"), (tr("Time for"), "A", "B", "B/A"), rows, note=note)


def memory(found: Row) -> Grid:
    """Memory coefficients and predicted peaks."""
    rows = _coefficients(found["memory"], MEMORY_COEFFICIENTS, _bytes)
    for step in found["memory"]["steps"]:
        sizes = [_cell(step[name], _bytes) for name in ("a_bytes", "b_bytes")]
        rows.append([_step(step), *sizes, factor(step["size"], timed=False)])
    note = tr(
        "Predicted by each profile's memory model, including the reranker: memory of the "
        "process on CPU, of the GPU on CUDA."
    )
    return Grid("memory", tr("Memory"), (tr("Memory for"), "A", "B", "B/A"), rows, note=note)


def points(found: Row) -> Grid:
    """All points of both profiles."""
    columns = (
        *(tr("Pairs"), tr("Step"), tr("Throughput B/A"), "A", "B"),
        *(tr("Peak memory of A"), tr("Peak memory of B")),
    )
    rows = [
        [
            str(row["pairs"]),
            wording.step_of(row["a"] or row["b"]),
            factor(row["throughput"]),
            *_both(row, _numbers),
            *_both(row, lambda number: units.size(number["peak_bytes"])),
        ]
        for row in found["points"]
    ]
    note = tr(SPREAD, tie=units.percent(TIE))
    return Grid("points", tr("All points"), columns, rows, note=note)


GRIDS = (keys, settings, best, precisions, cost, memory)
"""Tables of the terminal and the page; all points are on the page only."""

# Cells.


def _cell(value: Any, text: Callable[[Any], str]) -> str:
    return units.UNKNOWN if value is None else text(value)


def _both(row: Row, text: Callable[[Any], str]) -> list[str]:
    """The cells of A and of B."""
    return [_cell(row["a"], text), _cell(row["b"], text)]


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else translated(value)


def _point(number: Row) -> str:
    return tr("{what}: {found}", what=wording.step_of(number), found=_numbers(number))


def _numbers(number: Row) -> str:
    """A point's latency and throughput, or its status."""
    if number["latency_s"] is None:
        return wording.missing(number["status"])
    ends = {"median": number["latency_s"], "low": number["low_s"], "high": number["high_s"]}
    latency = wording.latency({"latency_s": ends, "samples": number["samples"]})
    return listed([latency, wording.rate(number["pairs_per_s"])])


def _agreement(row: Row) -> str:
    passed = tr("passed") if row["passed"] else tr("failed")
    return listed([f"τ {row['tau']:.4f}", units.percent(row["overlap"], 1), passed])


def _coefficients(
    models: Row, labels: dict[str, str], text: Callable[[Any], str]
) -> list[list[str]]:
    """Both models' coefficients and errors; no rows where neither profile has a model."""
    if not (models["a"] or models["b"]):
        return []
    errors = {"error_median": N_("Error, median"), "error_p90": N_("Error, P90")}
    rows = []
    for name, label in (labels | errors).items():
        values = {which: models[which] and models[which][name] for which in "ab"}
        shown = _both(values, units.percent if name in errors else text)
        rows.append([tr(label), *shown, units.UNKNOWN])
    return rows


def _step(row: Row) -> str:
    pairs = wording.pairs(row["pairs"])
    return tr("{pairs} of {tokens} tokens each", pairs=pairs, tokens=row["tokens"])


def _short_time(seconds: float) -> str:
    """A time in ns or µs below 1 ms."""
    for limit, factor_, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs")):
        if 0 < seconds < limit:
            return f"{units.number(seconds * factor_)}{units.SPACE}{unit}"
    return units.duration(seconds)


def _bytes(count: float) -> str:
    """Bytes in the largest unit with a number of at least 1."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{units.number(count / unit)}{units.SPACE}{name}"
    return f"{units.number(count)}{units.SPACE}B"


def factor(ratio: Row | None, *, timed: bool = True) -> str:
    """A ratio with its interval and judgement; ``timed`` if its numbers can have intervals."""
    if ratio is None:
        return units.UNKNOWN
    shown = f"{units.number(ratio['value'])}×"
    if ratio["low"] is not None:
        low, high = units.number(ratio["low"]), units.number(ratio["high"])
        shown = tr("{value}, {low}–{high}", value=shown, low=low, high=high)
    if ratio["judgement"] == "unknown" and not timed:
        return shown
    meaning = tr(JUDGEMENTS[ratio["judgement"]])
    return tr("{value} ({certainty})", value=shown, certainty=meaning)


# Charts and page.

DASHES = ("solid", "dash")
"""Line styles of A and B, to distinguish them without colours."""


def overlays(a: ProfileView, b: ProfileView) -> list[Chart]:
    """A throughput chart by batch size and one by token budget, where there are points."""
    drawn = (_overlay([_known(a, unit), _known(b, unit)], unit) for unit in UNITS)
    return [chart for chart in drawn if chart is not None]


def _known(view: ProfileView, unit: str) -> list[Entry]:
    entries = (e for e in view.profile.points if e[unit] and wording.measured(e))
    return sorted(entries, key=lambda entry: (entry["pairs"], entry[unit]))


def _overlay(found: list[list[Entry]], unit: str) -> Chart | None:
    both = [entry for entries in found for entry in entries]
    if not both:
        return None
    counts = sorted({entry["pairs"] for entry in both})
    traces = [line for index in (0, 1) for line in _lines(found[index], index, counts, unit)]
    note = tr(
        "A is blue and solid, B is orange and dashed; each number of pairs has its own "
        "symbol. Sizes that were not measured are listed under All points."
    )
    axes = layout(unit, both, "y") | upright(THROUGHPUT, both, [])
    figure = {"data": traces, "layout": axes}
    return Chart(f"overlay-{unit}", title_of(THROUGHPUT, unit), note, figure)


def _lines(
    entries: list[Entry], index: int, counts: list[int], unit: str
) -> Iterable[dict[str, Any]]:
    """One line for each number of pairs; the profile sets its colour, the number its symbol."""
    looks = {n: (COLOURS[index], SYMBOLS[i % len(SYMBOLS)]) for i, n in enumerate(counts)}
    name = "AB"[index]
    for trace in Pen(THROUGHPUT, unit, looks).lines(entries):
        trace["name"] = tr("{side}, {line}", side=name, line=trace["name"])
        trace["text"] = [f"{name}: {text}" for text in trace["text"]]
        trace["line"]["dash"] = DASHES[index]
        yield trace


def write_page(
    a: ProfileView,
    b: ProfileView,
    found: Row,
    path: str | os.PathLike[str],
    *,
    lang: str | None = None,
) -> None:
    """Write the page, whole or not at all; ``found`` is the comparison of the two.

    Raises:
        InvalidInput: there is no such language.
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(a, b, found, lang=lang))


def render(a: ProfileView, b: ProfileView, found: Row, *, lang: str | None = None) -> str:
    """The page as HTML; arguments as in :func:`write_page`."""
    with in_language(lang):
        return fill("echelon.reports", "templates/compare.html.j2", _content(a, b, found))


def _content(a: ProfileView, b: ProfileView, found: Row) -> Row:
    drawn = overlays(a, b)
    return {
        "headline": headline(found),
        "sides": [_about(name, found[name]) for name in "ab"],
        "notes": notes(found),
        "first": [make(found) for make in GRIDS[:3]],
        "then": [make(found) for make in (*GRIDS[3:], points)],
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
    }


def _about(name: str, side: Row) -> Row:
    key = side["key"]
    device = {"name": key["device_name"], "device": key["device"], "precision": key["precision"]}
    return {
        "name": name.upper(),
        "file": side["file"],
        "model": str(key["model"]),
        "device": tr("{name} ({device}), {precision}", **device),
        "created": wording.when(str(side["created"])),
    }
