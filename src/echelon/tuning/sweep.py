"""Measures many step sizes side by side and chooses the best. Pure: clock and work are arguments.

Points are measured in turn, one run per round, so a slow-down of the machine affects all alike.
Two sizes whose medians are close are a tie, and a tie goes to the smaller step: it needs less
memory, and the next request starts sooner.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from echelon.messages import Message
from echelon.models.base import DeviceOutOfMemory
from echelon.progress import Progress, no_progress
from echelon.reports.statistics import ENOUGH, TIE, Statistics, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.types import Clock

Status = Literal["ok", "out_of_memory", "skipped", "not_reached"]

TIGHT = 0.03  # a point is known well enough when the interval of its median is within ±3 %
MAX_SAMPLES = 60  # runs after which a point that is still not tight is left as it is

SLOW_S = 2.0
"""A first run that takes this long needs no warm-up: start-up costs are some milliseconds."""

FIRST_LOOK = 3
"""Multiple of the time limit within which points that have not run may still get their first run:
a table with gaps is of little use, but the sweep must end."""

NOISY = 0.10
"""Half-width of a median's interval, relative to it, above which a point is called noisy."""


@dataclass(frozen=True, slots=True, order=True)
class SweepPoint:
    """One setting to measure."""

    pairs: int  # of one call
    batch_size: int | None = None  # pairs a step; None leaves it to the token budget
    token_budget: int | None = None  # tokens a step; None leaves it to the batch size

    @property
    def size(self) -> int:
        """The step size, in its own unit."""
        return self.batch_size or self.token_budget or 0

    @property
    def row(self) -> tuple[int, str]:
        """Points of a row differ only in size: where one is out of memory, so are the larger."""
        return self.pairs, "pairs" if self.batch_size else "tokens"

    @property
    def label(self) -> str:
        """Words for a progress line."""
        values = {"pairs": self.pairs, "size": self.size}
        return Message("sweep.point_pairs" if self.batch_size else "sweep.point_tokens", values)


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One timed run of a point."""

    seconds: float  # from texts to scores
    tokens: int  # without padding
    cost_tokens: int  # with padding
    steps: int  # forward passes
    peak_bytes: int | None  # of process or device; None where it cannot be read


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
            len(self.seconds) >= MAX_SAMPLES or self.summary.relative_width <= TIGHT
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
        known = asdict(self.point) | {"status": self.status, "reason": self.reason}
        if not self.seconds:
            return known
        summary, latencies = self.summary, ("median", "low", "high", "p95", "p99")
        return known | {
            "samples": summary.samples,
            "latency_s": {name: getattr(summary, name) for name in latencies},
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
    run: Callable[[SweepPoint], SweepRun],
    *,
    clock: Clock,
    limit_s: float,
    known: Sequence[MeasuredPoint] = (),
    save: Callable[[list[MeasuredPoint]], None] = lambda _: None,
    on_progress: Progress = no_progress,
) -> list[MeasuredPoint]:
    """Measure points in turn until each is tight or the time is up.

    The first run of a point is a warm-up that is not counted, unless it is so slow that start-up
    costs do not matter. The first runs of all points may exceed the limit, see FIRST_LOOK. A sweep
    resumes from ``known`` results; ``save`` gets all results after each run.
    """
    before = {measured.point: measured for measured in known}
    results = [before.get(point, MeasuredPoint(point)) for point in points]
    started = clock()
    while waiting := [m for m in results if not m.done]:
        for measured in waiting:
            spent = clock() - started
            if spent >= limit_s * (1 if measured.seconds else FIRST_LOOK):
                continue
            # Share of the points finished or of the time used: the larger of the two.
            finished = sum(m.done for m in results) / len(results)
            share = min(1.0, max(finished, spent / limit_s))
            on_progress(f"measuring {measured.point.label}", share, 1.0)
            _measure(measured, results, run)
            save(results)
        if clock() - started >= limit_s:
            break
    for measured in results:
        if measured.status == "not_reached":
            measured.reason = Message("sweep.time_limit")
    return results


def _measure(
    measured: MeasuredPoint, results: list[MeasuredPoint], run: Callable[[SweepPoint], SweepRun]
) -> None:
    if measured.done:  # a smaller size of this row ran out of memory in this very round
        return
    try:
        seen = run(measured.point)
        if not measured.seconds and seen.seconds < SLOW_S:
            seen = run(measured.point)
        measured.add(seen)
    except DeviceOutOfMemory as error:
        _out_of_memory(measured, results, str(error))


def _out_of_memory(measured: MeasuredPoint, results: list[MeasuredPoint], reason: str) -> None:
    measured.status, measured.reason = "out_of_memory", reason.splitlines()[0]
    measured.seconds.clear()
    for larger in results:
        if larger.point.row == measured.point.row and larger.point.size > measured.point.size:
            larger.status = "skipped"
            size = measured.point.size
            larger.reason = Message("sweep.smaller_out_of_memory", {"size": size})
            larger.seconds.clear()


# Choosing from the measured points.


def best_of(points: Iterable[MeasuredPoint], slower: float = 1 + TIE) -> MeasuredPoint | None:
    """The smallest step that takes at most ``slower`` times as long as the fastest one.

    The points have the same number of pairs; the default breaks ties.
    """
    known = sorted((m for m in points if m.seconds), key=lambda m: m.point.size)
    fastest = min((m.summary.median for m in known), default=0.0)
    return next((m for m in known if m.summary.median <= fastest * slower), None)


def best_batches(results: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """The best batch size for each number of pairs, fewest pairs first."""
    counts = sorted({m.point.pairs for m in results})
    rows = [[m for m in results if m.point.pairs == n and m.point.batch_size] for n in counts]
    return [best for row in rows if (best := best_of(row)) is not None]


def best_budget(results: Sequence[MeasuredPoint]) -> MeasuredPoint | None:
    """The best token budget."""
    return best_of(m for m in results if m.point.token_budget)


def frugal(points: Iterable[MeasuredPoint]) -> MeasuredPoint | None:
    """The smallest step that keeps ENOUGH of the best throughput."""
    return best_of(points, 1 / ENOUGH)


def scenario_advice(results: Sequence[MeasuredPoint]) -> list[dict[str, Any]]:
    """The best measured point for each of the four scenarios: the profile's ``situations``.

    A realtime API needs the shortest call of few pairs, offline work the highest throughput of
    many pairs, an edge machine the smallest step with nearly the full speed, and a highly
    concurrent service a token budget: its requests vary in length, so a number of pairs would
    not limit the time of a step.
    """
    counts = sorted({m.point.pairs for m in results if m.seconds})
    if not counts:
        return []
    few = [m for m in results if m.point.pairs == counts[0] and m.point.batch_size]
    many = [m for m in results if m.point.pairs == counts[-1]]
    advice = (
        ("api", "1-10", best_of(few)),
        ("offline", "50-200", best_of(many)),
        ("edge", "1-5", frugal(few)),
        ("concurrent", "any", frugal(m for m in many if m.point.token_budget)),
    )
    return [
        {"name": name, "documents": documents}
        | asdict(m.point)
        | {
            "latency_s": m.summary.median,
            "pairs_per_s": m.point.pairs / m.summary.median,
            "peak_bytes": m.peak_bytes,
        }
        for name, documents, m in advice
        if m is not None
    ]


def sweep_warnings(results: Sequence[MeasuredPoint]) -> list[str]:
    """What makes the results uncertain, each with its remedy."""
    found: list[str] = []
    noisy = [m for m in results if m.seconds and m.summary.relative_width > NOISY]
    if noisy:
        found.append(Message("sweep.noisy_points", {"noisy": len(noisy), "all": len(results)}))
    missed = [m for m in results if m.status == "not_reached"]
    if missed:
        found.append(Message("sweep.points_not_reached", {"missed": len(missed)}))
    memory = [m for m in results if m.status == "out_of_memory"]
    found += [Message("sweep.out_of_memory", {"point": m.point.label}) for m in memory]
    return found
