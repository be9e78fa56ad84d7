"""Tables on the terminal: rankings, profiles, comparisons, findings of `doctor`, and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.messages.units import UNKNOWN, duration, number, percent, size
from echelon.reports import wording
from echelon.reports.comparison_page import GRIDS, Grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.profile import Profile
    from echelon.types import Ranking

Row = dict[str, Any]

STYLES = {"held": "green", "missed": "bold red", "unvalidated": "yellow"}
"""Styles of the headline of a scenario, by its state."""

ROUTINGS = {
    "tokens": "worker with the fewest outstanding tokens",
    "requests": "worker with the fewest outstanding requests",
    "random": "random worker",
    "two": "the better of two random workers",
}


def print_ranking(ranking: Ranking) -> None:
    """Print the documents, best first."""
    if not ranking.results:
        Console().print("No documents, so nothing to rank.")
        return
    table = Table(box=None, header_style="bold")
    for column in ("#", "score", "logit"):
        table.add_column(column, justify="right")
    table.add_column("document", overflow="fold")
    for place, result in enumerate(ranking.results, 1):
        cut = f"  (cut by {result.truncated_tokens} tokens)" if result.truncated_tokens else ""
        # Text, not markup: a document may hold square brackets.
        document = Text(result.document + cut)
        table.add_row(str(place), f"{result.score:.4g}", f"{result.logit:+.3f}", document)
    Console().print(table)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table whose first column is text and the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(Text(f"Note: {note}", style="yellow"))


def print_profile(profile: Profile) -> None:
    """Print precisions, best batch sizes and the recommended settings."""
    console = Console()
    console.print(Text(f"\n{profile.key.model} on {profile.key.device_name}", style="bold"))
    if profile.precisions:
        console.print(_precision_table(profile))
    console.print(_best_table(profile))
    console.print(_scenario_table(profile))
    chosen = profile.settings
    best = wording.step(chosen.batch_size, chosen.token_budget)
    threads = f", threads {chosen.threads}" if chosen.threads else ""
    console.print(f"\nBest step: [bold]{best}[/bold], precision {chosen.precision}{threads}")
    _print_notes(console, profile.warnings)


def _precision_table(profile: Profile) -> Table:
    columns = ("Precision", "Tokens/s", "Kendall τ", "Top-10 overlap", "Passed")
    rows = [
        (
            wording.precision(row),
            number(row["tokens_per_s"]),
            f"{row['tau']:.4f}",
            f"{row['overlap']:.3f}",
            "yes" if row["passed"] else "no",
        )
        for row in profile.precisions
    ]
    return _table("Precisions compared with fp32", columns, rows)


def _best_table(profile: Profile) -> Table:
    rows = [
        (
            str(entry["pairs"]),
            str(entry["batch_size"]),
            f"{duration(entry['latency_s']['median'])} {wording.spread(entry)}",
            number(entry["pairs_per_s"]),
        )
        for entry in profile.best
    ]
    return _table("Best batch size", ("Pairs", "Best batch size", "Latency", "Pairs/s"), rows)


def _scenario_table(profile: Profile) -> Table:
    columns = ("Scenario", "Documents", "Step", "Pairs/s", "Peak memory")
    rows = [
        (
            wording.TITLES[entry["name"]],
            entry["documents"],
            wording.step_of(entry),
            number(entry["pairs_per_s"]),
            size(entry["peak_bytes"]),
        )
        for entry in profile.situations
    ]
    return _table("Recommended settings", columns, rows)


def print_scenario(profile: Profile) -> None:
    """Print the settings, the predicted and measured metrics, and the notes."""
    shown = wording.scenario_summary(profile)
    if shown is None:
        return
    console = Console()
    console.print(Text(f"\n{shown['title']}: {shown['asked']}", style="bold"))
    for label, value in (*shown["settings"], ("Ranking accuracy", shown["accuracy"])):
        console.print(Text(f"  {label:24} {value}"))
    console.print(_table("", ("", "Predicted", "Measured", "Difference"), shown["rows"]))
    console.print(Text(shown["headline"], style=STYLES[shown["state"]]))
    _print_notes(console, shown["notes"])


def print_comparison(found: Row) -> None:
    """Print the headline, the tables and the notes."""
    console = Console()
    for name in "ab":
        side = found[name]
        about = f"{name.upper()}: {side['file']}: {side['key']['model']} on "
        console.print(Text(f"{about}{side['key']['device_name']}"))
    console.print(Text(f"\n{found['verdict']}\n", style="bold"))
    for make in GRIDS:
        grid = make(found)
        if grid.rows:
            console.print(_grid_table(grid))
    _print_notes(console, found["notes"])


def _grid_table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", header_style="bold")
    for column in grid.columns:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(grid.rows):
        mark = "≠ " if index in grid.marked else ""
        # Text, not markup: a file's or model's name may hold square brackets.
        cells = [Text(mark + row[0]), *map(Text, row[1:])]
        table.add_row(*cells, style="cyan" if mark else None)
    return table


def print_findings(findings: dict[str, Any]) -> None:
    """Print the findings of ``echelon doctor``."""
    console = Console()
    for section in ("machine", "software", "will_use"):
        console.print(Text(section.replace("_", " ").capitalize(), style="bold"))
        for name, value in findings[section].items():
            console.print(Text(f"  {name.replace('_', ' '):18} {_plain(value)}"))
    console.print(Text("What would make it faster", style="bold"))
    for advice in findings["advice"] or ["Nothing found: run `echelon tune MODEL`."]:
        console.print(Text(f"  - {advice}"))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, int) and value > 2**24:
        return size(value)
    return "not installed" if value is None else str(value)


def print_plan(plan: Row) -> None:
    """Print the answer, then what it depends on."""
    console, answer, asked = Console(), plan["answer"], plan["asked"]
    predicted = answer["predicted"]
    priced = answer["price_per_hour"] is not None
    console.print(Text(f"\n{plan['model']['model']} on {plan['model']['device']}", style="bold"))
    machines = f"{answer['machines']:,} machine" + ("s" if answer["machines"] > 1 else "")
    if answer["workers"] != answer["machines"]:
        machines += f" with {answer['workers']:,} workers"
    console.print(
        f"[bold]{machines}[/bold] at {answer['token_budget']:,} tokens per step answer "
        f"{number(asked['rate'])} requests/s."
    )
    console.print(
        f"Predicted: P50 {duration(predicted['p50_s'])}, P95 {duration(predicted['p95_s'])}, "
        f"P99 {duration(predicted['p99_s'])} (goal {duration(asked['slo_p99_s'])}); "
        f"load {percent(answer['load'])}."
    )
    console.print(
        f"Headroom: up to {number(answer['bears_rate'])} requests/s "
        f"(+{percent(answer['headroom'])}) meet the goal."
    )
    if priced:
        console.print(
            f"Price: {number(answer['price_per_hour'])} per hour, "
            f"{number(answer['price_per_million'])} per million requests."
        )
    console.print(_budgets(plan["budgets"]))
    console.print(_sensitivity(plan, priced=priced))
    console.print(_routings(plan["routings"]))
    if plan["day"] is not None:
        _print_day(console, plan["day"])
    _print_notes(console, plan["notes"])


def _known(value: float | None, text: Callable[[float], str] = duration) -> str:
    return UNKNOWN if value is None else text(value)


def _budgets(rows: Iterable[Row]) -> Table:
    title = "By token budget (–: the goal cannot be met)"
    columns = ("Tokens per step", "Machines", "P99", "Highest rate of a machine")
    cells = [
        (
            f"{row['token_budget']:,}",
            _known(row["machines"], "{:,}".format),
            _known(row["p99_s"]),
            f"{number(row['machine_rate'])}/s",
        )
        for row in rows
    ]
    return _table(title, columns, cells)


def _sensitivity(plan: Row, *, priced: bool) -> Table:
    columns = ["If the workload differs", "Machines", "P99", *(["Price/h"] if priced else [])]
    named = [(f"rate {number(row['rate'])}/s", row) for row in plan["rates"]]
    named += [(f"texts × {row['lengths']:g}", row) for row in plan["lengths"]]
    rows = []
    for name, row in named:
        cells = [_known(row["price_per_hour"], number)] if priced else []
        rows.append([name, _known(row["machines"], "{:,}".format), _known(row["p99_s"]), *cells])
    return _table("Sensitivity", columns, rows)


def _routings(rows: Iterable[Row]) -> Table:
    columns = ("Routing", "Meets the goal", "P99", "Highest rate")
    cells = [
        (
            ROUTINGS[row["routing"]],
            "yes" if row["meets"] else "no",
            _known(row["p99_s"]),
            f"{number(row['bears_rate'])}/s",
        )
        for row in rows
    ]
    return _table("The same machines by routing", columns, cells)


def _print_day(console: Console, day: Row) -> None:
    console.print(Text("A day", style="bold"))
    console.print(
        f"{day['requests']:,} requests ({day['simulated']:,} simulated): "
        f"P50 {_known(day['p50_s'])}, P95 {_known(day['p95_s'])}, "
        f"P99 {_known(day['p99_s'])}; "
        f"{percent(day['missed'], 2)} miss the goal, mean load {percent(day['utilisation'])}."
    )
    if day["overfull_s"]:
        hours = number(day["overfull_s"] / 3600)
        console.print(Text(f"In {hours} hours the queue keeps growing.", style="yellow"))
