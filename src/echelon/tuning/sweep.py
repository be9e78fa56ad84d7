"""Statistics of repeated measurements: medians, percentiles and their certainty. Pure.

The sweep: many settings measured side by side until each is known well enough.

Points take turns, one run each round, so that a machine that slows down slows all alike. The
clock and the work are arguments: tests drive the whole sweep without a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from echelon.models.base import DeviceOutOfMemory
from echelon.reports.html import kept
from echelon.reports.statistics import Statistics, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.types import Clock


Status = Literal["ok", "out_of_memory", "skipped", "not_reached"]

TIGHT = 0.03
"""A point is known well enough when its median's interval is within ±3 %."""

MOST_SAMPLES = 60
"""Runs after which a point that is still not tight is left as it is."""


SLOW_S = 2.0
"""A first run that takes this long needs no warm-up: start-up costs are some milliseconds."""

FIRST_LOOK = 3
"""Times the limit within which points that have not run at all may still get their first run: a
table with gaps helps nobody, a tuner that never ends neither."""


@dataclass(frozen=True, slots=True, order=True)
class SweepPoint:
    """One setting to measure.

    Attributes:
        pairs: pairs of one call.
        batch_size: pairs a step; None leaves it to the token budget.
        token_budget: tokens a step; None leaves it to the batch size.
    """

    pairs: int
    batch_size: int | None = None
    token_budget: int | None = None

    @property
    def size(self) -> int:
        """The step size, in its own unit."""
        return self.batch_size or self.token_budget or 0

    @property
    def row(self) -> tuple[int, str]:
        """Points of one row differ only in size; memory that ends one ends the larger."""
        return self.pairs, "pairs" if self.batch_size else "tokens"

    @property
    def label(self) -> str:
        """Words for a progress line."""
        if self.batch_size:
            return kept("{pairs} pairs, steps of {size} pairs", pairs=self.pairs, size=self.size)
        return kept("{pairs} pairs, steps of {size} tokens", pairs=self.pairs, size=self.size)


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One timed run of a point.

    Attributes:
        seconds: from texts in hand to scores in hand.
        tokens: useful tokens.
        cost_tokens: tokens paid for, padding included.
        steps: forward passes.
        peak_bytes: peak memory of process or device; None where it cannot be read.
    """

    seconds: float
    tokens: int
    cost_tokens: int
    steps: int
    peak_bytes: int | None


@dataclass(slots=True)
class MeasuredPoint:
    """What is known of a point."""

    point: SweepPoint
    status: Status = "not_reached"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    cost_tokens: int = 0
    steps: int = 0
    peak_bytes: int | None = None

    @property
    def summary(self) -> Statistics:
        """Statistics of the timed runs; only where there is one."""
        return summarize(self.seconds)

    @property
    def done(self) -> bool:
        """Known well enough, or never to be known."""
        if self.status in {"out_of_memory", "skipped"}:
            return True
        return bool(self.seconds) and (
            len(self.seconds) >= MOST_SAMPLES or self.summary.relative_width <= TIGHT
        )

    def add(self, run: SweepRun) -> None:
        """Keep one run."""
        self.status = "ok"
        self.seconds.append(run.seconds)
        self.tokens, self.cost_tokens, self.steps = run.tokens, run.cost_tokens, run.steps
        if run.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, run.peak_bytes)

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry for this point; times in seconds, rates a second."""
        known: dict[str, Any] = {
            "pairs": self.point.pairs,
            "batch_size": self.point.batch_size,
            "token_budget": self.point.token_budget,
            "status": self.status,
            "reason": self.reason,
        }
        if self.seconds:
            known |= self._numbers()
        return known

    def _numbers(self) -> dict[str, Any]:
        summary = self.summary
        return {
            "samples": summary.samples,
            "latency_s": {
                "median": summary.median,
                "low": summary.low,
                "high": summary.high,
                "p95": summary.p95,
                "p99": summary.p99,
            },
            "seconds": self.seconds,
            "pairs_per_s": self.point.pairs / summary.median,
            "tokens_per_s": self.tokens / summary.median,
            "tokens": self.tokens,
            "cost_tokens": self.cost_tokens,
            "padding_share": 1 - self.tokens / self.cost_tokens if self.cost_tokens else 0.0,
            "steps": self.steps,
            "peak_bytes": self.peak_bytes,
        }

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> MeasuredPoint:
        """Restore a point from its profile entry."""
        point = SweepPoint(known["pairs"], known["batch_size"], known["token_budget"])
        measured = cls(point, known["status"], known["reason"], list(known.get("seconds", [])))
        for name in ("tokens", "cost_tokens", "steps", "peak_bytes"):
            setattr(measured, name, known.get(name, getattr(measured, name)))
        return measured


