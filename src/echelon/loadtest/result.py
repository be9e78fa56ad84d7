"""The result of a load test: as data for ``--json`` and the page, and as tables for people.

docs/STRESS.md lists the fields; :data:`SCHEMA` goes up when one changes its meaning or goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon import __version__
from echelon.loadtest.summary import ANSWERED, DriveResult, LoadSummary
from echelon.messages import units
from echelon.simulation.workload import ConstantArrivals

if TYPE_CHECKING:
    from echelon.loadtest.run import FoundRate, LoadTestPlan, LoadTestRun, RateProbe

SCHEMA = 1

MAX_ROWS = 120
"""Points of a curve over time: a phone cannot show more."""


@dataclass(frozen=True, slots=True)
class LoadTestResult:
    """A finished test; ``created`` is when it ended, ISO 8601 in UTC.

    ``run`` of a search is that of the best probe, or the last where none held; None where there was
    none.
    """

    plan: LoadTestPlan
    data: str
    created: str
    run: LoadTestRun | None
    found: FoundRate | None = None

    @classmethod
    def of_search(
        cls, plan: LoadTestPlan, data: str, created: str, found: FoundRate
    ) -> LoadTestResult:
        """The result of a search."""
        shown = found.best or (found.probes[-1] if found.probes else None)
        return cls(plan, data, created, shown.run if shown else None, found)

    @property
    def mode(self) -> str:
        """How it was tested."""
        return self.plan.mode if self.found is None else "find-max"

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before its end."""
        if self.found is not None:
            return self.found.limit == "interrupted"
        return self.run is not None and self.run.outcome.interrupted

    @property
    def held(self) -> bool:
        """Whether the goal held, of a search at any rate; without a goal: anything was answered."""
        if self.found is not None:
            return self.found.rate > 0
        return self.run is not None and self.run.summary.held

    @property
    def doubts(self) -> list[str]:
        """Reasons not to trust the numbers."""
        found = [] if self.run is None else self.run.summary.doubts
        if self.found is None or self.found.limit != "generator":
            return found
        limit = (
            "The search ended because the generator could not keep up: the server may take more. "
            "Test from a machine of its own, or split the rate among several."
        )
        return [limit, *found]

    @property
    def notes(self) -> list[str]:
        """Warnings that do not question the numbers."""
        return [] if self.run is None else self.run.summary.notes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, times in milliseconds unless the name says otherwise."""
        plan, found = self.plan, self.found
        return {
            "schema": SCHEMA,
            "echelon": __version__,
            "created": self.created,
            "url": plan.target.url,
            "dialect": plan.target.protocol.name,
            "mode": self.mode,
            "settings": _settings(plan, self.data),
            "goal": _goal(plan),
            "held": self.held,
            "interrupted": self.interrupted,
            "trusted": not self.doubts,
            "doubts": self.doubts,
            "notes": self.notes,
            "max_rate": None if found is None else found.rate,
            "limit": None if found is None else found.limit,
            "probes": [] if found is None else [_probe(probe) for probe in found.probes],
            "result": None if self.run is None else _numbers(self.run.summary),
            "over_time": [] if self.run is None else over_time(self.run.outcome),
        }


def _probe(probe: RateProbe) -> dict[str, Any]:
    summary = probe.run.summary
    held, trusted = probe.held, summary.trusted
    return {"rate": probe.rate, "held": held, "trusted": trusted, "result": _numbers(summary)}


def _goal(plan: LoadTestPlan) -> dict[str, float] | None:
    if plan.goal is None:
        return None
    return {"p99_ms": 1000 * plan.goal.latency_s, "failure_share": plan.goal.max_failures}


def _settings(plan: LoadTestPlan, data: str) -> dict[str, Any]:
    open_loop, workload = plan.clients is None, plan.workload
    even = isinstance(workload.arrivals, ConstantArrivals)
    arrivals = "trace" if plan.replays else "constant" if even else "poisson"
    return {
        "arrivals": arrivals if open_loop else None,
        "rate": workload.rate if open_loop and not plan.replays else None,
        "clients": plan.clients,
        "documents": str(workload.documents),
        "tokens": None if workload.tokens is None else str(workload.tokens),
        "data": data,
        "marked": plan.marked,
        "seed": workload.seed,
        "warmup_s": plan.warmup_s,
        "duration_s": plan.duration_s,
        "timeout_ms": 1000 * plan.target.timeout_s,
        "max_connections": plan.target.max_connections or None,
        "model": plan.target.model or plan.target.protocol.model,
    }


def _numbers(summary: LoadSummary) -> dict[str, Any]:
    return {
        "window_s": summary.window_s,
        "requests": summary.requests,
        **{str(kind): count for kind, count in summary.kinds.items()},
        "unfinished": summary.unfinished,
        "failure_share": summary.failure_share,
        "offered_per_s": summary.offered_per_s,
        "answered_per_s": summary.answered_per_s,
        "documents_per_s": summary.documents_per_s,
        "goodput_per_s": summary.goodput_per_s,
        "latency_ms": {
            "mean": None if summary.mean_s is None else 1000 * summary.mean_s,
            **{name_of(p): 1000 * seconds for p, seconds in summary.latency_s.items()},
        },
        "send_lag_p99_ms": 1000 * summary.send_lag_s,
        "loop_lag_p99_ms": 1000 * summary.health.loop_lag_s,
        "generator_cpu_share": summary.health.cpu_share,
        "failures": {
            name: {"count": count, "first": first}
            for name, (count, first) in summary.problems.items()
        },
        "hdr_histogram_us": summary.histogram,
    }


def name_of(percentile: float) -> str:
    """``p99``, ``p99.9``, and ``max`` for the last."""
    return "max" if percentile == 100 else f"p{percentile:g}"  # noqa: PLR2004 - all per cent


def over_time(outcome: DriveResult) -> list[dict[str, Any]]:
    """Latencies and failures over the run, warm-up included, by when requests were due."""
    records = outcome.records
    if not len(records):
        return []
    width_s = float(max(1, -(-outcome.ended_s // MAX_ROWS)))
    due, latency_ms = records.scheduled, 1000 * (records.ended - records.scheduled)
    answered = records.kinds == ANSWERED
    rows = []
    places = (due // width_s).astype(np.int64)
    for place in np.unique(places).tolist():
        here = places == place
        good = latency_ms[here & answered]
        p50_ms, p99_ms = np.percentile(good, [50, 99]).tolist() if len(good) else (None, None)
        row = {"at_s": place * width_s, "width_s": width_s}
        row |= {"answered": len(good), "failed": int(here.sum()) - len(good)}
        rows.append(row | {"p50_ms": p50_ms, "p99_ms": p99_ms})
    return rows


SHOWN = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)


def print_result(result: LoadTestResult) -> None:
    """Print a test for people, its result in one sentence first."""
    console = Console(highlight=False)
    console.print(Text(headline(result), style="bold"))
    if result.found is not None:
        console.print(_probes_table(result.found.probes))
    if result.run is not None:
        summary = result.run.summary
        console.print(_latency_table(summary))
        console.print(_counts_table(summary))
        for name, (count, first) in summary.problems.items():
            console.print(Text(f"{count:,} × {name}, first: {first}", style="red"))
    for doubt in result.doubts:
        console.print(Text(f"Not to be trusted: {doubt}", style="bold yellow"))
    for note in result.notes:
        console.print(Text(f"Note: {note}", style="yellow"))


def headline(result: LoadTestResult) -> str:
    """The result in one sentence."""
    goal, found = result.plan.goal, result.found
    limit = "" if goal is None else f"P99 at most {units.duration(goal.latency_s)}"
    if found is not None:
        return _search_headline(found, limit)
    summary = None if result.run is None else result.run.summary
    if summary is None or summary.p99_s is None:
        if result.interrupted:
            return "Stopped before any answer that counts."
        return "Nothing was answered." if goal is None else "The goal was missed: no answer at all."
    load = f"{units.number(summary.offered_per_s)} requests/s"
    if result.plan.clients is not None:
        load = f"{result.plan.clients} clients"
    p99 = f"P99 {units.duration(summary.p99_s)}"
    failed = f"{units.percent(summary.failure_share, 2)} failed"
    if goal is None:
        return f"{load}: {p99}, {failed}."
    how = "The goal held" if summary.held else "The goal was missed"
    late = ""
    if not summary.held and summary.p99_s <= goal.latency_s:
        late = f", {units.percent(1 - summary.within / summary.requests, 2)} late or failed"
    return f"{how} at {load}: {p99}, {failed}{late}; the goal is {limit}."


LIMITS = {
    "server": "",
    "generator": " The generator, not the server, was the limit.",
    "bounded": " It is the highest rate that was to be tried (--max-rate).",
    "interrupted": " The search was stopped early.",
}


def _search_headline(found: FoundRate, limit: str) -> str:
    if not found.probes:
        return "No rate was tried."
    if found.best is None:
        tried = min(probe.rate for probe in found.probes)
        return f"No rate held {limit}, not even {units.number(tried)} requests/s."
    best = found.best.run.summary
    return (
        f"{units.number(found.rate)} requests/s held {limit}: P99 "
        f"{units.duration(best.p99_s or 0.0)}, {units.number(best.documents_per_s)} documents/s."
        f"{LIMITS[found.limit]}"
    )


def probe_line(probe: RateProbe) -> str:
    """A probe in one line, printed during the search."""
    rate, _, p99, _, failed, state = probe_row(probe)
    return f"{rate:>10}  P99 {p99:>9}  failed {failed:>8}  {state}"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _probes_table(probes: tuple[RateProbe, ...]) -> Table:
    table = _table("Rate", "P50", "P99", "Answered/s", "Failed", "")
    for probe in sorted(probes, key=lambda p: p.rate):
        *cells, state = probe_row(probe)
        table.add_row(*cells, Text(state, style="green" if probe.held else "red"))
    return table


def probe_row(probe: RateProbe) -> list[str]:
    """Rate, P50, P99, answered a second, share that failed, and whether it held."""
    summary = probe.run.summary
    return [
        f"{units.number(probe.rate)}/s",
        *(_duration(summary.latency_s.get(p)) for p in (50.0, 99.0)),
        units.number(summary.answered_per_s),
        units.percent(summary.failure_share, 2),
        "held" if probe.held else "generator too slow" if summary.held else "broke",
    ]


def _duration(seconds: float | None) -> str:
    return units.UNKNOWN if seconds is None else units.duration(seconds)


def _latency_table(summary: LoadSummary) -> Table:
    table = _table("Latency", *(name_of(p).replace("p", "P") for p in SHOWN))
    table.add_row("from when due", *(_duration(summary.latency_s.get(p)) for p in SHOWN))
    return table


def _counts_table(summary: LoadSummary) -> Table:
    kinds, goodput = summary.kinds, summary.goodput_per_s
    rows = [
        ("Offered", f"{units.number(summary.offered_per_s)}/s", f"{summary.requests:,}"),
        ("Answered", f"{units.number(summary.answered_per_s)}/s", f"{kinds['answered']:,}"),
    ]
    if goodput is not None:
        rows.append(("Goodput", f"{units.number(goodput)}/s", ""))
    rows += [
        ("Documents", f"{units.number(summary.documents_per_s)}/s", ""),
        ("Refused (429, 503)", "", f"{kinds['refused']:,}"),
        ("Timed out", "", f"{kinds['timeout']:,}"),
        ("Errors", "", f"{kinds['error']:,}"),
        ("Wrong answers", "", f"{kinds['wrong']:,}"),
        ("Sent late (P99)", units.duration(summary.send_lag_s), ""),
        ("Generator's CPU", units.percent(summary.health.cpu_share), ""),
    ]
    if summary.unfinished:
        rows.append(("Unfinished when stopped", "", f"{summary.unfinished:,}"))
    table = _table("", "Rate", "Count")
    for row in rows:
        table.add_row(*row)
    return table
