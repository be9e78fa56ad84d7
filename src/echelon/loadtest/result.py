"""A finished test as data: what ``--json`` prints and the page shows. Pure.

The fields are listed in docs/STRESS.md; :data:`SCHEMA` goes up when one of them changes its
meaning or goes.

What ``echelon stress`` prints for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon import __version__
from echelon.loadtest.records import ANSWERED
from echelon.reports import wording

if TYPE_CHECKING:
    from echelon.loadtest.driver import DriveResult
    from echelon.loadtest.run import FoundRate, LoadTestPlan, LoadTestRun, RateProbe
    from echelon.loadtest.summary import LoadSummary

SCHEMA = 1

MOST_ROWS = 120
"""Points of a curve over time: more than a phone can show are no help."""


@dataclass(frozen=True, slots=True)
class LoadTestResult:
    """A test and what it was.

    Attributes:
        plan: what was asked for.
        data: the name of its texts.
        created: when it ended, ISO 8601 in UTC.
        run: the run; of a search the best probe's, or the last where none held; None: there is
            none.
        found: a search's end; None where it was a single run.
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
        """Why the numbers cannot be trusted."""
        found = [] if self.run is None else self.run.summary.doubts
        if self.found is None or self.found.limit != "generator":
            return found
        told = (
            "The search ended because the generator could not keep up: the server may take more. "
            "Test from a machine of its own, or split the rate among several."
        )
        return [told, *found]

    @property
    def notes(self) -> list[str]:
        """What to know besides."""
        return [] if self.run is None else self.run.summary.notes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, times in milliseconds unless the name says otherwise."""
        plan, found = self.plan, self.found
        return {
            "schema": SCHEMA,
            "echelon": __version__,
            "created": self.created,
            "url": plan.target.url,
            "dialect": plan.target.shape.name,
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
            "probes": [
                {
                    "rate": probe.rate,
                    "held": probe.held,
                    "trusted": probe.run.summary.trusted,
                    "result": summary_dict(probe.run.summary),
                }
                for probe in (() if found is None else found.probes)
            ],
            "result": None if self.run is None else summary_dict(self.run.summary),
            "over_time": [] if self.run is None else over_time(self.run.outcome),
        }


def _goal(plan: LoadTestPlan) -> dict[str, float] | None:
    if plan.goal is None:
        return None
    return {"p99_ms": 1000 * plan.goal.latency_s, "failure_share": plan.goal.max_failures}


def _settings(plan: LoadTestPlan, data: str) -> dict[str, Any]:
    open_loop = plan.clients is None
    arrivals = "trace" if plan.trace is not None else "constant" if plan.even else "poisson"
    return {
        "arrivals": arrivals if open_loop else None,
        "rate": plan.rate if open_loop and plan.trace is None else None,
        "clients": plan.clients,
        "documents": str(plan.documents),
        "tokens": None if plan.tokens is None else str(plan.tokens),
        "data": data,
        "marked": plan.marked,
        "seed": plan.seed,
        "warmup_s": plan.warmup_s,
        "duration_s": plan.duration_s,
        "timeout_ms": 1000 * plan.target.timeout_s,
        "max_connections": plan.target.max_connections or None,
        "model": plan.target.model or plan.target.shape.model,
    }


def summary_dict(summary: LoadSummary) -> dict[str, Any]:
    """A summary's numbers."""
    kinds: dict[str, int] = {str(name): count for name, count in summary.kinds.items()}
    return {
        "window_s": summary.window_s,
        "requests": summary.requests,
        **kinds,
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
            for name, (count, first) in summary.complaints.items()
        },
        "hdr_histogram_us": summary.histogram,
    }


def name_of(percentile: float) -> str:
    """``p99``, ``p99.9``, and ``max`` for the last."""
    return "max" if percentile == 100 else f"p{percentile:g}"  # noqa: PLR2004 - all per cent


def over_time(outcome: DriveResult) -> list[dict[str, Any]]:
    """What callers met as the run went on, warm-up included, by when their requests were due."""
    ledger = outcome.ledger
    if not len(ledger):
        return []
    width_s = float(max(1, -(-outcome.ended_s // MOST_ROWS)))
    due, latency_ms = ledger.scheduled, 1000 * (ledger.ended - ledger.scheduled)
    answered = ledger.kinds == ANSWERED
    rows = []
    places = (due // width_s).astype(np.int64)
    for place in np.unique(places).tolist():
        here = places == place
        good = latency_ms[here & answered]
        quantiles = np.percentile(good, [50, 99]).tolist() if len(good) else [None, None]
        rows.append(
            {
                "at_s": place * width_s,
                "width_s": width_s,
                "answered": len(good),
                "failed": int(here.sum()) - len(good),
                "p50_ms": quantiles[0],
                "p99_ms": quantiles[1],
            }
        )
    return rows


SHOWN = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)


def print_result(result: LoadTestResult) -> None:
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


def verdict(result: LoadTestResult) -> str:
    """The answer in one sentence."""
    goal, found = result.plan.goal, result.found
    promised = "" if goal is None else f"P99 at most {wording.duration(goal.latency_s)}"
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


def _search_verdict(result: LoadTestResult, promised: str) -> str:
    found = result.found
    if found is None or found.best is None:
        tried = min((p.rate for p in found.probes), default=None) if found else None
        if tried is None:
            return "No rate was tried."
        return f"No rate held {promised}, not even {wording.number(tried)} requests/s."
    best = found.best.run.summary
    return (
        f"{wording.number(found.rate)} requests/s held {promised}: P99 "
        f"{wording.duration(best.p99_s or 0.0)}, {wording.number(best.documents_per_s)} "
        "documents/s."
        f"{LIMITS[found.limit]}"
    )


def probe_line(probe: RateProbe) -> str:
    """A probe in one line, for while the search goes on."""
    rate, _, p99, _, failed, said = probe_row(probe)
    return f"{rate:>10}  P99 {p99:>9}  failed {failed:>8}  {said}"


def _said(probe: RateProbe) -> str:
    if probe.held:
        return "held"
    return "broke" if not probe.run.summary.held else "generator too slow"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _probes_table(probes: tuple[RateProbe, ...]) -> Table:
    table = _table("Rate", "P50", "P99", "Answered/s", "Failed", "")
    for probe in sorted(probes, key=lambda p: p.rate):
        *cells, said = probe_row(probe)
        table.add_row(*cells, Text(said, style="green" if probe.held else "red"))
    return table


def probe_row(probe: RateProbe) -> list[str]:
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


def _latency_table(summary: LoadSummary) -> Table:
    table = _table("Latency", *(name_of(p).replace("p", "P") for p in SHOWN))
    found = [summary.latency_s.get(p) for p in SHOWN]
    cells = [wording.UNKNOWN if s is None else wording.duration(s) for s in found]
    table.add_row("from when due", *cells)
    return table


def _counts_table(summary: LoadSummary) -> Table:
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
