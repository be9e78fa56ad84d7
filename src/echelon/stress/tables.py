"""What ``echelon stress`` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.reports import wording
from echelon.stress.result import name_of

if TYPE_CHECKING:
    from echelon.stress.result import Result
    from echelon.stress.run import Probe
    from echelon.stress.summary import Summary

SHOWN = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)


def print_result(result: Result) -> None:
    """Everything that matters of a test, verdict first."""
    console = Console(highlight=False)
    console.print(Text(verdict(result), style="bold"))
    if result.found is not None:
        console.print(_probes_table(result.found.probes))
    if result.run is not None:
        summary = result.run.summary
        console.print(_latency_table(summary))
        console.print(_counts_table(summary))
        for name, (count, first) in summary.complaints.items():
            console.print(Text(f"{count:,} × {name}, first: {first}", style="red"))
    for doubt in result.doubts:
        console.print(Text(f"Not to be trusted: {doubt}", style="bold yellow"))
    for note in result.notes:
        console.print(Text(f"Note: {note}", style="yellow"))


def verdict(result: Result) -> str:
    """The answer in one sentence."""
    goal, found = result.plan.goal, result.found
    promised = "" if goal is None else f"P99 at most {wording.duration(goal.p99_s)}"
    if found is not None:
        return _search_verdict(result, promised)
    summary = None if result.run is None else result.run.summary
    if summary is None or summary.p99_s is None:
        if result.interrupted:
            return "Stopped before any answer that counts."
        return "Nothing was answered." if goal is None else "The goal was missed: no answer at all."
    load = f"{wording.number(summary.offered_per_s)} requests/s"
    if result.plan.clients is not None:
        load = f"{result.plan.clients} clients"
    p99 = f"P99 {wording.duration(summary.p99_s)}"
    failed = f"{wording.percent(summary.failure_share, 2)} failed"
    if goal is None:
        return f"{load}: {p99}, {failed}."
    how = "The goal held" if summary.held else "The goal was missed"
    return f"{how} at {load}: {p99}, {failed}; promised was {promised}."


LIMITS = {
    "server": "",
    "generator": " The generator, not the server, was the limit.",
    "bounded": " It is the most that was to be tried.",
    "interrupted": " The search was stopped early.",
}


def _search_verdict(result: Result, promised: str) -> str:
    found = result.found
    if found is None or found.best is None:
        tried = min((p.rate for p in found.probes), default=None) if found else None
        if tried is None:
            return "No rate was tried."
        return f"No rate held {promised}, not even {wording.number(tried)} requests/s."
    best = found.best.run.summary
    return (
        f"{wording.number(found.rate)} requests/s held {promised}: P99 "
        f"{wording.duration(best.p99_s or 0.0)}, {wording.number(best.documents_per_s)} documents/s."
        f"{LIMITS[found.limit]}"
    )


def probe_line(probe: Probe) -> str:
    """A probe in one line, for while the search goes on."""
    rate, _, p99, _, failed, said = probe_row(probe)
    return f"{rate:>10}  P99 {p99:>9}  failed {failed:>8}  {said}"


def _said(probe: Probe) -> str:
    if probe.held:
        return "held"
    return "broke" if not probe.run.summary.held else "generator too slow"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _probes_table(probes: tuple[Probe, ...]) -> Table:
    table = _table("Rate", "P50", "P99", "Answered/s", "Failed", "")
    for probe in sorted(probes, key=lambda p: p.rate):
        *cells, said = probe_row(probe)
        table.add_row(*cells, Text(said, style="green" if probe.held else "red"))
    return table


def probe_row(probe: Probe) -> list[str]:
    """Rate, P50, P99, answered a second, share that failed, and what that means."""
    summary = probe.run.summary
    middle, high = (summary.latency_s.get(p) for p in (50.0, 99.0))
    return [
        f"{wording.number(probe.rate)}/s",
        wording.UNKNOWN if middle is None else wording.duration(middle),
        wording.UNKNOWN if high is None else wording.duration(high),
        wording.number(summary.answered_per_s),
        wording.percent(summary.failure_share, 2),
        _said(probe),
    ]


def _latency_table(summary: Summary) -> Table:
    table = _table("Latency", *(name_of(p).replace("p", "P") for p in SHOWN))
    found = [summary.latency_s.get(p) for p in SHOWN]
    cells = [wording.UNKNOWN if s is None else wording.duration(s) for s in found]
    table.add_row("from when due", *cells)
    return table


def _counts_table(summary: Summary) -> Table:
    goodput = summary.goodput_per_s
    rows = (
        ("Offered", f"{wording.number(summary.offered_per_s)}/s", f"{summary.requests:,}"),
        (
            "Answered",
            f"{wording.number(summary.answered_per_s)}/s",
            f"{summary.kinds['answered']:,}",
        ),
        ("Goodput", wording.UNKNOWN if goodput is None else f"{wording.number(goodput)}/s", ""),
        ("Documents", f"{wording.number(summary.documents_per_s)}/s", ""),
        ("Refused (429, 503)", "", f"{summary.kinds['refused']:,}"),
        ("Timed out", "", f"{summary.kinds['timeout']:,}"),
        ("Errors", "", f"{summary.kinds['error']:,}"),
        ("Wrong answers", "", f"{summary.kinds['wrong']:,}"),
        ("Sent late (P99)", wording.duration(summary.send_lag_s), ""),
        ("Generator's CPU", wording.percent(summary.health.cpu_share), ""),
    )
    table = _table("", "Rate", "Count")
    for row in rows:
        if not (row[0] == "Goodput" and goodput is None):
            table.add_row(*row)
    if summary.unfinished:
        table.add_row("Unfinished when stopped", "", f"{summary.unfinished:,}")
    return table
