"""How many machines a rate takes under a goal. Pure and deterministic.

A cell of machines is simulated under rising load (:mod:`echelon.simulation.outcome`); a fleet
between
two sizes of cell is as good as the smaller, and one beyond the largest as good as that: pooling
only helps. So the number of machines never goes down when the rate goes up.

A day of traffic: a window of each quarter of an hour, simulated request by request. Pure.

A queue forgets within seconds while the rate changes over hours, so each quarter is in the steady
state of its rate and a window tells of all of it; windows are equally long, so together they are a
fair sample of the day's requests. That holds only while the fleet keeps up: a quarter whose queue
grows all through is marked, and what it says is a lower bound.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits
from echelon.simulation.cluster_simulation import Cluster, packing_of, simulate_fleet, tally_fleet
from echelon.simulation.cluster_traffic import blocks
from echelon.simulation.outcome import RUNGS, RateSearch, Tally, percentiles
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import ObservedSize, PoissonArrivals, ReplayedArrivals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from echelon.scheduling.cost_model import CostModel
    from echelon.simulation.cluster_traffic import RequestBlock, Routing
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.server_simulation import SimulationSettings
    from echelon.simulation.workload import Arrivals, KnownArrivals, SizeDistribution, Workload

CELLS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes of the fleets that are simulated."""

REQUESTS = 10_000
"""Requests of one simulation: the slowest hundredth are a hundred."""

WARM = 0.1
"""Share of them that comes before counting begins."""

FULL = 2_000
"""Requests that are all there at once when it is asked what a machine does at most."""

OPEN = AdmissionLimits(2**31, 2**62, math.inf, 2**31, 2**62)
"""Bounds that refuse nothing."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests whose rate can be chosen.

    Attributes:
        workload: what they are made of; its arrivals are replaced.
        trace: recorded requests, sped up or slowed down; empty: callers who know nothing of each
            other.
        trace_rate: requests a second of the record that ``trace`` is taken from.
    """

    workload: Workload
    trace: Sequence[KnownArrivals] = ()
    trace_rate: float = 0.0

    @classmethod
    def of_trace(cls, workload: Workload, trace: Sequence[KnownArrivals]) -> Traffic:
        """The busiest :data:`REQUESTS` requests in a row of a record; its rate is the whole's.

        Raises:
            InvalidInput: all came at one moment.
        """
        span = trace[-1].at_s - trace[0].at_s
        if span <= 0:
            problem = "all its requests came at one moment, so it has no rate"
            raise InvalidInput("--trace", problem, "Record longer.")
        starts = range(max(1, len(trace) - REQUESTS + 1))
        most = min(REQUESTS, len(trace)) - 1
        start = min(starts, key=lambda at: trace[at + most].at_s - trace[at].at_s)
        return cls(workload, trace[start : start + most + 1], (len(trace) - 1) / span)

    def at(self, rate: float) -> Workload:
        """The workload at so many requests a second."""
        arrivals: Arrivals = PoissonArrivals(rate)
        if self.trace:
            arrivals = ReplayedArrivals(self.trace, rate / self.trace_rate)
        return replace(self.workload, arrivals=arrivals)

    def span_s(self, rate: float, count: int) -> float:
        """Seconds in which so many requests come, as far as the trace has them."""
        if self.trace:
            last = self.trace[min(count, len(self.trace)) - 1]
            return (last.at_s - self.trace[0].at_s) * self.trace_rate / rate
        return count / rate


