"""A finished test as data: what ``--json`` prints and the page shows. Pure.

The fields are listed in docs/STRESS.md; :data:`SCHEMA` goes up when one of them changes its
meaning or goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon import __version__
from echelon.stress.ledger import ANSWERED
from echelon.stress.summary import ALLOWED_FAILURES

if TYPE_CHECKING:
    from echelon.stress.drive import Outcome
    from echelon.stress.run import Found, Plan, Run
    from echelon.stress.summary import Summary

SCHEMA = 1

MOST_ROWS = 120
"""Points of a curve over time: more than a phone can show are no help."""


@dataclass(frozen=True, slots=True)
class Result:
    """A test and what it was.

    Attributes:
        plan: what was asked for.
        data: the name of its texts.
        created: when it ended, ISO 8601 in UTC.
        run: the run; of a search the best probe's, or the last where none held; None: there is
            none.
        found: a search's end; None where it was a single run.
    """

    plan: Plan
    data: str
    created: str
    run: Run | None
    found: Found | None = None

    @classmethod
    def of_search(cls, plan: Plan, data: str, created: str, found: Found) -> Result:
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


def _goal(plan: Plan) -> dict[str, float] | None:
    if plan.goal is None:
        return None
    return {"p99_ms": 1000 * plan.goal.p99_s, "failure_share": ALLOWED_FAILURES}


def _settings(plan: Plan, data: str) -> dict[str, Any]:
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


def summary_dict(summary: Summary) -> dict[str, Any]:
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


def over_time(outcome: Outcome) -> list[dict[str, Any]]:
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