def grid(
    pairs: Iterable[int], batch_sizes: Sequence[int], token_budgets: Sequence[int]
) -> list[SweepPoint]:
    """All points: batch sizes for each number of pairs, token budgets for the largest.

    Batch sizes above the number of pairs would repeat a smaller point and are left out.
    """
    counts = sorted(set(pairs))
    points = [
        SweepPoint(n, batch_size=b) for n in counts for b in sorted(set(batch_sizes)) if b <= n
    ]
    return points + [SweepPoint(counts[-1], token_budget=t) for t in sorted(set(token_budgets))]


def sweep(  # noqa: PLR0913 - each is a distinct collaborator
    points: Sequence[SweepPoint],
    trial: Callable[[SweepPoint], SweepRun],
    *,
    clock: Clock,
    limit_s: float,
    known: Sequence[MeasuredPoint] = (),
    saved: Callable[[list[MeasuredPoint]], None] = lambda _: None,
    told: Callable[[SweepPoint, float], None] = lambda *_: None,
) -> list[MeasuredPoint]:
    """Measure points in turn until each is tight or the time is up.

    Every point's first run is a warm-up that is not counted, unless it is so slow that start-up
    costs vanish in it. A first look at every point may overrun the limit, see FIRST_LOOK.

    Args:
        points: what to measure.
        trial: runs a point once; raises :class:`DeviceOutOfMemory` where it does not fit.
        clock: seconds.
        limit_s: time to spend, in seconds.
        known: results of an interrupted sweep to go on from.
        saved: called with all results after each run.
        told: called before each run with the point and the share of the work done, 0 to 1.

    Returns:
        One entry for each point, in the order of ``points``.
    """
    before = {measured.point: measured for measured in known}
    results = [before.get(point, MeasuredPoint(point)) for point in points]
    started = clock()
    while waiting := [m for m in results if not m.done]:
        for measured in waiting:
            spent = clock() - started
            if spent >= limit_s * (1 if measured.seconds else FIRST_LOOK):
                continue
            told(measured.point, _progress(results, spent, limit_s))
            _measure(measured, results, trial)
            saved(results)
        if clock() - started >= limit_s:
            break
    for measured in results:
        if measured.status == "not_reached":
            measured.reason = kept("the time limit came first; raise --time-limit")
    return results


def _measure(
    measured: MeasuredPoint, results: list[MeasuredPoint], trial: Callable[[SweepPoint], SweepRun]
) -> None:
    if measured.done:  # a smaller size of this row ran out of memory in this very round
        return
    try:
        run = trial(measured.point)
        if not measured.seconds and run.seconds < SLOW_S:
            run = trial(measured.point)
        measured.add(run)
    except DeviceOutOfMemory as error:
        _out_of_memory(measured, results, str(error))


def _out_of_memory(measured: MeasuredPoint, results: list[MeasuredPoint], reason: str) -> None:
    measured.status, measured.reason = "out_of_memory", reason.splitlines()[0]
    measured.seconds.clear()
    for larger in results:
        if larger.point.row == measured.point.row and larger.point.size > measured.point.size:
            larger.status = "skipped"
            size = measured.point.size
            larger.reason = kept("steps of {size} already ran out of memory", size=size)
            larger.seconds.clear()


def _progress(results: list[MeasuredPoint], spent: float, limit_s: float) -> float:
    """Share of the work done: points finished or time used, whichever is more."""
    finished = sum(measured.done for measured in results) / len(results)
    return min(1.0, max(finished, spent / limit_s if math.isfinite(limit_s) else 0.0))
