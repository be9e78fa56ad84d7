"""Shapes of the steps that probe a device, and steps of any shape from real texts.

Shapes are chosen before anything is measured. With rough cost coefficients each shape is a row of
the least-squares problem, and the next shape of a size is the one that increases the determinant of
the information matrix most (Fedorov, Theory of Optimal Experiments, 1972). A third of the probes
have pairs of mixed lengths, and so have all steps that check the fit.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from echelon.scheduling.cost_model import Coefficients, work_of
from echelon.scheduling.packing import step_cost
from echelon.tokenization.pairs import EncodedPairs, gather
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.data import Texts
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Padding

Lengths = tuple[int, ...]  # the shape of a step: tokens of each pair

PROBES, CHECKS = 24, 10  # shapes to fit, and to check
MIXED = 8  # probes of mixed lengths: they average what the formula leaves out
SHORTEST = 16  # tokens of the shortest pair: special tokens and some words of query and document
LEAST = 4  # shapes that are measured however short the time is
FULL_SHARE = 0.25  # part of a round's time that the single slowest shape may take

MAX_PER_SIZE = 2
"""Shapes of about one size, after one of every size: the optimum alone would be a few extreme
shapes, and would not show where a device differs from the formula."""


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Limits of the shapes of steps."""

    longest: int  # tokens of the longest pair
    budget: int  # tokens of the largest step
    padding: Padding

    def uniform(self) -> list[Lengths]:
        """Steps of one length: lengths and sizes a factor of two apart."""
        lengths = _powers(min(SHORTEST, self.longest), self.longest)
        sizes = _powers(lengths[0], max(self.budget, self.longest))
        found = {(length,) * max(1, size // length) for length in lengths for size in sizes}
        fits = [s for s in found if len(s) == 1 or step_cost(s, self.padding) <= self.budget]
        return sorted(fits, key=lambda s: (sum(s), len(s)))

    def least(self) -> list[Lengths]:
        """The smallest shapes that a model can be fitted to."""
        return self.uniform()[:LEAST]

    def mixed(self, count: int, seed: int) -> list[Lengths]:
        """Steps of mixed lengths and any size, as in real requests."""
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


class ProbeShapes(NamedTuple):
    """Shapes to fit, and shapes to check the fit with."""

    probes: list[Lengths]
    checks: list[Lengths]


def choose(limits: LengthRange, prior: Coefficients, max_s: float) -> ProbeShapes:
    """Choose the most informative shapes; by the prior, one run of all takes ``max_s`` seconds.

    Where hardly any shape is so quick, the least that a model can be fitted to is measured anyway.
    """

    def seconds(shape: Lengths) -> float:
        return prior.seconds(work_of(shape, limits.padding))

    mixed = _affordable(limits.mixed(10 * MIXED, seed=1), seconds, MIXED, max_s / 4)
    others = [shape for shape in limits.mixed(10 * CHECKS, seed=2) if shape not in mixed]
    checks = _affordable(others, seconds, CHECKS, max_s / 4)
    uniform = [shape for shape in limits.uniform() if shape not in mixed and shape not in checks]
    chosen = most_informative(uniform, prior, limits.padding, max_s / 2, PROBES - len(mixed))
    least = limits.least()
    if len(chosen) + len(mixed) < len(least):
        chosen += [shape for shape in least if shape not in {*chosen, *mixed, *checks}]
    return ProbeShapes(chosen + mixed, checks)


def most_informative(
    shapes: Sequence[Lengths], prior: Coefficients, padding: Padding, max_s: float, count: int
) -> list[Lengths]:
    """At most ``count`` shapes in ``max_s`` seconds that determine the coefficients best."""
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
    left = seconds <= FULL_SHARE * max_s
    chosen: list[int] = []
    for size in [*range(sizes.max() + 1)] * MAX_PER_SIZE:
        open_ = left & (sizes == size) & (seconds <= max_s - seconds[chosen].sum())
        if not open_.any() or len(chosen) == count:
            continue
        gains = np.einsum("sr,rc,sc->s", rows, np.linalg.inv(known), rows)
        best = int(np.where(open_, gains, -1.0).argmax())
        chosen.append(best)
        known += np.outer(rows[best], rows[best])
        left[best] = False
    return [shapes[index] for index in chosen]


def _affordable(
    shapes: Sequence[Lengths], seconds: Callable[[Lengths], float], count: int, max_s: float
) -> list[Lengths]:
    """The first ``count`` different shapes that together take no more than ``max_s`` seconds."""
    taken: list[Lengths] = []
    for shape in dict.fromkeys(shapes):
        if len(taken) < count and seconds(shape) <= max_s:
            taken.append(shape)
            max_s -= seconds(shape)
    return taken


def smallest_first(shapes: Iterable[Lengths]) -> list[Lengths]:
    """Sort shapes by tokens, then by squared tokens."""
    return sorted(shapes, key=lambda shape: (sum(shape), sum(n * n for n in shape)))


def _powers(smallest: int, largest: int) -> list[int]:
    """From ``smallest`` up by factors of two, and ``largest``."""
    steps = range(max(0, (largest // smallest).bit_length()))
    return sorted({*(min(largest, smallest << step) for step in steps), largest})


def _between(rng: random.Random, smallest: int, largest: int) -> int:
    """A log-uniform size: 8 to 16 is as likely as 256 to 512."""
    return round(math.exp(rng.uniform(math.log(smallest), math.log(largest))))


class StepFactory:
    """Makes steps of any shape from real texts, with pairs of at most ``longest`` tokens."""

    def __init__(self, encoder: PairEncoder, texts: Texts, longest: int) -> None:
        self.longest, self._prompt = longest, encoder.prompt
        topic = texts.topics[0]
        document = " ".join(text for topic in texts.topics for text in topic.documents)
        self._whole = encoder.encode([(topic.query, document)], longest, "longest_first")
        if int(self._whole.lengths[0]) < longest:
            times = 1 + longest // max(1, int(self._whole.kept[0, 1]))
            again = " ".join([document] * times)
            self._whole = encoder.encode([(topic.query, again)], longest, "longest_first")
        self._cut: dict[int, EncodedPairs] = {}

    def batch(self, lengths: Lengths) -> TokenBatch:
        """Make a step of pairs of these lengths; none begins as another does.

        A language model computes a common beginning once, and a prompt leaves no short pairs.
        """
        if self._prompt is not None:
            ids = self._whole.documents[0]
            offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            parts = [
                np.resize(np.roll(ids, -place), length) for place, length in enumerate(lengths)
            ]
            return TokenBatch(np.concatenate(parts), None, offsets)
        return gather([(self._of(length), 0) for length in lengths])

    def _of(self, length: int) -> EncodedPairs:
        if length not in self._cut:
            self._cut[length] = self._whole.shortened(length, [0])
        return self._cut[length]
