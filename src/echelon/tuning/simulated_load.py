"""A candidate under requests: what the real batcher and admission make of it, simulated. Pure.

Latency over load: a candidate at rising rates, and the highest rate that it sustains. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from echelon.simulation.capacity import OPEN
from echelon.simulation.server_simulation import SimulationSettings, simulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echelon.scheduling.queue import PlannedStep
    from echelon.simulation.capacity import Traffic
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.workload import Arrival
    from echelon.tuning.scenario import Candidate, Scenario, ScenarioLimits

REQUESTS = 2_000
"""Requests of one simulation: the slowest hundredth are twenty, and a simulation takes a third of
a second."""

WARM = 0.1
"""Share of them that comes before counting begins."""

FULL = 300
"""Requests that are all there at once when it is asked what a candidate does at most."""

APART_S = 3600.0
"""Seconds between two requests of a caller who waits for each answer: the first has long ended."""


class SimulatedService:
    """A candidate, simulated.

    Step times are the model's own here, so the batcher's copy of it has nothing to learn but noise,
    and two thirds of a simulation would go into that.

    Args:
        traffic: what requests are made of.
        candidate: who serves.
        limits: goal, overhead and noise.
    """

    def __init__(self, traffic: Traffic, candidate: Candidate, limits: ScenarioLimits) -> None:
        self._traffic = traffic
        self._candidate = candidate
        self._level = limits.level
        self._setting = replace(_setting(candidate, limits), learns=False)

    def at_once(self) -> SimulationResult:
        """All requests are there."""
        requests = [replace(one, at_s=0.0) for one in self._requests(1.0, FULL)]
        setting = replace(self._setting, bounds=OPEN, request_s=0.0)
        return simulate(requests, self._candidate.cost, setting)

    def at(self, rate: float, *, whole: bool = True) -> SimulationResult:
        """So many requests a second.

        Args:
            rate: requests a second.
            whole: go on where the goal is missed for certain.
        """
        return simulate(
            self._requests(rate, REQUESTS),
            self._candidate.cost,
            self._setting,
            level=self._level,
            warm_s=WARM * self._traffic.span_s(rate, REQUESTS),
            expected=None if whole else REQUESTS,
        )

    def _requests(self, rate: float, count: int) -> Iterator[Arrival]:
        """The first requests, cut to the candidate's length."""
        return cut(islice(self._traffic.at(rate).requests(), count), self._candidate.max_length)


def predict(
    scenario: Scenario, requests: Iterable[Arrival], candidate: Candidate, limits: ScenarioLimits
) -> tuple[SimulationResult, int]:
    """What comes of certain requests, such as those that a test sends; and their largest step.

    For ``offline`` they are all there at once, for ``edge`` each comes when the one before has
    long been answered; for the others they come at their times.
    """
    setting = _setting(candidate, limits)
    if scenario == "offline":
        setting = replace(setting, bounds=OPEN, request_s=0.0)
        requests = (replace(one, at_s=0.0) for one in requests)
    elif scenario == "edge":
        requests = (replace(one, at_s=APART_S * i) for i, one in enumerate(requests))
    largest = 0

    def look(_: float, step: PlannedStep) -> None:
        nonlocal largest
        largest = max(largest, step.cost_tokens)

    asked = cut(requests, candidate.max_length)
    outcome = simulate(asked, candidate.cost, setting, level=limits.level, told=look)
    return outcome, largest


def cut(requests: Iterable[Arrival], most: int | None) -> Iterator[Arrival]:
    """Requests whose pairs have at most so many tokens."""
    for request in requests:
        if most is None:
            yield request
        else:
            yield replace(request, lengths=tuple(min(length, most) for length in request.lengths))


def _setting(candidate: Candidate, limits: ScenarioLimits) -> SimulationSettings:
    return SimulationSettings(
        candidate.token_budget,
        candidate.max_pairs,
        candidate.workers,
        request_s=limits.overhead_s,
        noise=limits.noise,
        seed=limits.seed,
    )


SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Shares of the highest rate that are simulated: closer together where latency rises steeply."""

PRECISION = 0.02
"""The last step of the search, as a share of the rate."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """What a candidate does at rising rates.

    Attributes:
        requests: requests of each simulation, its warm-up included.
        most: the highest rate at which the service level holds, requests a second; None where it
            holds at none.
        points: rates, rising, with what was found there.
    """

    requests: int
    most: float | None
    points: tuple[tuple[float, SimulationResult], ...]

    def as_dict(self, rate: float) -> dict[str, Any]:
        """The entry of a profile, for somebody who asked for a rate."""
        return {
            "rate": rate,
            "most_rate": self.most,
            "requests": self.requests,
            "points": [_point(at, outcome) for at, outcome in self.points],
        }


def curve_of(traffic: Traffic, candidate: Candidate, limits: ScenarioLimits) -> LoadCurve:
    """Simulate a candidate at rates around the highest that it sustains."""
    service = SimulatedService(traffic, candidate, limits)
    full = service.at_once()
    capacity = full.requests / full.duration_s
    most = _most(service, capacity)
    rates = [share * (most or capacity) for share in SHARES]
    points = tuple((rate, service.at(rate)) for rate in rates)
    return LoadCurve(REQUESTS, most, points)


def _most(service: SimulatedService, capacity: float) -> float | None:
    """The highest rate that is sustained; beyond what it does at most, the queue only grows."""
    if service.at(capacity, whole=False).held:
        return capacity
    low, high = 0.0, capacity
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if service.at(middle, whole=False).held:
            low = middle
        else:
            high = middle
        if high < PRECISION * capacity:
            return None
    return low


def _point(rate: float, outcome: SimulationResult) -> dict[str, Any]:
    known = outcome.as_dict()
    shown = {name: known[name] for name in ("p50_s", "p95_s", "p99_s", "goodput")}
    refused = sum(outcome.refused.values())
    return {"rate": rate} | shown | {"refused": refused / max(1, outcome.requests)}
