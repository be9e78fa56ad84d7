"""Probes: a few steps of chosen shapes, measured in turn, for :mod:`echelon.scheduling.fit`.

Which shapes tell most is decided before anything is measured, from the default prices: each shape
is a row of the least-squares problem, and the next of its size is the one that adds most to what is
known of the prices together (the determinant of the information matrix; Fedorov, Theory of Optimal
Experiments, 1972). A third are of mixed lengths, and so are all those that check the fit.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import Probe
from echelon.scheduling.packing import step_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.scheduling.cost_model import Coefficients
    from echelon.tuning.machine import Meter
    from echelon.types import Clock, Padding

Lengths = tuple[int, ...]
"""One shape: tokens of each pair."""

PROBES, CHECKS = 24, 10
"""Shapes to fit, and to check."""

MIXED = 8
"""Probes of mixed lengths, as the checks: what the formula leaves out, they average."""

ROUNDS = 9
"""Repeats after which medians gain little."""

FEWEST_ROUNDS = 3
"""Repeats without which a median says nothing of its certainty; the time is planned for them."""

QUIET = 0.01
"""Where repeats differ by less than this, more of them would tell nothing new."""

SHORTEST = 16
"""Tokens of the shortest pair: special tokens and some words of query and document."""

FULL_SHARE = 0.25
"""Part of a round's time that the single slowest shape may take."""

OF_A_SIZE = 2
"""Shapes of about one size at most, one of every size first: the optimum alone would be a few
extreme shapes, and would not see where a device is not as the formula says."""


