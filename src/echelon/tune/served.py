"""A candidate under requests: what the real batcher and admission make of it, simulated. Pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from echelon.simulate.capacity import OPEN
from echelon.simulate.exact import simulate
from echelon.simulate.ladder import MISSES
from echelon.simulate.setting import Setting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echelon.plan.workload import Arrival
    from echelon.scheduling.queue import PlannedStep
    from echelon.simulate.capacity import Traffic
    from echelon.simulate.outcome import Outcome
    from echelon.tune.scenario import Candidate, Limits, Scenario

REQUESTS = 2_000
"""Requests of one simulation: the slowest hundredth are twenty, and a simulation takes a third of
a second."""

WARM = 0.1
"""Share of them that comes before counting begins."""

FULL = 300
"""Requests that are all there at once when it is asked what a candidate does at most."""

APART_S = 3600.0
"""Seconds between two requests of a caller who waits for each answer: the first has long ended."""


class Service:
    """A candidate, simulated.

    Step times are the model's own here, so the batcher's copy of it has nothing to learn but noise,
    and two thirds of a simulation would go into that.

    Args:
        traffic: what requests are made of.
        candidate: who serves.
        limits: goal, overhead and noise.
    """

    def __init__(self, traffic: Traffic, candidate: Candidate, limits: Limits) -> None:
        self._traffic = traffic
        self._candidate = candidate
        self._goal_s = limits.goal_s
        self._setting = replace(_setting(candidate, limits), learns=False)

    def at_once(self) -> Outcome:
        """All requests are there."""
        requests = [replace(one, at_s=0.0) for one in self._requests(1.0, FULL)]
        setting = replace(self._setting, bounds=OPEN, request_s=0.0)
        return simulate(requests, self._candidate.cost, setting)

    def at(self, rate: float, *, whole: bool = True) -> Outcome:
        """So many requests a second.

        Args:
            rate: requests a second.
            whole: go on where the goal is missed for certain.
        """
        return simulate(
            self._requests(rate, REQUESTS),
            self._candidate.cost,
            self._setting,
            goal_s=self._goal_s,
            warm_s=WARM * self._traffic.span_s(rate, REQUESTS),
            most_missed=None if whole else MISSES * REQUESTS,
        )

    def _requests(self, rate: float, count: int) -> Iterator[Arrival]:
        """The first requests, cut to the candidate's length."""
        return cut(islice(self._traffic.at(rate).requests(), count), self._candidate.max_length)


def predict(
    scenario: Scenario, requests: Iterable[Arrival], candidate: Candidate, limits: Limits
) -> tuple[Outcome, int]:
    """What comes of certain requests, such as those that a test sends; and their largest step.

    For ``offline`` they are all there at once, for ``edge`` each comes when the one before has
    long been answered; for the others they come at their times.
    """
    setting, goal_s = _setting(candidate, limits), limits.goal_s
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
    outcome = simulate(asked, candidate.cost, setting, goal_s=goal_s, told=look)
    return outcome, largest


def cut(requests: Iterable[Arrival], most: int | None) -> Iterator[Arrival]:
    """Requests whose pairs have at most so many tokens."""
    for request in requests:
        if most is None:
            yield request
        else:
            yield replace(request, lengths=tuple(min(length, most) for length in request.lengths))


def _setting(candidate: Candidate, limits: Limits) -> Setting:
    return Setting(
        candidate.token_budget,
        candidate.max_pairs,
        candidate.workers,
        request_s=limits.overhead_s,
        noise=limits.noise,
        seed=limits.seed,
    )
