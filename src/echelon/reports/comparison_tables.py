"""Tables of a comparison, for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.messages import N_, listed, tr, translated, units
from echelon.reports import wording
from echelon.reports.ratio import factor
from echelon.reports.statistics import TIE

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "base_s": N_("Each step"),
    "token_s": N_("Each token"),
    "square_s": N_("Each squared token"),
    "beyond_s": N_("Each token beyond the knee"),
}

MEMORY_COEFFICIENTS = {
    "fixed_bytes": N_("Fixed"),
    "token_bytes": N_("Each token"),
    "square_bytes": N_("Each squared token"),
}


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


def best(found: Row) -> Grid:
    """The best batch size for each number of pairs, and the chosen setting."""
    rows = [_best(row, tr("best batch size")) for row in found["best"]]
    rows += [_best(row, tr("chosen")) for row in found["chosen"]]
    return Grid(
        "best",
        tr("Best batch size and chosen setting"),
        (tr("Pairs"), tr("Step"), tr("Throughput B/A"), tr("Latency B/A"), "A", "B"),
        rows,
        note=tr(SPREAD, tie=units.percent(TIE)),
    )


SPREAD = N_(
    "±: the larger half of the median's confidence interval; n=…: the number of runs, if they "
    "are too few for an interval. Ratios are B divided by A, with an interval if both have one; "
    "ratios within {tie} of 1 are a tie."
)


def precisions(found: Row) -> Grid:
    """Speed and agreement of each precision."""
    return Grid(
        "precisions",
        tr("Precisions"),
        (
            tr("Precision"),
            tr("Tokens/s of A"),
            tr("Tokens/s of B"),
            tr("Speed B/A"),
            tr("Agreement of A"),
            tr("Agreement of B"),
        ),
        [
            [
                row["precision"],
                *(_cell(row[side], lambda p: units.number(p["tokens_per_s"])) for side in "ab"),
                factor(row["speed"], timed=False),
                *(_cell(row[side], _agreement) for side in "ab"),
            ]
            for row in found["precisions"]
        ],
        note=tr(
            "Agreement with fp32: Kendall τ, overlap of the top 10, and whether the precision "
            "passed. Each speed was timed once, so it has no interval."
        ),
    )


def cost(found: Row) -> Grid:
    """Cost coefficients and predicted step times."""
    models = found["cost"]
    rows = _model_rows(models, COST_COEFFICIENTS, _short_time)
    rows += [
        [
            _step(row),
            _cell(row["a_s"], units.duration),
            _cell(row["b_s"], units.duration),
            factor(row["time"], timed=False),
        ]
        for row in models["steps"]
    ]
    return Grid(
        "cost",
        tr("Cost model"),
        (tr("Time for"), "A", "B", "B/A"),
        rows,
        note=tr(
            "Predicted by each profile's cost model, for pairs of equal length. The error is "
            "that on shapes not used for the fit."
        ),
    )


def memory(found: Row) -> Grid:
    """Memory coefficients and predicted peaks."""
    models = found["memory"]
    rows = _model_rows(models, MEMORY_COEFFICIENTS, _bytes)
    rows += [
        [
            _step(row),
            _bytes(row["a_bytes"]),
            _bytes(row["b_bytes"]),
            factor(row["size"], timed=False),
        ]
        for row in models["steps"]
    ]
    return Grid(
        "memory",
        tr("Memory"),
        (tr("Memory for"), "A", "B", "B/A"),
        rows,
        note=tr(
            "Predicted by each profile's memory model, including the reranker: memory of the "
            "process on CPU, of the GPU on CUDA."
        ),
    )


def points(found: Row) -> Grid:
    """All points of both profiles."""
    return Grid(
        "points",
        tr("All points"),
        (
            tr("Pairs"),
            tr("Step"),
            tr("Throughput B/A"),
            "A",
            "B",
            tr("Peak memory of A"),
            tr("Peak memory of B"),
        ),
        [
            [
                str(row["pairs"]),
                wording.step_of(row["a"] or row["b"]),
                factor(row["throughput"]),
                *(_cell(row[side], _number) for side in "ab"),
                *(_cell(row[side], lambda n: units.size(n["peak_bytes"])) for side in "ab"),
            ]
            for row in found["points"]
        ],
        note=tr(SPREAD, tie=units.percent(TIE)),
    )


# Cells.


def _cell(value: Any, text: Callable[[Any], str]) -> str:
    return units.UNKNOWN if value is None else text(value)


def _values(name: str, title: str, rows: list[Row]) -> Grid:
    shown = [row for row in rows if row["a"] is not None or row["b"] is not None]
    return Grid(
        name,
        title,
        ("", "A", "B"),
        [[_name(row["name"]), *(_value(row["name"], row[side]) for side in "ab")] for row in shown],
        {index for index, row in enumerate(shown) if row["differs"]},
        tr("≠ marks rows that differ."),
    )


def _name(name: str) -> str:
    return tr(NAMES.get(name, name.removeprefix("versions.")))


def _value(name: str, value: Any) -> str:
    if value is None:
        return units.UNKNOWN
    if name == "machine.memory_bytes":
        return units.size(value)
    return f"{value:,}" if isinstance(value, int | float) else translated(value)


def _best(row: Row, how: str) -> list[str]:
    return [
        str(row["pairs"]),
        how,
        factor(row["throughput"]),
        factor(row["latency"]),
        *(_cell(row[side], _stepped) for side in "ab"),
    ]


def _stepped(number: Row) -> str:
    return tr("{what}: {found}", what=wording.step_of(number), found=_number(number))


def _number(number: Row) -> str:
    """A point's latency and throughput, or its status."""
    if number["latency_s"] is None:
        return wording.missing(number["status"])
    ends = {"median": number["latency_s"], "low": number["low_s"], "high": number["high_s"]}
    latency = wording.latency({"latency_s": ends, "samples": number["samples"]})
    return listed([latency, wording.rate(number["pairs_per_s"])])