class Capacity:
    """What machines of one setting can do.

    Args:
        traffic: what is asked.
        truth: how long steps take on one worker.
        setting: how a machine runs.
        level: the service level that must hold.
        routing: who gets a request.
    """

    def __init__(
        self,
        traffic: Traffic,
        truth: CostModel,
        setting: SimulationSettings,
        level: ServiceLevel,
        routing: Routing = "tokens",
    ) -> None:
        self.traffic = traffic
        self.truth = truth
        self.setting = setting
        self.level = level
        self.routing: Routing = routing
        self._ladders: dict[int, RateSearch] = {}
        self._packing = packing_of(_sizes(traffic), truth, setting.token_budget)

    @cached_property
    def most(self) -> float:
        """Requests a second that one machine does at most."""
        at_once = self.traffic.at(1e9)
        setting = replace(self.setting, bounds=OPEN, request_s=0.0, document_s=0.0)
        fleet = replace(self.fleet(1), setting=setting)
        return simulate_fleet(_first(blocks(at_once), FULL), self.truth, fleet).throughput

    def fleet(self, machines: int) -> Cluster:
        """So many machines."""
        return Cluster(machines, self.setting, self.routing, self._packing)

    def ladder(self, machines: int) -> RateSearch:
        """The largest cell that is not larger than so many machines, under rising load."""
        cell = CELLS[bisect_right(CELLS, machines) - 1]
        if cell not in self._ladders:
            self._ladders[cell] = RateSearch(lambda load: self._run(cell, load))
        return self._ladders[cell]

    def machines(self, rate: float, most: float = math.inf) -> int | None:
        """The fewest machines for a rate; None where no number, or only more than ``most``, do."""
        if not self.ladder(CELLS[-1]).calm.held:
            return None
        machines = max(1, math.ceil(rate / (RUNGS[-1] * self.most)))
        while machines < CELLS[-1]:
            if machines > most:
                return None
            if self.at(rate, machines) is not None:
                return machines
            machines += 1
        bears = self.ladder(CELLS[-1]).most
        if not bears:
            return None
        machines = max(machines, math.ceil(rate / (bears * self.most)))
        while self.at(rate, machines) is None:
            machines += 1  # the division was rounded down by a hair
        return machines if machines <= most else None

    def at(self, rate: float, machines: int) -> SimulationResult | None:
        """What the simulation found for so many machines; None where they miss the goal."""
        return self.ladder(machines).at(rate / (machines * self.most))

    def bears(self, machines: int) -> float:
        """Requests a second up to which so many machines meet the goal."""
        return self.ladder(machines).most * machines * self.most

    def _run(self, machines: int, load: float) -> SimulationResult:
        rate = load * machines * self.most
        traffic = _first(blocks(self.traffic.at(rate)), REQUESTS)
        warm_s = WARM * self.traffic.span_s(rate, REQUESTS)
        fleet = self.fleet(machines)
        return simulate_fleet(traffic, self.truth, fleet, level=self.level, warm_s=warm_s)


def _sizes(traffic: Traffic) -> SizeDistribution:
    """Lengths of pairs, to learn how steps come out."""
    known = [one.tokens for one in traffic.trace if one.tokens]
    if known:
        return ObservedSize(known)
    if traffic.workload.tokens is None:
        raise InvalidInput("tokens", "the lengths of pairs are not known", "Give them.")
    return traffic.workload.tokens


def _first(traffic: Iterator[RequestBlock], count: int) -> Iterator[RequestBlock]:
    """The first so many requests."""
    for block in traffic:
        yield block.first(count)
        count -= len(block.at_s)
        if count <= 0:
            return


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
class DayPart:
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
    outcome: SimulationResult


@dataclass(frozen=True, slots=True)
class DayResult:
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
    parts: tuple[DayPart, ...]

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
    fleet: Cluster,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    told: Callable[[float], None] = lambda _: None,
) -> DayResult:
    """A day of a fleet.

    Args:
        workload: what requests are made of; its arrivals are replaced.
        rates: requests a second in each quarter, see :func:`rates_of`.
        truth: how long steps take.
        fleet: who serves.
        level: what counts as answered in time.
        told: called with the share that is done, 0 to 1.
    """
    workers = fleet.replicas * fleet.setting.workers
    parts: list[DayPart] = []
    latencies: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for number, rate in enumerate(rates):
        told(number / len(rates))
        if rate <= 0:
            continue
        traffic = replace(workload, arrivals=PoissonArrivals(rate), seed=workload.seed + number)
        tally = Tally(level, WARM_S)
        tally_fleet(blocks(traffic, WARM_S + WINDOW_S), truth, fleet, tally)
        outcome = tally.outcome(workers)
        overfull = outcome.utilisation > OVERFULL
        parts.append(DayPart(number * DAY_S / len(rates), rate, overfull, outcome))
        latencies.append(np.array(tally.latencies))
    return _day(parts, np.concatenate([np.zeros(0), *latencies]), len(rates))


def _day(parts: list[DayPart], latencies: np.ndarray[Any, Any], count: int) -> DayResult:
    p50, p95, p99 = percentiles(latencies)
    outcomes = [part.outcome for part in parts]
    simulated = sum(outcome.requests for outcome in outcomes)
    within = sum(outcome.within for outcome in outcomes)
    refused = sum(sum(outcome.refused.values()) for outcome in outcomes)
    return DayResult(
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
