"""A day of traffic: a window of each quarter of an hour, simulated request by request. Pure.

A queue forgets within seconds while the rate changes over hours, so each quarter is in the steady
state of its rate and a window tells of all of it; windows are equally long, so together they are a
fair sample of the day's requests. That holds only while the fleet keeps up: a quarter whose queue
grows all through is marked, and what it says is a lower bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import InvalidInput
from echelon.plan.workload import Poisson
from echelon.simulate.fleet import tally_fleet
from echelon.simulate.outcome import Tally, percentiles
from echelon.simulate.traffic import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.plan.workload import Workload
    from echelon.scheduling.cost_model import CostModel
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
        overfull_s: seconds of the day in which the fleet did not keep up.
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
    overfull_s: float
    parts: tuple[Part, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None where there is no latency."""
        content = asdict(self) | {
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
    latencies: list[np.ndarray[Any, np.dtype[np.float64]]] = []
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
        latencies.append(np.array(tally.latencies))
    return _day(parts, np.concatenate([np.zeros(0), *latencies]), len(rates))


def _day(parts: list[Part], latencies: np.ndarray[Any, Any], count: int) -> Day:
    p50, p95, p99 = percentiles(latencies)
    outcomes = [part.outcome for part in parts]
    simulated = sum(outcome.requests for outcome in outcomes)
    within = sum(outcome.within for outcome in outcomes)
    refused = sum(sum(outcome.refused.values()) for outcome in outcomes)
    return Day(
        requests=round(sum(part.rate for part in parts) * DAY_S / count),
        simulated=simulated,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        missed=(simulated - within) / max(1, simulated),
        refused=refused / max(1, simulated),
        utilisation=sum(outcome.utilisation for outcome in outcomes) / count,
        overfull_s=sum(part.overfull for part in parts) * DAY_S / count,
        parts=tuple(parts),
    )
