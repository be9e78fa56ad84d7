"""A day of traffic: a window of each quarter of an hour, simulated request by request. Pure.

A queue forgets within seconds while the rate changes over hours, so each quarter is in the steady
state of its rate and a window tells of all of it; quarters count by the requests they have. That
holds only while the fleet keeps up: a quarter whose queue grows all through is marked, and what it
says is a lower bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import InvalidInput
from echelon.plan.workload import Poisson
from echelon.simulate.fleet import tally_fleet
from echelon.simulate.outcome import Tally
from echelon.simulate.traffic import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.plan.cost import CostModel
    from echelon.plan.workload import Workload
    from echelon.simulate.fleet import Fleet
    from echelon.simulate.outcome import Outcome

DAY_S = 86_400.0
PARTS = 96

WARM_S, WINDOW_S = 4.0, 8.0
"""Seconds of each quarter that are simulated before counting begins, and while it counts: a fleet
at 90 % that takes 0.1 s a request forgets its start in about a second."""

OVERFULL = 0.98
"""Utilisation above which a fleet no longer keeps up."""

TYPICAL = (
    *(0.35, 0.28, 0.24, 0.22, 0.22, 0.26, 0.36, 0.52),
    *(0.72, 0.88, 0.96, 0.98, 0.92, 0.95, 1.00, 0.99),
    *(0.96, 0.90, 0.84, 0.80, 0.76, 0.68, 0.56, 0.44),
)
"""Rates of a day's hours over the largest, as where most callers work by day: an assumption, not a
measurement. Give your own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A quarter of an hour.

    Attributes:
        start_s: from midnight.
        rate: requests a second.
        overfull: the fleet did not keep up.
        outcome: what its window found.
    """

    start_s: float
    rate: float
    overfull: bool
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Day:
    """A day of a fleet; percentiles and shares are of all its requests.

    Attributes:
        requests: requests of the day.
        simulated: of these, how many were simulated and counted.
        p50_s: median latency; NaN where nothing was answered, as the next ones.
        p95_s: 95th percentile.
        p99_s: 99th percentile.
        missed: share that was not answered within the goal.
        refused: share that was refused.
        utilisation: mean share of the time that workers ran.
        parts: its quarters.
    """

    requests: int
    simulated: int
    p50_s: float
    p95_s: float
    p99_s: float
    missed: float
    refused: float
    utilisation: float
    parts: tuple[Part, ...]

    @property
    def overfull_s(self) -> float:
        """Seconds of the day in which the fleet did not keep up."""
        return sum(part.overfull for part in self.parts) * DAY_S / PARTS

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None where there is no latency."""
        content = asdict(self) | {
            "overfull_s": self.overfull_s,
            "parts": [
                {
                    "start_s": part.start_s,
                    "rate": part.rate,
                    "overfull": part.overfull,
                    "outcome": part.outcome.as_dict(),
                }
                for part in self.parts
            ],
        }
        return {k: None if v != v else v for k, v in content.items()}  # noqa: PLR0124 - NaN


def rates_of(shape: Sequence[float], peak: float) -> list[float]:
    """Requests a second in each quarter: equal parts of a day, joined by straight lines.

    Args:
        shape: relative rates at equal distances, the first at midnight.
        peak: requests a second where the shape is largest.

    Raises:
        InvalidInput: the shape is empty, negative or zero throughout.
    """
    if not shape or not all(0 <= factor < np.inf for factor in shape) or not max(shape):
        raise InvalidInput("day", f"{list(shape)} is no shape", "Give factors such as 0.2,0.5,1.")
    given = np.arange(len(shape) + 1) / len(shape)
    factors = np.array([*shape, shape[0]]) / max(shape)
    found: list[float] = (peak * np.interp(np.arange(PARTS) / PARTS, given, factors)).tolist()
    return found


def simulate_day(
    workload: Workload,
    rates: Sequence[float],
    truth: CostModel,
    fleet: Fleet,
    goal_s: float | None = None,
    told: Callable[[float], None] = lambda _: None,
) -> Day:
    """A day of a fleet.

    Args:
        workload: what requests are made of; its arrivals are replaced.
        rates: requests a second in each quarter, see :func:`rates_of`.
        truth: how long steps take.
        fleet: who serves.
        goal_s: latency that an answer may have.
        told: called with the share that is done, 0 to 1.
    """
    workers = fleet.replicas * fleet.setting.workers
    parts: list[Part] = []
    tallies: list[tuple[float, Tally]] = []
    for number, rate in enumerate(rates):
        told(number / len(rates))
        if rate <= 0:
            continue
        traffic = replace(workload, arrivals=Poisson(rate), seed=workload.seed + number)
        tally = Tally(goal_s, WARM_S)
        tally_fleet(blocks(traffic, WARM_S + WINDOW_S), truth, fleet, tally)
        outcome = tally.outcome(workers)
        overfull = outcome.utilisation > OVERFULL
        parts.append(Part(number * DAY_S / len(rates), rate, overfull, outcome))
        tallies.append((rate * DAY_S / len(rates), tally))
    return _day(parts, tallies)


def _day(parts: list[Part], tallies: list[tuple[float, Tally]]) -> Day:
    counted = [(weight, tally) for weight, tally in tallies if tally.requests]
    latencies = np.concatenate([np.frombuffer(t.latencies) for _, t in counted] or [np.zeros(0)])
    weights = np.concatenate(
        [np.full(len(t.latencies), weight / t.requests) for weight, t in counted] or [np.zeros(0)]
    )
    p50, p95, p99 = weighted_percentiles(latencies, weights, (0.50, 0.95, 0.99))
    total = sum(weight for weight, _ in tallies)
    share = [
        (weight / total, part.outcome) for (weight, _), part in zip(tallies, parts, strict=True)
    ]
    return Day(
        requests=round(total),
        simulated=sum(part.outcome.requests for part in parts),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        missed=sum(w * outcome.missed for w, outcome in share),
        refused=sum(
            w * sum(outcome.refused.values()) / outcome.requests
            for w, outcome in share
            if outcome.requests
        ),
        utilisation=sum(part.outcome.utilisation for part in parts) / PARTS,
        parts=tuple(parts),
    )


def weighted_percentiles(
    values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], shares: Sequence[float]
) -> list[float]:
    """The smallest values that so much of the weight does not exceed; NaN where there are none."""
    if not len(values):
        return [float("nan")] * len(shares)
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    places = np.searchsorted(reached, np.array(shares) * reached[-1])
    return [float(values[order[min(place, len(values) - 1)]]) for place in places]
