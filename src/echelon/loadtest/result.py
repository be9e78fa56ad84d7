"""The result of a load test: as data for ``--json`` and the page, and as tables for people.

docs/STRESS.md lists the fields; :data:`SCHEMA` goes up when one changes its meaning or goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from echelon import __version__
from echelon.loadtest.summary import ANSWERED, KINDS, OTHER, DriveResult, LoadSummary
from echelon.messages import N_, Message, listed, tr, translated, units
from echelon.reports.terminal import open_console, say
from echelon.simulation.workload import ConstantArrivals

if TYPE_CHECKING:
    from echelon.loadtest.run import FoundRate, Limit, LoadTestPlan, LoadTestRun, RateProbe
    from echelon.loadtest.summary import Kind

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
        return [Message("loadtest.search_limited"), *found]

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
    console = open_console()
    say(console, headline(result), "bold")
    if result.found is not None:
        console.print(_probes_table(result.found.probes))
    if result.run is not None:
        summary = result.run.summary
        console.print(_latency_table(summary))
        console.print(_counts_table(summary))
        for kind, count, first in problem_rows(summary):
            line = tr("{count} × {kind}, first: {first}", count=count, kind=kind, first=first)
            say(console, line, "red")
    for doubt in map(translated, result.doubts):
        say(console, f"{tr('Not to be trusted:')} {doubt}", "bold yellow")
    for note in map(translated, result.notes):
        say(console, tr("Note: {note}", note=note), "yellow")


def problem_rows(summary: LoadSummary) -> list[tuple[str, str, str]]:
    """Each kind of problem in words, how often there was one, and the message of the first."""
    return [
        (_kind(name), f"{count:,}", translated(first))
        for name, (count, first) in summary.problems.items()
    ]


def _kind(name: str) -> str:
    return tr(PROBLEMS[name]) if name in PROBLEMS else translated(name)


PROBLEMS = {"timeout": N_("timed out"), "wrong": N_("wrong answer"), OTHER: N_("other problems")}
"""Kinds of problems that have no message of their own, in words."""


def headline(result: LoadTestResult) -> str:
    """The result in one sentence."""
    goal, found = result.plan.goal, result.found
    limit = "" if goal is None else tr("P99 at most {time}", time=units.duration(goal.latency_s))
    if found is not None:
        return _search_headline(found, limit)
    summary = None if result.run is None else result.run.summary
    if summary is None or summary.p99_s is None:
        return _nothing_answered(result)
    how = {"load": _load(result, summary), "found": _found(summary)}
    if goal is None:
        return tr("{load}: {found}.", **how)
    if summary.held:
        return tr("The goal held at {load}: {found}; the goal is {limit}.", limit=limit, **how)
    return tr("The goal was missed at {load}: {found}; the goal is {limit}.", limit=limit, **how)


def _nothing_answered(result: LoadTestResult) -> str:
    if result.interrupted:
        return tr("Stopped before any answer that counts.")
    if result.plan.goal is None:
        return tr("Nothing was answered.")
    return tr("The goal was missed: no answer at all.")


def _load(result: LoadTestResult, summary: LoadSummary) -> str:
    if result.plan.clients is not None:
        return tr("{clients} clients", clients=result.plan.clients)
    return tr("{rate} requests/s", rate=units.number(summary.offered_per_s))


def _found(summary: LoadSummary) -> str:
    """P99 and failures, and what was late where only that missed the goal."""
    p99_s, goal = summary.p99_s or 0.0, summary.goal
    failed = units.percent(summary.failure_share, 2)
    parts = [f"P99 {units.duration(p99_s)}", tr("{share} failed", share=failed)]
    if goal is not None and not summary.held and p99_s <= goal.latency_s:
        late = units.percent(1 - summary.within / summary.requests, 2)
        parts.append(tr("{share} late or failed", share=late))
    return listed(parts)


LIMITS: dict[Limit, str] = {
    "generator": N_("The generator, not the server, was the limit."),
    "bounded": N_("It is the highest rate that was to be tried (--max-rate)."),
    "interrupted": N_("The search was stopped early."),
}
"""Why a search ended, where it was not the server."""


def _search_headline(found: FoundRate, limit: str) -> str:
    if not found.probes:
        return tr("No rate was tried.")
    if found.best is None:
        tried = units.number(min(probe.rate for probe in found.probes))
        return tr("No rate held {limit}, not even {rate} requests/s.", limit=limit, rate=tried)
    best = found.best.run.summary
    held = tr(
        "{rate} requests/s held {limit}: P99 {p99}, {documents} documents/s.",
        rate=units.number(found.rate),
        limit=limit,
        p99=units.duration(best.p99_s or 0.0),
        documents=units.number(best.documents_per_s),
    )
    why = LIMITS.get(found.limit)
    return held if why is None else f"{held} {tr(why)}"


def probe_line(probe: RateProbe) -> str:
    """A probe in one line, printed during the search."""
    rate, _, p99, _, failed, state = probe_row(probe)
    return tr(
        "{rate}  P99 {p99}  failed {failed}  {state}",
        rate=f"{rate:>10}",
        p99=f"{p99:>9}",
        failed=f"{failed:>8}",
        state=state,
    )


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _probes_table(probes: tuple[RateProbe, ...]) -> Table:
    table = _table(tr("Rate"), "P50", "P99", tr("Answered/s"), tr("Failed"), "")
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
        tr("held" if probe.held else _broke(summary)),
    ]


def _broke(summary: LoadSummary) -> str:
    return N_("generator too slow") if summary.held else N_("broke")


def _duration(seconds: float | None) -> str:
    return units.UNKNOWN if seconds is None else units.duration(seconds)


def _latency_table(summary: LoadSummary) -> Table:
    table = _table(tr("Latency"), *(shown_percentile(p) for p in SHOWN))
    table.add_row(tr("from when due"), *(_duration(summary.latency_s.get(p)) for p in SHOWN))
    return table


def shown_percentile(percentile: float) -> str:
    """``P99``, ``P99.9``, and the word for the last, as people read it."""
    name = name_of(percentile)
    return tr("max") if name == "max" else name.upper()


KIND_NAMES: dict[Kind, str] = {
    "answered": N_("Answered"),
    "refused": N_("Refused (429, 503)"),
    "timeout": N_("Timed out"),
    "error": N_("Errors"),
    "wrong": N_("Wrong answers"),
}


def _counts_table(summary: LoadSummary) -> Table:
    kinds, goodput = summary.kinds, summary.goodput_per_s
    rows = [
        (tr("Offered"), f"{units.number(summary.offered_per_s)}/s", f"{summary.requests:,}"),
        (tr("Answered"), f"{units.number(summary.answered_per_s)}/s", f"{kinds['answered']:,}"),
    ]
    if goodput is not None:
        rows.append((tr("Goodput"), f"{units.number(goodput)}/s", ""))
    rows += [
        (tr("Documents"), f"{units.number(summary.documents_per_s)}/s", ""),
        *((tr(KIND_NAMES[kind]), "", f"{kinds[kind]:,}") for kind in KINDS if kind != "answered"),
        (tr("Sent late (P99)"), units.duration(summary.send_lag_s), ""),
        (tr("Generator's CPU"), units.percent(summary.health.cpu_share), ""),
    ]
    if summary.unfinished:
        rows.append((tr("Unfinished when stopped"), "", f"{summary.unfinished:,}"))
    table = _table("", tr("Rate"), tr("Count"))
    for row in rows:
        table.add_row(*row)
    return table