def _agreement(row: Row) -> str:
    passed = tr("passed") if row["passed"] else tr("failed")
    return listed([f"τ {row['tau']:.4f}", units.percent(row["overlap"], 1), passed])


def _model_rows(models: Row, names: dict[str, str], text: Callable[[Any], str]) -> list[list[str]]:
    """Both models' coefficients and errors; no rows where neither profile has a model."""
    sides = [models["a"], models["b"]]
    if not any(sides):
        return []
    rows = [
        [tr(title), *(_cell(side and side[name], text) for side in sides), units.UNKNOWN]
        for name, title in names.items()
    ]
    errors = {"error_median": N_("Error, median"), "error_p90": N_("Error, P90")}
    return rows + [
        [
            tr(title),
            *(_cell(side and side[name], units.percent) for side in sides),
            units.UNKNOWN,
        ]
        for name, title in errors.items()
    ]


def _step(row: Row) -> str:
    return tr(
        "{pairs} of {tokens} tokens each", pairs=wording.pairs(row["pairs"]), tokens=row["tokens"]
    )


def _short_time(seconds: float) -> str:
    if seconds and seconds < MICROSECOND:
        return f"{units.number(seconds * 1e9)}{units.SPACE}ns"
    small = seconds and seconds < MILLISECOND
    return f"{units.number(seconds * 1e6)}{units.SPACE}µs" if small else units.duration(seconds)


MICROSECOND, MILLISECOND = 1e-6, 1e-3


def _bytes(count: float | None) -> str:
    """Bytes in the largest unit with a number of at least 1."""
    if count is None:
        return units.UNKNOWN
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{units.number(count / unit)}{units.SPACE}{name}"
    return f"{units.number(count)}{units.SPACE}B"


SHOWN = (keys, settings, best, precisions, cost, memory)
"""Tables of the terminal; all points are on the page and in the JSON."""


def print_comparison(found: dict[str, Any]) -> None:
    """Print the headline, the tables and the notes."""
    console = Console()
    for name in "ab":
        side = found[name]
        about = f"{name.upper()}: {side['file']}: {side['key']['model']} on "
        console.print(Text(f"{about}{side['key']['device_name']}"))
    console.print(Text(f"\n{found['verdict']}\n", style="bold"))
    for make in SHOWN:
        grid = make(found)
        if grid.rows:
            console.print(_table(grid))
    for note in found["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))


def _table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", header_style="bold")
    for column in grid.columns:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(grid.rows):
        mark = "≠ " if index in grid.marked else ""
        # Text, not markup: a file's or model's name may hold square brackets.
        cells = [Text(mark + row[0]), *map(Text, row[1:])]
        table.add_row(*cells, style="cyan" if mark else None)
    return table
