"""A plan for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.tune.words import UNKNOWN, duration, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterable

Row = dict[str, Any]

ROUTINGS = {
    "tokens": "fewest outstanding tokens",
    "requests": "fewest outstanding requests",
    "random": "at random",
    "two": "lesser of two at random",
}


def print_plan(plan: Row) -> None:
    """The answer, and what it hangs on."""
    console, answer, asked = Console(), plan["answer"], plan["asked"]
    predicted = answer["predicted"]
    priced = answer["price_per_hour"] is not None
    console.print(Text(f"\n{plan['model']['model']} on {plan['model']['device']}", style="bold"))
    machines = f"{answer['machines']:,} machine" + ("s" if answer["machines"] > 1 else "")
    if answer["workers"] != answer["machines"]:
        machines += f" with {answer['workers']:,} workers"
    console.print(
        f"[bold]{machines}[/bold] at {answer['token_budget']:,} tokens a step answer "
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
            f"Price: {number(answer['price_per_hour'])} an hour, "
            f"{number(answer['price_per_million'])} a million requests."
        )
    console.print(_budgets(plan["budgets"]))
    console.print(_sensitivity(plan, priced=priced))
    console.print(_routings(plan["routings"]))
    if plan["day"] is not None:
        _print_day(console, plan["day"])
    for note in plan["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _count(machines: int | None) -> str:
    return UNKNOWN if machines is None else f"{machines:,}"


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)


def _budgets(rows: Iterable[Row]) -> Table:
    table = _table(
        "By token budget (–: never, or more machines)",
        ("Tokens a step", "Machines", "P99", "A machine's most"),
    )
    for row in rows:
        table.add_row(
            f"{row['token_budget']:,}",
            _count(row["machines"]),
            _seconds(row["p99_s"]),
            f"{number(row['machine_rate'])}/s",
        )
    return table


def _sensitivity(plan: Row, *, priced: bool) -> Table:
    columns = ["If it turns out otherwise", "Machines", "P99", *(["Price/h"] if priced else [])]
    table = _table("Sensitivity", columns)
    named = [(f"rate {number(row['rate'])}/s", row) for row in plan["rates"]]
    named += [(f"texts × {row['lengths']:g}", row) for row in plan["lengths"]]
    for name, row in named:
        price = row["price_per_hour"]
        cells = [UNKNOWN if price is None else number(price)] if priced else []
        table.add_row(name, _count(row["machines"]), _seconds(row["p99_s"]), *cells)
    return table


def _routings(rows: Iterable[Row]) -> Table:
    table = _table("The same machines by routing", ("Routing", "Meets", "P99", "Up to"))
    for row in rows:
        table.add_row(
            ROUTINGS[row["routing"]],
            "yes" if row["meets"] else "no",
            _seconds(row["p99_s"]),
            f"{number(row['bears_rate'])}/s",
        )
    return table


def _print_day(console: Console, day: Row) -> None:
    console.print(Text("A day", style="bold"))
    console.print(
        f"{day['requests']:,} requests ({day['simulated']:,} simulated): "
        f"P50 {_seconds(day['p50_s'])}, P95 {_seconds(day['p95_s'])}, "
        f"P99 {_seconds(day['p99_s'])}; "
        f"{percent(day['missed'], 2)} miss the goal, mean load {percent(day['utilisation'])}."
    )
    if day["overfull_s"]:
        console.print(
            Text(
                f"In {number(day['overfull_s'] / 3600)} hours the queue only grows.", style="yellow"
            )
        )
