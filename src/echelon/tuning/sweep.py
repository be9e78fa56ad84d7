"""Measures many step sizes side by side, as long as more runs can change what is chosen. Pure.

Clock, work and the watch over the machine are arguments. Points are measured in turn, one run per
round, so a slow-down of the machine affects all alike. After MIN_RUNS runs of each, only those that
may still be the best of their row get more.

A run during which something else used the processors is marked and repeated while time allows; a
run far slower than the others of its point is an outlier, not spread.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from echelon.messages import Message, tr, translated
from echelon.models.base import DeviceOutOfMemory
from echelon.progress import Progress, no_progress
from echelon.reports.statistics import MIN_RUNS, Statistics, summarize, verdict
from echelon.tuning.load import Disturbance, Watch, nothing_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.types import Clock

Status = Literal["ok", "predicted", "out_of_memory", "skipped", "not_reached"]

TIGHT = 0.03  # a point is known well enough when the interval of its median is within ±3 %
MAX_SAMPLES = 60  # runs after which a point that is still not tight is left as it is
TURN_S, TURN_RUNS = 0.3, 5
"""After its first runs a quick point runs up to so often in its turn, for so long: the slow
points of a round cost far more, and a few runs of a quick one leave it uncertain for nothing."""

MAX_REPEATS = 3 * MIN_RUNS  # runs of a point that was disturbed each time

SLOW_S = 1.0
"""A first run that takes this long needs no warm-up: start-up costs are some milliseconds."""

FAR, FAR_RATIO = 5.0, 1.25
"""A run is an outlier where it is slower than its median by this multiple of the usual deviation of
all runs, and by this factor."""

USUAL = 0.01  # least deviation that is taken for usual: 1 %


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
        if self.batch_size == 1:
            return Message("sweep.point_single", {"pairs": self.pairs})
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
    step_s: float = 0.0  # part of the seconds in forward passes


@dataclass(slots=True)
class MeasuredPoint:
    """What is known of a point."""

    point: SweepPoint
    status: Status = "not_reached"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)  # of all runs
    tokens: int = 0
    cost_tokens: int = 0
    steps: int = 0
    peak_bytes: int | None = None
    step_s: list[float] = field(default_factory=list)  # beside ``seconds``
    disturbed: dict[int, Disturbance] = field(default_factory=dict)  # by index of the run
    outliers: set[int] = field(default_factory=set)  # indices of runs far slower than the others
    predicted_s: tuple[float, float, float] | None = None  # median and the ends of its interval

    @property
    def used(self) -> list[int]:
        """The runs that the median is of: the undisturbed ones, if there are enough.

        Where there are not, what disturbs belongs to the machine, and so do the slow runs that it
        explains.
        """
        every = range(len(self.seconds))
        usual = [run for run in every if run not in self.outliers | self.disturbed.keys()]
        if len(usual) >= MIN_RUNS:
            return usual
        explained = [run for run in every if run not in self.outliers or run in self.disturbed]
        return explained or list(every)

    @property
    def summary(self) -> Statistics:
        """Statistics of the timed runs; only where there is one."""
        used = self.used
        outliers = [self.seconds[run] for run in self.outliers if run not in used]
        return summarize([self.seconds[run] for run in used], outliers)

    @property
    def measured(self) -> bool:
        """Whether there are enough runs to say how certain they are."""
        return len(self.used) >= MIN_RUNS

    @property
    def ended(self) -> bool:
        """Whether it can never be known."""
        return self.status in {"out_of_memory", "skipped"}

    def add(self, run: SweepRun, disturbance: Disturbance | None) -> None:
        """Keep one run."""
        self.status = "ok"
        if disturbance is not None:
            self.disturbed[len(self.seconds)] = disturbance
        self.seconds.append(run.seconds)
        self.step_s.append(run.step_s)
        self.tokens, self.cost_tokens, self.steps = run.tokens, run.cost_tokens, run.steps
        if run.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, run.peak_bytes)

    def forget(self) -> None:
        """Drop all runs."""
        self.seconds.clear()
        self.step_s.clear()
        self.disturbed.clear()
        self.outliers.clear()

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry for this point; times in seconds, rates a second."""
        known = asdict(self.point) | {"status": self.status, "reason": self.reason}
        if self.predicted_s is not None:
            low, high = self.predicted_s[1:]
            known["predicted_s"] = {"median": self.predicted_s[0], "low": low, "high": high}
        if not self.seconds:
            return known
        runs = {
            "seconds": self.seconds,
            "step_s": self.step_s,
            "disturbed": [{"run": run, **d.as_dict()} for run, d in self.disturbed.items()],
            "outliers": sorted(self.outliers),
            "tokens": self.tokens,
            "cost_tokens": self.cost_tokens,
            "padding_share": 1 - self.tokens / self.cost_tokens if self.cost_tokens else 0.0,
            "steps": self.steps,
            "peak_bytes": self.peak_bytes,
        }
        return known | runs | (self._rates() if self.status == "ok" else {})

    def _rates(self) -> dict[str, Any]:
        summary, latencies = self.summary, ("median", "low", "high", "p95", "p99")
        return {
            "samples": summary.samples,
            "latency_s": {name: getattr(summary, name) for name in latencies},
            "pairs_per_s": self.point.pairs / summary.median,
            "tokens_per_s": self.tokens / summary.median,
        }

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> MeasuredPoint:
        """Restore a point from its profile entry."""
        point = SweepPoint(known["pairs"], known["batch_size"], known["token_budget"])
        measured = cls(point, known["status"], known["reason"], list(known.get("seconds", [])))
        for name in ("tokens", "cost_tokens", "steps", "peak_bytes"):
            setattr(measured, name, known.get(name, getattr(measured, name)))
        measured.step_s = list(known.get("step_s", [0.0] * len(measured.seconds)))
        measured.outliers = set(known.get("outliers", ()))
        for found in known.get("disturbed", ()):
            run, values = found["run"], {k: v for k, v in found.items() if k != "run"}
            measured.disturbed[run] = Disturbance(**values)
        predicted = known.get("predicted_s")
        if predicted is not None:
            measured.predicted_s = (predicted["median"], predicted["low"], predicted["high"])
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
    expected_s: Callable[[SweepPoint], float] = lambda _: 0.0,
    warm_runs: int = 1,
    watch: Watch = nothing_known,
    known: Sequence[MeasuredPoint] = (),
    save: Callable[[list[MeasuredPoint]], None] = lambda _: None,
    on_progress: Progress = no_progress,
) -> list[MeasuredPoint]:
    """Measure points in turn until nothing more can change the choice, or the time is up.

    The first ``warm_runs`` runs of a point are not counted; where that is one, a run so slow that
    start-up costs do not matter counts. No run starts that would end after ``limit_s``, by the runs
    before it or by ``expected_s``; where not all points can get MIN_RUNS runs, the quickest
    ones do. A sweep resumes from ``known`` results; ``save`` gets all results after each run.
    """
    before = {measured.point: measured for measured in known}
    results = [before.get(point, MeasuredPoint(point)) for point in points]
    started = clock()

    def left() -> float:
        return limit_s - (clock() - started)

    while turn := _within(open_points(results), left(), expected_s, warm_runs):
        for measured in turn:
            if measured.ended or _run_s(measured, expected_s, warm_runs) > left():
                continue
            # Share of the points finished or of the time used: the larger of the two.
            finished = 1 - len(open_points(results)) / len(results)
            share = min(1.0, max(finished, 1 - left() / limit_s))
            on_progress(tr("measuring {point}", point=translated(measured.point.label)), share, 1.0)
            for _ in range(_runs_in_turn(measured, left())):
                _measure(measured, results, run, watch, warm_runs)
                save(results)
                if measured.ended:
                    break
        _mark_outliers(results)
    for measured in results:
        if measured.status == "not_reached":
            measured.reason = Message("sweep.time_limit")
    return results


