"""A comparison as tables of words, for the terminal and the page alike. Pure.

A comparison for people at a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.messages import N_, listed, tr, translated
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
    "device_name": N_("Device's name"),
    "precision": N_("Precision"),
    "machine.cpu": N_("Processor"),
    "machine.usable_cpus": N_("Usable cores"),
    "machine.memory_bytes": N_("Memory"),
    "machine.system": N_("System"),
    "machine.python": "Python",
    "data.name": N_("Texts"),
    "data.pairs": N_("Pairs in them"),
    "data.tokens.mean": N_("Tokens a pair, mean"),
    "data.tokens.max": N_("Tokens a pair, longest"),
    "token_budget": N_("Token budget"),
    "batch_size": N_("Batch size"),
    "threads": N_("Threads"),
    "max_length": N_("Longest pair"),
    "learned_token_budget": N_("Budget that memory taught"),
}
"""Keys and settings for people; a library's version keeps its own name."""

PRICES = {
    "base_s": N_("An empty step"),
    "token_s": N_("A token"),
    "square_s": N_("A squared token"),
    "beyond_s": N_("A token beyond the knee"),
}

SIZES = {
    "fixed_bytes": N_("Without any step"),
    "token_bytes": N_("A token"),
    "square_bytes": N_("A squared token"),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """One table.

    Attributes:
        name: id in the page.
        title: heading.
        columns: headings of the columns.
        rows: cells of each row.
        marked: indices of the rows that differ.
        note: how to read it.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    marked: set[int] = field(default_factory=set)
    note: str = ""


def keys(found: Row) -> Grid:
    """What was measured."""
    return _values("keys", tr("What was compared"), found["keys"])


def settings(found: Row) -> Grid:
    """What tuning chose."""
    return _values("settings", tr("Chosen settings"), found["settings"])


def best(found: Row) -> Grid:
    """The best batch for each number of pairs, and the chosen setting."""
    rows = [_best(row, tr("best batch")) for row in found["best"]]
    rows += [_best(row, tr("chosen")) for row in found["chosen"]]
    return Grid(
        "best",
        tr("Best batch, and the chosen setting"),
        (tr("Pairs"), tr("Step"), tr("Throughput B/A"), tr("Latency B/A"), "A", "B"),
        rows,
        note=tr(SPREAD, tie=wording.percent(TIE)),
    )


SPREAD = N_(
    "± is the farther end of the median's interval, n=… the number of runs where they are too few "
    "for one. A ratio is B over A, with its interval where both have one; within "
    "{tie} is a tie."
)


def precisions(found: Row) -> Grid:
    """Speed and agreement of each precision."""
    return Grid(
        "precisions",
        tr("Precisions"),
        (
            tr("Precision"),
            tr("A tokens/s"),
            tr("B tokens/s"),
            tr("Speed B/A"),
            tr("A agreement"),
            tr("B agreement"),
        ),
        [
            [
                row["precision"],
                *(_cell(row[side], lambda p: wording.number(p["tokens_per_s"])) for side in "ab"),
                factor(row["speed"], timed=False),
                *(_cell(row[side], _agreement) for side in "ab"),
            ]
            for row in found["precisions"]
        ],
        note=tr(
            "Agreement with fp32: Kendall τ, overlap of the top 10, and whether it may serve. "
            "Each speed is one timed pass, so it has no interval."
        ),
    )


def cost(found: Row) -> Grid:
    """Prices of steps, and what steps take by them."""
    models = found["cost"]
    rows = _model_rows(models, PRICES, _price)
    rows += [
        [
            _step(row),
            _cell(row["a_s"], wording.duration),
            _cell(row["b_s"], wording.duration),
            factor(row["time"], timed=False),
        ]
        for row in models["steps"]
    ]
    return Grid(
        "cost",
        tr("Cost model"),
        (tr("Time of"), "A", "B", "B/A"),
        rows,
        note=tr(
            "Predicted by each side's cost model, for pairs of one length. Error: on shapes that "
            "the model has not seen."
        ),
    )


def memory(found: Row) -> Grid:
    """What steps need."""
    models = found["memory"]
    rows = _model_rows(models, SIZES, _bytes)
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
        (tr("Memory of"), "A", "B", "B/A"),
        rows,
        note=tr(
            "Of the process on CPU, of the GPU on CUDA, the model included; by each side's memory "
            "model."
        ),
    )


def points(found: Row) -> Grid:
    """Every point that either side measured."""
    return Grid(
        "points",
        tr("All points"),
        (
            tr("Pairs"),
            tr("Step"),
            tr("Throughput B/A"),
            "A",
            "B",
            tr("A peak memory"),
            tr("B peak memory"),
        ),
        [
            [
                str(row["pairs"]),
                wording.step_of(row["a"] or row["b"]),
                factor(row["throughput"]),
                *(_cell(row[side], _number) for side in "ab"),
                *(_cell(row[side], lambda n: wording.size(n["peak_bytes"])) for side in "ab"),
            ]
            for row in found["points"]
        ],
        note=tr(SPREAD, tie=wording.percent(TIE)),
    )


# Cells.


def _cell(value: Any, say: Callable[[Any], str]) -> str:
    return wording.UNKNOWN if value is None else say(value)


def _values(name: str, title: str, rows: list[Row]) -> Grid:
    shown = [row for row in rows if row["a"] is not None or row["b"] is not None]
    return Grid(
        name,
        title,
        ("", "A", "B"),
        [[_name(row["name"]), *(_value(row["name"], row[side]) for side in "ab")] for row in shown],
        {index for index, row in enumerate(shown) if row["differs"]},
        tr("≠ marks what differs."),
    )


def _name(name: str) -> str:
    return tr(NAMES.get(name, name.removeprefix("versions.")))


def _value(name: str, value: Any) -> str:
    if value is None:
        return wording.UNKNOWN
    if name == "machine.memory_bytes":
        return wording.size(value)
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
    """A point's latency and throughput, or why there are none."""
    if number["latency_s"] is None:
        return wording.missing(number["status"])
    ends = {"median": number["latency_s"], "low": number["low_s"], "high": number["high_s"]}
    latency = wording.latency({"latency_s": ends, "samples": number["samples"]})
    return listed([latency, wording.rate(number["pairs_per_s"])])


def _agreement(row: Row) -> str:
    passed = tr("passed") if row["passed"] else tr("failed")
    return listed([f"τ {row['tau']:.4f}", wording.percent(row["overlap"], 1), passed])


def _model_rows(models: Row, names: dict[str, str], say: Callable[[Any], str]) -> list[list[str]]:
    """A model's numbers on both sides, then its errors; none where neither side has one."""
    sides = [models["a"], models["b"]]
    if not any(sides):
        return []
    rows = [
        [tr(title), *(_cell(side and side[name], say) for side in sides), wording.UNKNOWN]
        for name, title in names.items()
    ]
    errors = {"error_median": N_("Error, median"), "error_p90": N_("Error, P90")}
    return rows + [
        [
            tr(title),
            *(_cell(side and side[name], wording.percent) for side in sides),
            wording.UNKNOWN,
        ]
        for name, title in errors.items()
    ]


def _step(row: Row) -> str:
    return tr("{pairs} of {tokens} tokens", pairs=wording.pairs(row["pairs"]), tokens=row["tokens"])


def _price(seconds: float) -> str:
    if seconds and seconds < MICROSECOND:
        return f"{wording.number(seconds * 1e9)}{wording.SPACE}ns"
    small = seconds and seconds < MILLISECOND
    return (
        f"{wording.number(seconds * 1e6)}{wording.SPACE}µs" if small else wording.duration(seconds)
    )


MICROSECOND, MILLISECOND = 1e-6, 1e-3


def _bytes(count: float | None) -> str:
    """In the unit that suits: a model's numbers lie far apart."""
    if count is None:
        return wording.UNKNOWN
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{wording.number(count / unit)}{wording.SPACE}{name}"
    return f"{wording.number(count)}{wording.SPACE}B"


SHOWN = (keys, settings, best, precisions, cost, memory)
"""All but every single point: those are on the page and in the JSON."""


def print_comparison(found: dict[str, Any]) -> None:
    """The verdict, then the tables."""
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
