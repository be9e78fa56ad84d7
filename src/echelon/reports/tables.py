"""Tables on the terminal: rankings, profiles, comparisons, findings of `doctor`, and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from echelon.messages import N_, listed, tr, translated
from echelon.messages.units import UNKNOWN, duration, number, percent, size
from echelon.reports import wording
from echelon.reports.comparison_page import GRIDS, Grid
from echelon.reports.profile_view import rivals
from echelon.reports.terminal import WIDE, open_console, say, say_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from echelon.profile import Profile
    from echelon.types import RankedDocument, Ranking

Row = dict[str, Any]

STYLES = {"held": "green", "missed": "bold red", "unvalidated": "yellow"}
"""Styles of the headline of a scenario, by its state."""

ROUTINGS = {
    "tokens": N_("worker with the fewest outstanding tokens"),
    "requests": N_("worker with the fewest outstanding requests"),
    "random": N_("random worker"),
    "two": N_("the better of two random workers"),
}

WILL_USE = {
    "runtime": N_("Runtime"),
    "device": N_("Device"),
    "device_name": N_("Name"),
    "precision": N_("Precision"),
    "precisions_to_tune": N_("Precisions to compare"),
    "threads": N_("Threads"),
    "kernels": N_("Compiled kernels"),
}
"""What ``echelon doctor`` calls what Echelon will use."""


def print_ranking(ranking: Ranking) -> None:
    """Print the documents, best first; each is one line where there is no terminal."""
    console = open_console()
    columns = ("#", tr("score"), tr("logit"), tr("document"))
    rows = [_ranked(place, result) for place, result in enumerate(ranking.results, 1)]
    if console.width == WIDE:  # a table would fill every line up to the longest
        for *cells, document in (columns, *rows):
            click.echo("{:>3} {:>9} {:>8}  ".format(*cells) + document)
        return
    table = Table(box=None, header_style="bold")
    for column in columns[:-1]:
        table.add_column(column, justify="right")
    table.add_column(columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a document may hold square brackets
    console.print(table)


def _ranked(place: int, result: RankedDocument) -> tuple[str, str, str, str]:
    cut = tr("cut by {count} tokens", count=result.truncated_tokens)
    document = result.document + (f"  ({cut})" if result.truncated_tokens else "")
    return str(place), f"{result.score:.4g}", f"{result.logit:+.3f}", document


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table whose first column is text, never folded, and the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    for note in dict.fromkeys(map(translated, notes)):
        say(console, tr("Note: {note}", note=note), "yellow")


def print_profile(profile: Profile) -> None:
    """Print precisions, best batch sizes and the recommended settings."""
    console = open_console()
    say(console, _about(profile.key.model, profile.key.device_name), "bold")
    if profile.precisions:
        console.print(_precision_table(profile))
    if profile.best:
        console.print(_best_table(profile))
    console.print(_scenario_table(profile))
    chosen = profile.settings
    best = wording.step(chosen.batch_size, chosen.token_budget)
    parts = [best, tr("precision {precision}", precision=chosen.precision)]
    if chosen.threads:
        one = chosen.threads == 1
        parts.append(tr("1 thread") if one else tr("{count} threads", count=chosen.threads))
    say(console, "\n" + tr("Best step: {step}", step=listed(parts)), "bold")
    _print_notes(console, profile.warnings)


def _about(model: str, device: str) -> str:
    return "\n" + tr("{model} on {device}", model=model, device=device)


def _precision_table(profile: Profile) -> Table:
    columns = (
        tr("Precision"),
        tr("Tokens/s"),
        "Kendall τ",
        tr("Top-10 overlap"),
        tr("Passed"),
    )
    rows = [
        (
            wording.precision(row),
            number(row["tokens_per_s"]),
            f"{row['tau']:.4f}",
            f"{row['overlap']:.3f}",
            wording.passed(row),
        )
        for row in profile.precisions
    ]
    return _table(tr("Precisions compared with fp32"), columns, rows)


def _yes_or_no(value: object) -> str:
    return tr("yes") if value else tr("no")


def _best_table(profile: Profile) -> Table:
    rows = [
        (
            str(entry["pairs"]),
            str(entry["batch_size"]),
            f"{duration(entry['latency_s']['median'])} {wording.spread(entry)}",
            number(entry["pairs_per_s"]),
            _as_fast(rivals(profile, entry)),
        )
        for entry in profile.best
    ]
    columns = (
        *(tr("Pairs"), tr("Best batch size"), tr("Latency")),
        *(tr("Pairs/s"), tr("May be as fast")),
    )
    return _table(tr("Best batch size"), columns, rows)


def _as_fast(others: Sequence[Row]) -> str:
    """The sizes that may be as fast as a chosen one: their intervals overlap."""
    shown = ", ".join(str(entry["batch_size"] or entry["token_budget"]) for entry in others)
    return shown or tr("none")


def _scenario_table(profile: Profile) -> Table:
    columns = (
        *(tr("Scenario"), tr("Documents"), tr("Step")),
        *(tr("Pairs/s"), tr("Peak memory"), tr("May be as fast")),
    )
    rows = [
        (
            tr(wording.TITLES[entry["name"]]),
            tr(entry["documents"]),
            wording.step_of(entry),
            number(entry["pairs_per_s"]),
            size(entry["peak_bytes"]),
            tr("predicted")
            if entry.get("predicted")
            else _as_fast(rivals(profile, entry, any_unit=entry["name"] == "offline")),
        )
        for entry in profile.situations
    ]
    return _table(tr("Recommended settings"), columns, rows)


def print_scenario(profile: Profile) -> None:
    """Print the settings, the predicted and measured metrics, and the notes."""
    shown = wording.scenario_summary(profile)
    if shown is None:
        return
    console = open_console()
    say(console, f"\n{shown['title']}: {shown['asked']}", "bold")
    for label, value in (*shown["settings"], (tr("Ranking accuracy"), shown["accuracy"])):
        say_row(console, label, 24, value)
    columns = ("", tr("Predicted"), tr("Measured"), tr("Difference"))
    console.print(_table("", columns, shown["rows"]))
    say(console, shown["headline"], STYLES[shown["state"]])
    _print_notes(console, shown["notes"])


def print_comparison(found: Row) -> None:
    """Print the headline, the tables and the notes."""
    console = open_console()
    for name in "ab":
        side = found[name]
        about = _about(side["key"]["model"], side["key"]["device_name"]).strip()
        say(console, f"{name.upper()}: {side['file']}: {about}")
    say(console, f"\n{found['verdict']}\n", "bold")
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


def print_findings(findings: Row) -> None:
    """Print the findings of ``echelon doctor``."""
    console = open_console()
    sections = {
        tr("Machine"): wording.machine(findings["machine"]),
        tr("Software"): list(findings["software"].items()),
        tr("Extras"): [(row["name"], _extra(row)) for row in findings["extras"]],
        tr("Will use"): [(tr(WILL_USE[name]), v) for name, v in findings["will_use"].items()],
        tr("Hub"): [
            ("HF_ENDPOINT", findings["hub"]["endpoint"]),
            (tr("Access"), _access(findings)),
        ],
    }
    for title, rows in sections.items():
        say(console, title, "bold")
        for name, value in rows:
            say_row(console, name, 22, *(value if isinstance(value, tuple) else [_plain(value)]))
    say(console, tr("What to do"), "bold")
    for advice in findings["advice"]:
        say(console, f"  - {translated(advice)}", hang=4)


def _extra(row: Row) -> tuple[str, ...]:
    """What is missing, and the command that installs it."""
    if not row["missing"]:
        return (tr("installed"),)
    return tr("{missing} missing:", missing=listed(row["missing"])), row["command"]


def _access(findings: Row) -> str:
    """How the hub is reached, as far as that is known."""
    hub = findings["hub"]
    if hub["offline"]:
        return tr("the cache only (HF_HUB_OFFLINE)")
    tried = {None: N_("not tried (--online tries)"), True: N_("it answers"), False: N_("no answer")}
    token = tr("with a token") if hub["token"] else tr("without a token (HF_TOKEN)")
    return listed([tr(tried[hub["answers"]]), token])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return listed(map(_plain, value)) or tr("none")
    if isinstance(value, bool):
        return _yes_or_no(value)
    return tr("not installed") if value is None else translated(value)


def print_plan(plan: Row) -> None:
    """Print the answer, then what it depends on."""
    console, answer, asked = open_console(), plan["answer"], plan["asked"]
    predicted = answer["predicted"]
    priced = answer["price_per_hour"] is not None
    say(console, _about(plan["model"]["model"], plan["model"]["device"]), "bold")
    machines = tr("{count} machines", count=f"{answer['machines']:,}")
    if answer["machines"] == 1:
        machines = tr("1 machine")
    if answer["workers"] != answer["machines"]:
        workers = f"{answer['workers']:,}"
        machines = tr("{machines} with {workers} workers", machines=machines, workers=workers)
    step, rate = f"{answer['token_budget']:,}", number(asked["rate"])
    answers = N_("{machines} at {tokens} tokens per step answer {rate} requests/s.")
    say(console, tr(answers, machines=machines, tokens=step, rate=rate), "bold")
    times = _percentiles(predicted)
    goal, load = duration(asked["slo_p99_s"]), percent(answer["load"])
    say(
        console,
        tr("Predicted: {times} (goal {goal}); load {load}.", times=times, goal=goal, load=load),
    )
    most, room = number(answer["bears_rate"]), percent(answer["headroom"])
    say(
        console,
        tr("Headroom: up to {rate} requests/s (+{share}) meet the goal.", rate=most, share=room),
    )
    if priced:
        prices = (number(answer["price_per_hour"]), number(answer["price_per_million"]))
        words = N_("Price: {hour} per hour, {million} per million requests.")
        say(console, tr(words, hour=prices[0], million=prices[1]))
    console.print(_budgets(plan["budgets"]))
    console.print(_sensitivity(plan, priced=priced))
    console.print(_routings(plan["routings"]))
    if plan["day"] is not None:
        _print_day(console, plan["day"])
    _print_notes(console, plan["notes"])


def _percentiles(row: Row) -> str:
    return listed(f"{name.upper()} {_known(row[f'{name}_s'])}" for name in ("p50", "p95", "p99"))


def _known(value: float | None, text: Callable[[float], str] = duration) -> str:
    return UNKNOWN if value is None else text(value)


def _budgets(rows: Iterable[Row]) -> Table:
    title = tr("By token budget (–: with more machines, or not at all)")
    columns = (tr("Tokens per step"), tr("Machines"), "P99", tr("Highest rate of a machine"))
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
    columns = [tr("If the workload differs"), tr("Machines"), "P99"]
    columns += [tr("Price/h")] if priced else []
    named = [(tr("rate {rate}/s", rate=number(row["rate"])), row) for row in plan["rates"]]
    named += [(tr("texts × {times}", times=f"{row['lengths']:g}"), row) for row in plan["lengths"]]
    rows = []
    for name, row in named:
        cells = [_known(row["price_per_hour"], number)] if priced else []
        rows.append([name, _known(row["machines"], "{:,}".format), _known(row["p99_s"]), *cells])
    return _table(tr("Sensitivity"), columns, rows)


def _routings(rows: Iterable[Row]) -> Table:
    columns = (tr("Routing"), tr("Meets the goal"), "P99", tr("Highest rate"))
    cells = [
        (
            tr(ROUTINGS[row["routing"]]),
            _yes_or_no(row["meets"]),
            _known(row["p99_s"]),
            f"{number(row['bears_rate'])}/s",
        )
        for row in rows
    ]
    return _table(tr("The same machines by routing"), columns, cells)


def _print_day(console: Console, day: Row) -> None:
    say(console, tr("A day"), "bold")
    words = N_(
        "{count} requests ({simulated} simulated): {times}; {missed} miss the goal, "
        "mean load {load}."
    )
    missed, load = percent(day["missed"], 2), percent(day["utilisation"])
    count, simulated = f"{day['requests']:,}", f"{day['simulated']:,}"
    times = _percentiles(day)
    say(console, tr(words, count=count, simulated=simulated, times=times, missed=missed, load=load))
    if day["overfull_s"]:
        hours = number(day["overfull_s"] / 3600)
        words = tr("In {hours} hours the queue keeps growing.", hours=hours)
        say(console, words, "yellow")
