"""Chooses among measured and predicted points, and says how certain the choice is. Pure.

Two sizes whose medians are close are a tie, and a tie goes to the smaller step: it needs less
memory, and the next request starts sooner. A choice is certain where each other size is surely
slower or surely within the tie; the others are its rivals.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.messages import N_, Message
from echelon.messages.units import number, percent
from echelon.reports.statistics import ENOUGH, TIE, KnownValue, verdict
from echelon.tuning.load import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.tuning.sweep import MeasuredPoint, SweepPoint

NOISY = 0.10
"""Half-width of a median's interval, relative to it, above which a point is called noisy."""

API_PAIRS, EDGE_PAIRS, MANY_PAIRS = 10, 5, 50
"""Pairs of a call: at most, for a realtime API and for an edge device; at least, offline. Measured
smaller calls say less of offline work than predicted larger ones."""

NAMED = 0.05  # share of the runs, or of their time, from which a disturbance is named


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen point."""

    chosen: MeasuredPoint
    rivals: list[SweepPoint] = field(default_factory=list)  # may be as good or better

    def certainty(self) -> dict[str, Any]:
        """The part of a profile's entry that says how certain the choice is."""
        sizes = [{"batch_size": r.batch_size, "token_budget": r.token_budget} for r in self.rivals]
        return {"certain": self.chosen.measured and not sizes, "rivals": sizes}


def value_of(measured: MeasuredPoint) -> KnownValue | None:
    """A point's time: measured, else predicted; None where it is neither."""
    if measured.status == "ok":
        return measured.summary.known
    return None if measured.predicted_s is None else KnownValue(*measured.predicted_s)


def best_of(points: Sequence[MeasuredPoint], slower: float = 1 + TIE) -> Choice | None:
    """The smallest step that takes at most ``slower`` times as long as the fastest one.

    The points have the same number of pairs; the default breaks ties. Measured points are chosen
    before predicted ones, which then are rivals unless they are surely not faster; so are points
    of which nothing is known.
    """

    def may_be_as_fast(other: MeasuredPoint, value: KnownValue) -> bool:
        found = verdict(value, mine)
        return found == "unknown" or (found == "better" and not other.measured)

    valued = sorted(((m, v) for m in points if (v := value_of(m))), key=lambda mv: mv[0].point.size)
    known = [(m, v) for m, v in valued if m.measured] or valued
    if not known:
        return None
    fastest = min(value.value for _, value in known)
    chosen, mine = next((m, v) for m, v in known if v.value <= fastest * slower)
    rivals = [m.point for m, v in valued if m is not chosen and may_be_as_fast(m, v)]
    rivals += [m.point for m in points if value_of(m) is None and not m.ended]
    return Choice(chosen, sorted(rivals, key=lambda point: point.size))


def best_batches(results: Sequence[MeasuredPoint]) -> list[Choice]:
    """The best batch size for each number of pairs with timed calls, fewest pairs first."""
    counts = sorted({m.point.pairs for m in results})
    rows = [[m for m in results if m.point.pairs == n and m.point.batch_size] for n in counts]
    found = [best_of(row) for row in rows if any(m.status == "ok" for m in row)]
    return [choice for choice in found if choice is not None]


def best_budget(results: Sequence[MeasuredPoint]) -> Choice | None:
    """The best token budget, of the largest calls that were measured, else predicted."""
    return best_of(largest_calls([m for m in results if m.point.token_budget], MANY_PAIRS))


def largest_calls(
    points: Sequence[MeasuredPoint], least: int = 0, most: float = math.inf
) -> list[MeasuredPoint]:
    """The points with the most pairs, ``most`` at the most.

    Measured calls of at least ``least`` pairs count before predicted ones.
    """
    within = [m for m in points if m.point.pairs <= most]
    valued = [m for m in within if value_of(m)]
    known = [m for m in valued if m.measured and m.point.pairs >= least] or valued
    pairs = max((m.point.pairs for m in known), default=0)
    return [m for m in within if m.point.pairs == pairs]


def frugal(points: Sequence[MeasuredPoint]) -> Choice | None:
    """The smallest step that keeps ENOUGH of the best throughput."""
    return best_of(points, 1 / ENOUGH)