def open_points(results: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """The points that need more runs: too few yet, or one that may be the best of its row."""
    rows = {m.point.row: [o for o in results if o.point.row == m.point.row] for m in results}
    return [m for m in results if _open(m, rows[m.point.row])]


def _open(measured: MeasuredPoint, row: Sequence[MeasuredPoint]) -> bool:
    if measured.ended:
        return False
    runs, undisturbed = len(measured.seconds), set(measured.used) - set(measured.disturbed)
    if not measured.measured or (len(undisturbed) < MIN_RUNS and runs < MAX_REPEATS):
        return runs < MAX_SAMPLES
    if runs >= MAX_SAMPLES or measured.summary.relative_width <= TIGHT:
        return False
    others = [other.summary for other in row if other is not measured and other.measured]
    if surely_slower(measured.summary, others):
        return False
    unsure = [verdict(measured.summary.known, other.known) == "unknown" for other in others]
    return not unsure or any(unsure)


def surely_slower(mine: Statistics, others: Iterable[Statistics]) -> bool:
    """Whether the whole interval is above that of another point."""
    if mine.low is None:
        return False
    return any(other.high is not None and mine.low > other.high for other in others)


def _within(
    open_: list[MeasuredPoint],
    left_s: float,
    expected_s: Callable[[SweepPoint], float],
    warm_runs: int,
) -> list[MeasuredPoint]:
    """The points to run in this round, in their order: those whose missing runs fit in the time."""
    chosen = set()
    for measured in sorted(open_, key=lambda m: _missing_s(m, expected_s, warm_runs)):
        left_s -= _missing_s(measured, expected_s, warm_runs)
        if left_s > 0:
            chosen.add(measured.point)
    return [measured for measured in open_ if measured.point in chosen]


def _missing_s(
    measured: MeasuredPoint, expected_s: Callable[[SweepPoint], float], warm_runs: int
) -> float:
    """Seconds until a point has MIN_RUNS runs; of one more where it has them."""
    return max(1, MIN_RUNS - len(measured.used)) * _run_s(measured, expected_s, warm_runs)


def _run_s(
    measured: MeasuredPoint, expected_s: Callable[[SweepPoint], float], warm_runs: int
) -> float:
    """Seconds of the next run, with its warm-ups if it is the first.

    A single run may have been a stall: it counts for at most twice what was expected.
    """
    expected = expected_s(measured.point)
    if len(measured.seconds) == 1 and expected:
        return min(measured.seconds[0], 2 * expected)
    if measured.seconds:
        return min(measured.seconds)
    return expected if warm_runs == 1 and expected >= SLOW_S else (1 + warm_runs) * expected


def _runs_in_turn(measured: MeasuredPoint, left_s: float) -> int:
    """One until the point has MIN_RUNS runs; then as many as a turn has time for."""
    if not measured.measured:
        return 1
    run_s = max(*measured.seconds, 1e-9)
    return max(1, min(TURN_RUNS, int(min(TURN_S, left_s) / run_s)))


def _measure(
    measured: MeasuredPoint,
    results: list[MeasuredPoint],
    run: Callable[[SweepPoint], SweepRun],
    watch: Watch,
    warm_runs: int,
) -> None:
    try:
        seen = run(measured.point)
        if not measured.seconds and (warm_runs > 1 or seen.seconds < SLOW_S):
            for _ in range(warm_runs):
                seen = run(measured.point)
        measured.add(seen, watch(seen.seconds))
    except DeviceOutOfMemory as error:
        _out_of_memory(measured, results, str(error))


def _out_of_memory(measured: MeasuredPoint, results: list[MeasuredPoint], reason: str) -> None:
    measured.status, measured.reason = "out_of_memory", reason.splitlines()[0]
    measured.forget()
    for larger in results:
        if larger.point.row == measured.point.row and larger.point.size > measured.point.size:
            larger.status = "skipped"
            size = measured.point.size
            larger.reason = Message("sweep.smaller_out_of_memory", {"size": size})
            larger.forget()


def _mark_outliers(results: Iterable[MeasuredPoint]) -> None:
    """Mark runs far slower than the median of their point, by the deviations of all points.

    Few runs of one point say little of what is usual; those of all points do.
    """
    known = [m for m in results if len(m.seconds) >= MIN_RUNS and min(m.seconds) > 0]
    off = [np.log(np.array(m.seconds) / np.median(m.seconds)) for m in known]
    if not off:
        return
    usual = max(USUAL, 1.4826 * float(np.median(np.abs(np.concatenate(off)))))
    fence = max(FAR * usual, math.log(FAR_RATIO))
    for measured, each in zip(known, off, strict=True):
        measured.outliers = set(np.flatnonzero(each > fence).tolist())
