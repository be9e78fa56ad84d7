"""The time of a tuning run: what a step costs here, and what fits in the time limit. Pure.

A few steps of two sizes price a step as ``a + b · tokens``. By that price and the limit, a run
measures fewer and smaller calls well rather than many once; what it leaves out is predicted.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.models.base import DeviceOutOfMemory
from echelon.reports.statistics import MIN_RUNS
from echelon.scheduling.cost_model import Coefficients, Work, work_of
from echelon.tuning.sweep import SweepPoint, grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from echelon.types import Clock

PRECISIONS, THREADS, PROBES, MEMORY = 0.50, 0.10, 0.20, 0.15
"""Shares of the time limit that the stages beside the sweep may take at most. The choice of a
precision comes first: it is worth more than that of a step, and the sweep predicts what it cannot
measure."""

WORKER_START_S, WORKER_OPENS = 2.0, 2.0
"""Time until a new worker answers: libraries, and this many times the opening of the model."""

RUNS = MIN_RUNS + 3
"""A warm-up and five runs: the interval of five is half as wide as that of three."""

LEAST_PAIRS = 20
"""Typical pairs that a run must have time for: the first steps and the least that a cost model can
be fitted to."""

FIRST_PAIRS = 8  # pairs of the larger step that is priced
REPEATS = 2  # of each; the faster one counts, since nothing makes a step too fast

MAX_FIRST = 0.02
"""Share of the time limit for one larger step: on a slow machine one pair is enough."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a step costs on this machine, roughly."""

    step_s: float
    token_s: float
    pair_tokens: int  # tokens of a typical pair

    @property
    def pair_s(self) -> float:
        """Seconds of a typical pair in a step of FIRST_PAIRS."""
        return self.step_s / FIRST_PAIRS + self.token_s * self.pair_tokens

    def seconds(self, work: Work) -> float:
        """Seconds of some steps."""
        return self.step_s * work.steps + self.token_s * work.tokens

    def scaled(self, usual: Coefficients) -> Coefficients:
        """Usual coefficients of a device, as fast as this machine with a step of FIRST_PAIRS."""
        step = work_of((self.pair_tokens,) * FIRST_PAIRS, "none")
        scale = max(self.seconds(step), 1e-9) / usual.seconds(step)
        return usual.with_values([scale * value for value in usual.values])


def price(
    run: Callable[[tuple[int, ...]], object], pair_tokens: int, clock: Clock, limit_s: float
) -> Price:
    """Time steps of one and of FIRST_PAIRS typical pairs, after a warm-up.

    Where the larger step does not fit in memory, a pair alone is priced; where that does not fit
    either, nothing costs anything, and the sweep finds out.
    """

    def fastest(shape: tuple[int, ...]) -> float:
        times = []
        for _ in range(REPEATS):
            began = clock()
            run(shape)
            times.append(clock() - began)
        return max(min(times), 1e-9)

    one = several = 0.0
    with suppress(DeviceOutOfMemory):
        run((pair_tokens,))
        one = fastest((pair_tokens,))
        if one * FIRST_PAIRS <= MAX_FIRST * limit_s:
            several = fastest((pair_tokens,) * FIRST_PAIRS)
    if not several:
        return Price(0.0, one / pair_tokens, pair_tokens)
    # A device that a pair does not fill: the share of a pair, not the difference.
    token_s = max(several - one, 0.0) / ((FIRST_PAIRS - 1) * pair_tokens)
    return Price(max(0.0, one - token_s * pair_tokens), token_s, pair_tokens)


class TimeBudget:
    """The time of a run that is left, from its beginning on.

    Attributes:
        limit_s: seconds of the whole run.
        open_s: seconds that opening the model took.
    """

    def __init__(self, limit_s: float, open_s: float, clock: Clock) -> None:
        self.limit_s, self.open_s = limit_s, open_s
        self._clock, self._began = clock, clock()

    @property
    def spent_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.limit_s - self.spent_s

    def affords(self, seconds: float, share: float) -> bool:
        """Whether a stage that takes so long fits in its share, and in the time left."""
        return seconds <= min(share * self.limit_s, self.left_s)

    @property
    def worker_start_s(self) -> float:
        """Seconds until a new worker process answers."""
        return WORKER_START_S + WORKER_OPENS * self.open_s

    def memory_s(self, *, in_worker: bool) -> float:
        """Seconds for the memory of a worker; 0 where it is not measured, or does not fit."""
        seconds = min(MEMORY * self.limit_s, self.left_s)
        longest = max(seconds, min(2 * MEMORY * self.limit_s, 1.5 * self.worker_start_s))
        return longest if in_worker and self.affords(self.worker_start_s, 2 * MEMORY) else 0.0

    def sweep_s(self, memory_s: float) -> float:
        """Seconds for the sweep: what probes and memory leave."""
        return max(0.0, self.left_s - memory_s - PROBES * self.limit_s)

    def limit_for(self, seconds: float) -> int:
        """A time limit that leaves so long for the sweep, whatever the memory takes."""
        return math.ceil((self.spent_s + seconds) / (1.0 - PROBES - 2 * MEMORY))


def affordable(
    pairs: Sequence[int],
    batch_sizes: Sequence[int],
    token_budgets: Sequence[int],
    seconds: Callable[[SweepPoint], float],
    limit_s: float,
) -> list[SweepPoint]:
    """The points that can get RUNS runs each within the limit: all, or the most telling ones.

    Every second size is left out before the largest calls are, and so on down to one size; where
    nothing fits, there is no point.
    """
    for points in _coarser(sorted(set(pairs)), batch_sizes, token_budgets):
        if RUNS * sum(map(seconds, points)) <= limit_s:
            return points
    return []


def more_points(
    points: Iterable[SweepPoint], seconds: Callable[[SweepPoint], float], left_s: float
) -> list[SweepPoint]:
    """The quickest of some points that can get RUNS runs each in the time left."""
    chosen: list[SweepPoint] = []
    for point in sorted(points, key=seconds):
        left_s -= RUNS * seconds(point)
        if left_s < 0:
            break
        chosen.append(point)
    return chosen


def _coarser(
    counts: Sequence[int], batch_sizes: Sequence[int], token_budgets: Sequence[int]
) -> Iterator[list[SweepPoint]]:
    """Smaller and smaller grids."""
    sizes = sorted(set(batch_sizes)), sorted(set(token_budgets))
    for last in range(len(counts), 0, -1):
        for every in (1, 2):
            yield grid(counts[:last], *(some[::every] for some in sizes))
    for every in range(3, max(map(len, sizes)) + 1):
        yield grid(counts[:1], *(some[::every] for some in sizes))
    yield grid(counts[:1], sizes[0][:1], ())
