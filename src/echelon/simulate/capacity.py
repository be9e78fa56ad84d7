"""How many machines a rate takes under a goal. Pure and deterministic.

A cell of machines is simulated under rising load (:mod:`echelon.simulate.ladder`); a fleet between
two sizes of cell is as good as the smaller, and one beyond the largest as good as that: pooling
only helps. So the number of machines never goes down when the rate goes up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.plan.workload import Observed, Poisson, Replay
from echelon.scheduling.admission import AdmissionLimits
from echelon.simulate.fleet import Fleet, packing_of, simulate_fleet
from echelon.simulate.ladder import RUNGS, Ladder, meets
from echelon.simulate.traffic import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echelon.plan.workload import Arrivals, Known, Sizes, Workload
    from echelon.scheduling.cost_model import CostModel
    from echelon.simulate.outcome import Outcome
    from echelon.simulate.routing import Routing
    from echelon.simulate.setting import Setting
    from echelon.simulate.traffic import Block

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
    trace: Sequence[Known] = ()
    trace_rate: float = 0.0

    @classmethod
    def of_trace(cls, workload: Workload, trace: Sequence[Known]) -> Traffic:
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
        arrivals: Arrivals = Poisson(rate)
        if self.trace:
            arrivals = Replay(self.trace, rate / self.trace_rate)
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
        goal_s: latency that 99 of 100 requests may have.
        routing: who gets a request.
    """

    def __init__(
        self,
        traffic: Traffic,
        truth: CostModel,
        setting: Setting,
        goal_s: float,
        routing: Routing = "tokens",
    ) -> None:
        self.traffic = traffic
        self.truth = truth
        self.setting = setting
        self.goal_s = goal_s
        self.routing: Routing = routing
        self._ladders: dict[int, Ladder] = {}
        self._packing = packing_of(_sizes(traffic), truth, setting.token_budget)

    @cached_property
    def most(self) -> float:
        """Requests a second that one machine does at most."""
        at_once = self.traffic.at(1e9)
        setting = replace(self.setting, bounds=OPEN, request_s=0.0, document_s=0.0)
        fleet = replace(self.fleet(1), setting=setting)
        return simulate_fleet(_first(blocks(at_once), FULL), self.truth, fleet).throughput

    def fleet(self, machines: int) -> Fleet:
        """So many machines."""
        return Fleet(machines, self.setting, self.routing, self._packing)

    def ladder(self, machines: int) -> Ladder:
        """The largest cell that is not larger than so many machines, under rising load."""
        cell = CELLS[bisect_right(CELLS, machines) - 1]
        if cell not in self._ladders:
            self._ladders[cell] = Ladder(lambda load: self._run(cell, load))
        return self._ladders[cell]

    def machines(self, rate: float, most: float = math.inf) -> int | None:
        """The fewest machines for a rate; None where no number, or only more than ``most``, do."""
        if not meets(self.ladder(CELLS[-1]).calm):
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

    def at(self, rate: float, machines: int) -> Outcome | None:
        """What the simulation found for so many machines; None where they miss the goal."""
        return self.ladder(machines).at(rate / (machines * self.most))

    def bears(self, machines: int) -> float:
        """Requests a second up to which so many machines meet the goal."""
        return self.ladder(machines).most * machines * self.most

    def _run(self, machines: int, load: float) -> Outcome:
        rate = load * machines * self.most
        traffic = _first(blocks(self.traffic.at(rate)), REQUESTS)
        warm_s = WARM * self.traffic.span_s(rate, REQUESTS)
        fleet = self.fleet(machines)
        return simulate_fleet(traffic, self.truth, fleet, goal_s=self.goal_s, warm_s=warm_s)


def _sizes(traffic: Traffic) -> Sizes:
    """Lengths of pairs, to learn how steps come out."""
    known = [one.tokens for one in traffic.trace if one.tokens]
    if known:
        return Observed(known)
    if traffic.workload.tokens is None:
        raise InvalidInput("tokens", "the lengths of pairs are not known", "Give them.")
    return traffic.workload.tokens


def _first(traffic: Iterator[Block], count: int) -> Iterator[Block]:
    """The first so many requests."""
    for block in traffic:
        yield block.first(count)
        count -= len(block.at_s)
        if count <= 0:
            return