@dataclass(frozen=True, slots=True)
class LengthRange:
    """What steps there may be.

    Attributes:
        longest: tokens of the longest pair.
        budget: tokens of the largest step.
        padding: how the scorer pays.
    """

    longest: int
    budget: int
    padding: Padding

    def ladder(self) -> list[Lengths]:
        """Steps of one length: lengths and sizes a factor of two apart."""
        lengths = _powers(min(SHORTEST, self.longest), self.longest)
        sizes = _powers(lengths[0], max(self.budget, self.longest))
        found = {(length,) * max(1, size // length) for length in lengths for size in sizes}
        fits = [s for s in found if len(s) == 1 or step_cost(s, self.padding) <= self.budget]
        return sorted(fits, key=lambda s: (sum(s), len(s)))

    def mixed(self, count: int, seed: int) -> list[Lengths]:
        """Steps of mixed lengths and any size, as requests bring them."""
        rng = random.Random(seed)  # noqa: S311 - shapes, not secrets
        return [self._mixed(rng) for _ in range(count)]

    def _mixed(self, rng: random.Random) -> Lengths:
        shortest = min(SHORTEST, self.longest)
        around = _between(rng, shortest, self.longest)
        size = _between(rng, around, max(around, self.budget))
        shape: list[int] = []
        while True:
            length = round(around * rng.lognormvariate(0, 0.4))
            shape.append(min(max(length, shortest), self.longest))
            if len(shape) > 1 and step_cost(shape, self.padding) > size:
                return tuple(shape[:-1])


@dataclass(frozen=True, slots=True)
class ProbeShapes:
    """What to measure: shapes to fit, and shapes to check the fit with."""

    probes: list[Lengths]
    checks: list[Lengths]


def choose(limits: LengthRange, prior: Coefficients, most_s: float) -> ProbeShapes:
    """The shapes that tell most in the time there is.

    Args:
        limits: what steps there may be.
        prior: roughly what they cost.
        most_s: seconds that all of them together may take once, as the prior says.
    """

    def price(shape: Lengths) -> float:
        return prior.seconds(work_of(shape, limits.padding))

    mixed = _affordable(limits.mixed(10 * MIXED, seed=1), price, MIXED, most_s / 4)
    others = [shape for shape in limits.mixed(10 * CHECKS, seed=2) if shape not in mixed]
    checks = _affordable(others, price, CHECKS, most_s / 4)
    ladder = [shape for shape in limits.ladder() if shape not in mixed and shape not in checks]
    telling = most_telling(ladder, prior, limits.padding, most_s / 2, PROBES - len(mixed))
    return ProbeShapes(telling + mixed, checks)


def most_telling(
    shapes: Sequence[Lengths], prior: Coefficients, padding: Padding, most_s: float, most: int
) -> list[Lengths]:
    """The shapes that together tell most of the prices, at most ``most`` in ``most_s`` seconds."""
    if not shapes:
        return []
    works = [work_of(shape, padding) for shape in shapes]
    seconds = np.array([prior.seconds(work) for work in works])
    middle = int(np.exp(np.mean(np.log([work.tokens for work in works]))))
    rows = np.array([replace(prior, knee_tokens=middle).amounts(work) for work in works])
    rows = rows / seconds[:, None]
    rows /= np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    known = 1e-6 * np.eye(rows.shape[1])
    sizes = np.array([work.tokens.bit_length() for work in works])
    left = seconds <= FULL_SHARE * most_s
    chosen: list[int] = []
    for size in [*range(sizes.max() + 1)] * OF_A_SIZE:
        open_ = left & (sizes == size) & (seconds <= most_s - seconds[chosen].sum())
        if not open_.any() or len(chosen) == most:
            continue
        gains = np.einsum("sr,rc,sc->s", rows, np.linalg.inv(known), rows)
        best = int(np.where(open_, gains, -1.0).argmax())
        chosen.append(best)
        known += np.outer(rows[best], rows[best])
        left[best] = False
    return [shapes[index] for index in chosen]


def _affordable(
    shapes: Sequence[Lengths], price: Callable[[Lengths], float], most: int, most_s: float
) -> list[Lengths]:
    """The first ``most`` different shapes that together take no more than ``most_s``."""
    taken: list[Lengths] = []
    for shape in dict.fromkeys(shapes):
        if len(taken) < most and price(shape) <= most_s:
            taken.append(shape)
            most_s -= price(shape)
    return taken


def measure(
    shapes: Sequence[Lengths],
    run: Callable[[Lengths], None],
    meter: Meter,
    clock: Clock,
    limit_s: float,
    told: Callable[[float], None] = lambda _: None,
) -> list[Probe]:
    """Measure shapes in turn, round after round, until the time is up.

    The first round goes from the smallest to the largest, so that what an allocator keeps of one
    step does not look like the next one's need; it warms up as well, and its times count only
    where there are no others.

    Args:
        shapes: what to measure.
        run: scores a step of a shape; raises :class:`DeviceOutOfMemory` where it does not fit.
        meter: reads peak memory.
        clock: seconds.
        limit_s: no round begins that would end later, the first excepted.
        told: called with the share of the time used, 0 to 1.

    Returns:
        Those that fit in memory, smallest first.
    """
    started = clock()
    first: dict[Lengths, tuple[float, int | None]] = {}
    for shape in growing(shapes):
        meter.reset()
        try:
            seconds = _timed(run, shape, clock)
        except DeviceOutOfMemory:
            break  # larger ones would not fit either
        first[shape] = seconds, meter.peak_bytes()
    times: dict[Lengths, list[float]] = {shape: [] for shape in first}
    while not _enough(times):
        spent = clock() - started
        told(min(1.0, spent / limit_s))
        rounds = 1 + min(map(len, times.values()))
        if spent + spent / rounds > limit_s:
            break
        for shape, seen in times.items():
            seen.append(_timed(run, shape, clock))
    return [
        Probe(shape, tuple(times[shape] or [seconds]), peak)
        for shape, (seconds, peak) in first.items()
    ]


def growing(shapes: Iterable[Lengths]) -> list[Lengths]:
    """The smallest step first."""
    return sorted(shapes, key=lambda shape: (sum(shape), sum(n * n for n in shape)))


def _enough(times: dict[Lengths, list[float]]) -> bool:
    rounds = min(map(len, times.values()), default=ROUNDS)
    if rounds < FEWEST_ROUNDS:
        return False
    spreads = [Probe(shape, tuple(seen)).spread for shape, seen in times.items()]
    return rounds >= ROUNDS or float(np.median(spreads)) < QUIET


def _timed(run: Callable[[Lengths], None], shape: Lengths, clock: Clock) -> float:
    began = clock()
    run(shape)
    return clock() - began


def _powers(least: int, most: int) -> list[int]:
    """From ``least`` up by factors of two, and ``most``."""
    steps = range(max(0, (most // least).bit_length()))
    return sorted({*(min(most, least << step) for step in steps), most})


def _between(rng: random.Random, least: int, most: int) -> int:
    """Any size alike: 8 to 16 as likely as 256 to 512."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))
