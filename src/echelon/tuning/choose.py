"""From measurements to settings. Pure.

Two sizes whose medians are close are a tie, and a tie goes to the smaller step: it needs less
memory and lets the next request in sooner.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from echelon.reports.html import kept
from echelon.reports.statistics import ENOUGH, TIE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.tuning.sweep import MeasuredPoint


@dataclass(frozen=True, slots=True)
class ScenarioAdvice:
    """Advice for one of the four situations.

    Attributes:
        name: ``api``, ``offline``, ``edge`` or ``concurrent``.
        documents: what the situation is about, in documents a request.
        pairs: pairs of the measured call that the advice rests on.
        batch_size: pairs a step; None leaves it to the token budget.
        token_budget: tokens a step; None leaves it to the batch size.
        latency_s: measured median of a call.
        pairs_per_s: measured throughput.
        peak_bytes: measured peak memory; None where it could not be read.
    """

    name: str
    documents: str
    pairs: int
    batch_size: int | None
    token_budget: int | None
    latency_s: float
    pairs_per_s: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the profile."""
        return asdict(self)


def best_of(points: Iterable[MeasuredPoint]) -> MeasuredPoint | None:
    """The fastest of some points of one number of pairs; ties go to the smallest step."""
    known = sorted((m for m in points if m.seconds), key=lambda m: m.point.size)
    if not known:
        return None
    fastest = min(known, key=lambda m: m.summary.median)
    most = fastest.summary.median * (1 + TIE)
    return next(m for m in known if m.summary.median <= most)


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
    known = sorted((m for m in points if m.seconds), key=lambda m: m.point.size)
    if not known:
        return None
    fastest = min(m.summary.median for m in known)
    return next(m for m in known if m.summary.median * ENOUGH <= fastest)


def situations(results: Sequence[MeasuredPoint]) -> list[ScenarioAdvice]:
    """What to do in the four situations, as far as the measured points tell.

    A realtime API wants the shortest call of few pairs, offline work the highest throughput of
    many, an edge machine the smallest step that keeps nearly all of the speed, and a highly
    concurrent service a token budget: its requests vary, so counting pairs would not bound a
    step's time.
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
    return [_situation(name, documents, m) for name, documents, m in advice if m is not None]


def _situation(name: str, documents: str, measured: MeasuredPoint) -> ScenarioAdvice:
    median = measured.summary.median
    return ScenarioAdvice(
        name=name,
        documents=documents,
        pairs=measured.point.pairs,
        batch_size=measured.point.batch_size,
        token_budget=measured.point.token_budget,
        latency_s=median,
        pairs_per_s=measured.point.pairs / median,
        peak_bytes=measured.peak_bytes,
    )


NOISY = 0.10
"""Half-width of a median's interval, relative to it, above which a point is called noisy."""


def cautions(results: Sequence[MeasuredPoint]) -> list[str]:
    """What to know before trusting the numbers; each names its remedy."""
    found = []
    noisy = [m for m in results if m.seconds and m.summary.relative_width > NOISY]
    if noisy:
        found.append(
            kept(
                "{noisy} of {all} points are known to no better than ±10 %. Close other programs, "
                "or raise --time-limit.",
                noisy=len(noisy),
                all=len(results),
            )
        )
    missed = [m for m in results if m.status == "not_reached"]
    if missed:
        found.append(
            kept(
                "{missed} points were not reached in time. Raise --time-limit, or give fewer "
                "sizes.",
                missed=len(missed),
            )
        )
    memory = [m for m in results if m.status == "out_of_memory"]
    found += [
        kept("{point}: out of memory. Larger steps were skipped; stay below.", point=m.point.label)
        for m in memory
    ]
    return found
