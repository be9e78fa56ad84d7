"""Latency over load: a candidate at rising rates, and the highest rate that it sustains. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.simulate.ladder import meets
from echelon.tune import served
from echelon.tune.served import Service

if TYPE_CHECKING:
    from echelon.simulate.capacity import Traffic
    from echelon.simulate.outcome import Outcome
    from echelon.tune.scenario import Candidate, Limits

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Shares of the highest rate that are simulated: closer together where latency rises steeply."""

PRECISION = 0.02
"""The last step of the search, as a share of the rate."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a candidate does at rising rates.

    Attributes:
        requests: requests of each simulation, its warm-up included.
        most: the highest rate with P99 within the goal and nothing refused, requests a second;
            None where no rate is like that.
        points: rates, rising, with what was found there.
    """

    requests: int
    most: float | None
    points: tuple[tuple[float, Outcome], ...]

    def as_dict(self, rate: float) -> dict[str, Any]:
        """The entry of a profile, for somebody who asked for a rate."""
        return {
            "rate": rate,
            "most_rate": self.most,
            "requests": self.requests,
            "points": [_point(at, outcome) for at, outcome in self.points],
        }


def curve_of(traffic: Traffic, candidate: Candidate, limits: Limits) -> Curve:
    """Simulate a candidate at rates around the highest that it sustains."""
    service = Service(traffic, candidate, limits)
    full = service.at_once()
    capacity = full.requests / full.duration_s
    most = _most(service, capacity)
    rates = [share * (most or capacity) for share in SHARES]
    points = tuple((rate, service.at(rate)) for rate in rates)
    return Curve(served.REQUESTS, most, points)


def sustains(outcome: Outcome) -> bool:
    """Whether P99 is within the goal and nobody was sent away."""
    return meets(outcome) and not outcome.refused


def _most(service: Service, capacity: float) -> float | None:
    """The highest rate that is sustained; beyond what it does at most, the queue only grows."""
    if sustains(service.at(capacity, whole=False)):
        return capacity
    low, high = 0.0, capacity
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if sustains(service.at(middle, whole=False)):
            low = middle
        else:
            high = middle
        if high < PRECISION * capacity:
            return None
    return low


def _point(rate: float, outcome: Outcome) -> dict[str, Any]:
    known = outcome.as_dict()
    shown = {name: known[name] for name in ("p50_s", "p95_s", "p99_s", "goodput")}
    refused = sum(outcome.refused.values())
    return {"rate": rate} | shown | {"refused": refused / max(1, outcome.requests)}
