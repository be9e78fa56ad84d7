"""A candidate's settings under simulated load, up to the highest rate that holds. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from echelon.simulation.capacity import UNLIMITED
from echelon.simulation.rate_search import RateSearch, highest
from echelon.simulation.server_simulation import SimulationSettings, simulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echelon.scheduling.cost_model import CostModel, MemoryModel
    from echelon.scheduling.queue import PlannedStep
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.workload import Arrival, Workload
    from echelon.tuning.goal import Scenario, ScenarioLimits

REQUESTS = 2_000
"""Requests of one simulation: the slowest hundredth are twenty, and a simulation takes a third of
a second."""

WARM = 0.1
"""Share of the requests that come before counting begins."""

FULL = 300
"""Requests that are all there at once to find a candidate's highest throughput."""

APART_S = 3600.0
"""Seconds between two requests of a caller who waits for each answer: the first has long ended."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a service on this machine.

    Attributes:
        token_budget: tokens a step may cost.
        cost: how long steps of one of its workers take, the others running.
        max_pairs: pairs a step may hold.
        workers: workers that share the queue.
        threads: CPU threads of each; None on a GPU.
        precision: of the forward pass.
        max_length: tokens a pair may have; None cuts none.
        agreement: rank agreement with fp32 at full length.
        memory: of one worker; None where it is not known.
    """

    token_budget: int
    cost: CostModel
    max_pairs: int | None = None
    workers: int = 1
    threads: int | None = None
    precision: str = "fp32"
    max_length: int | None = None
    agreement: float = 1.0
    memory: MemoryModel | None = None

    @property
    def bytes(self) -> float:
        """Memory of all its workers; 0 where it is not known."""
        if self.memory is None:
            return 0.0
        return self.workers * self.memory.bytes_of(self.token_budget)


class SimulatedService:
    """A simulation of a candidate.

    Step times are those of the cost model, so the batcher would learn nothing but noise, and two
    thirds of a simulation would go into that: it does not learn here.

    Args:
        workload: the requests, at any rate.
        candidate: the settings.
        limits: service level, overhead and noise.
    """

    def __init__(self, workload: Workload, candidate: Candidate, limits: ScenarioLimits) -> None:
        self._workload = workload
        self._candidate = candidate
        self._level = limits.level
        self._settings = replace(_settings(candidate, limits), learns=False)

    def at_once(self) -> SimulationResult:
        """The result where all requests are there at once."""
        requests = [replace(one, at_s=0.0) for one in self._requests(1.0, FULL)]
        settings = replace(self._settings, bounds=UNLIMITED, request_s=0.0)
        return simulate(requests, self._candidate.cost, settings)

    def at(self, rate: float, *, whole: bool = True) -> SimulationResult:
        """The result at a rate.

        Args:
            rate: requests a second.
            whole: go on where the goal is missed for certain.
        """
        return simulate(
            self._requests(rate, REQUESTS),
            self._candidate.cost,
            self._settings,
            level=self._level,
            warm_s=WARM * self._workload.at(rate).span_s(REQUESTS),
            expected=None if whole else REQUESTS,
        )

    def _requests(self, rate: float, count: int) -> Iterator[Arrival]:
        """The first requests, cut to the candidate's maximum length."""
        return cut(islice(self._workload.at(rate).requests(), count), self._candidate.max_length)


def predict(
    scenario: Scenario, requests: Iterable[Arrival], candidate: Candidate, limits: ScenarioLimits
) -> tuple[SimulationResult, int]:
    """The result of given requests, such as a validation sends, and the largest step.

    For ``offline`` they are all there at once; for ``edge`` each comes long after the answer to the
    one before; for the others they come at their times.
    """
    settings = _settings(candidate, limits)
    if scenario == "offline":
        settings = replace(settings, bounds=UNLIMITED, request_s=0.0)
        requests = (replace(one, at_s=0.0) for one in requests)
    elif scenario == "edge":
        requests = (replace(one, at_s=APART_S * i) for i, one in enumerate(requests))
    largest = 0

    def look(_: float, step: PlannedStep) -> None:
        nonlocal largest
        largest = max(largest, step.cost_tokens)

    asked = cut(requests, candidate.max_length)
    outcome = simulate(asked, candidate.cost, settings, level=limits.level, on_step=look)
    return outcome, largest


def cut(requests: Iterable[Arrival], max_length: int | None) -> Iterator[Arrival]:
    """Requests whose pairs are cut to ``max_length`` tokens."""
    for request in requests:
        if max_length is None:
            yield request
        else:
            lengths = tuple(min(length, max_length) for length in request.lengths)
            yield replace(request, lengths=lengths)


def _settings(candidate: Candidate, limits: ScenarioLimits) -> SimulationSettings:
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
"""Distance of the search's two ends at which it is over, as a share."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """A candidate at rising rates.

    Attributes:
        requests: requests of each simulation, its warm-up included.
        max_rate: the highest rate that holds the service level, requests a second; None where
            none does.
        points: rising rates and their results.
    """

    requests: int
    max_rate: float | None
    points: tuple[tuple[float, SimulationResult], ...]

    def as_dict(self, rate: float) -> dict[str, Any]:
        """The profile's entry.

        Args:
            rate: the rate that was asked for.
        """
        return {
            "rate": rate,
            "most_rate": self.max_rate,
            "requests": self.requests,
            "points": [_point(at, outcome) for at, outcome in self.points],
        }


def curve_of(workload: Workload, candidate: Candidate, limits: ScenarioLimits) -> LoadCurve:
    """Simulate a candidate at rates around the highest that holds the service level."""
    service = SimulatedService(workload, candidate, limits)
    full = service.at_once()
    capacity = full.requests / full.duration_s
    # Beyond the highest throughput the queue only grows.
    search = RateSearch(capacity, capacity, PRECISION * capacity, PRECISION)
    max_rate = highest(lambda rate: service.at(rate, whole=False).held, search)
    rates = [share * (max_rate or capacity) for share in SHARES]
    points = tuple((rate, service.at(rate)) for rate in rates)
    return LoadCurve(REQUESTS, max_rate or None, points)


def _point(rate: float, outcome: SimulationResult) -> dict[str, Any]:
    known = outcome.as_dict()
    shown = {name: known[name] for name in ("p50_s", "p95_s", "p99_s", "goodput")}
    refused = sum(outcome.refused.values())
    return {"rate": rate} | shown | {"refused": refused / max(1, outcome.requests)}