def scenario_advice(
    results: Sequence[MeasuredPoint],
    peak_of: Callable[[MeasuredPoint], int | None] = lambda m: m.peak_bytes,
) -> list[dict[str, Any]]:
    """The best point for each of the four scenarios: the profile's ``situations``.

    A realtime API needs the shortest call of few pairs, offline work the highest throughput of
    many pairs, an edge machine the smallest step with nearly the full speed, and a highly
    concurrent service a token budget: its requests vary in length, so a number of pairs would
    not limit the time of a step.
    """
    batches = [m for m in results if m.point.batch_size]
    budgets = [m for m in results if m.point.token_budget]
    smallest = min((m.point.pairs for m in batches), default=0)
    advice = (
        ("api", "1-10", best_of(largest_calls(batches, most=max(API_PAIRS, smallest)))),
        ("offline", "50-200", best_of(largest_calls(results, MANY_PAIRS))),
        ("edge", "1-5", frugal(largest_calls(batches, most=EDGE_PAIRS))),
        ("concurrent", N_("any"), frugal(largest_calls(budgets, MANY_PAIRS))),
    )
    return [
        {"name": name, "documents": documents} | _advised(choice, peak_of(choice.chosen))
        for name, documents, choice in advice
        if choice is not None
    ]


def _advised(choice: Choice, peak_bytes: int | None) -> dict[str, Any]:
    point, value = choice.chosen.point, value_of(choice.chosen)
    latency_s = 0.0 if value is None else value.value
    return {
        **asdict(point),
        "latency_s": latency_s,
        "pairs_per_s": point.pairs / latency_s if latency_s else 0.0,
        "peak_bytes": peak_bytes,
        "predicted": not choice.chosen.measured,
        **choice.certainty(),
    }


# What makes results uncertain.


def sweep_warnings(results: Sequence[MeasuredPoint]) -> list[str]:
    """What makes the results uncertain, each with its remedy."""
    found: list[str] = disturbances(results)
    noisy = [m for m in results if m.measured and m.summary.relative_width > NOISY]
    if noisy:
        found.append(Message("sweep.noisy_points", {"noisy": len(noisy), "all": len(results)}))
    predicted = [m for m in results if m.status == "predicted"]
    if 0 < len(predicted) < len(results):  # of a run without any, the tuner says more
        values = {"predicted": len(predicted), "all": len(results)}
        found.append(Message("sweep.points_predicted", values))
    missed = [m for m in results if m.status == "not_reached"]
    if missed:
        found.append(Message("sweep.points_not_reached", {"missed": len(missed)}))
    memory = [m for m in results if m.status == "out_of_memory"]
    found += [Message("sweep.out_of_memory", {"point": m.point.label}) for m in memory]
    return found


def disturbances(results: Sequence[MeasuredPoint]) -> list[str]:
    """What disturbed a part of the runs that is worth naming."""
    runs = [(m, run) for m in results for run in range(len(m.seconds))]
    found: list[str] = []
    for kind in KINDS:
        hit = [(m, run) for m, run in runs if run in m.disturbed and kind in m.disturbed[run].kinds]
        if _share(hit, runs) < NAMED:
            continue
        amounts = [getattr(m.disturbed[run], kind) for m, run in hit]
        share = percent(len(hit) / len(runs))
        amount, cpus = float(np.mean(amounts)), hit[0][0].disturbed[hit[0][1]].cpus
        found.append(_named(kind, amount, cpus, share))
    stalls = [(m, run) for m, run in runs if run in m.outliers and run not in m.disturbed]
    if _share(stalls, runs) >= NAMED:
        worst = max(m.seconds[run] / m.summary.median for m, run in stalls)
        values = {"count": len(stalls), "all": len(runs), "times": number(worst)}
        found.append(Message("load.outliers", values))
    return found


def _share(some: list[tuple[MeasuredPoint, int]], runs: list[tuple[MeasuredPoint, int]]) -> float:
    """Share of the runs or of their time, the larger one."""
    seconds = [sum(m.seconds[run] for m, run in part) for part in (some, runs)]
    if not seconds[1]:
        return 0.0
    return max(len(some) / len(runs), seconds[0] / seconds[1])


def _named(kind: str, amount: float, cpus: int, share: str) -> str:
    if kind == "others":
        values = {"used": f"{amount:.1f}", "cpus": cpus, "share": share}
        return Message("load.others", values)
    if kind == "stolen":
        return Message("load.stolen", {"stolen": percent(amount), "share": share})
    return Message("load.throttled", {"throttled": percent(amount), "share": share})
