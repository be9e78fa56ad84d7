"""The cost model: how long a step takes, from the lengths of its pairs alone.

Pure: it is told what steps took and answers what the next will take; it must not know texts,
devices or the time of day. ``T = base + token · Σ n + square · Σ n² + beyond · max(0, Σ n − knee)``
with n the tokens of a pair: the linear layers pay for tokens, attention for their squares, and a
device that small steps leave idle pays for tokens only beyond its knee. A padded scorer pays for
every pair as if it were the longest. :mod:`echelon.tune.fit` measures the prices,
:mod:`echelon.plan.refit` keeps them true while steps run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.plan.refit import Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.types import Cost, IntArray


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a step costs; nothing is negative.

    Attributes:
        base_s: seconds of an empty step.
        token_s: seconds a token.
        square_s: seconds a squared token of one pair.
        knee_tokens: tokens of a step from which on each costs ``beyond_s`` more.
        beyond_s: see there; 0 where the device has no knee.
    """

    base_s: float
    token_s: float
    square_s: float
    knee_tokens: int = 0
    beyond_s: float = 0.0

    @property
    def prices(self) -> tuple[float, float, float, float]:
        """Seconds for each number of :meth:`amounts`."""
        return self.base_s, self.token_s, self.square_s, self.beyond_s

    def amounts(self, work: Work) -> tuple[int, int, int, int]:
        """Steps, tokens, squares and tokens beyond the knee, the steps all alike."""
        knee = self.knee_tokens
        beyond = max(0, work.tokens - knee * work.steps) if knee else 0
        return work.steps, work.tokens, work.squares, beyond

    def seconds(self, work: Work) -> float:
        """Seconds that an amount of work takes on one worker."""
        pairs = zip(self.prices, self.amounts(work), strict=True)
        return sum(price * amount for price, amount in pairs)

    def priced(self, prices: Iterable[float]) -> Coefficients:
        """Other prices, the knee where it is."""
        base, token, square, beyond = map(float, prices)
        return Coefficients(base, token, square, self.knee_tokens, beyond)


DEFAULT_COEFFICIENTS = {
    "cpu": Coefficients(4e-3, 7e-5, 3.5e-8),
    "cuda": Coefficients(3e-3, 5e-6, 2.5e-9),
}
"""Before anything was measured: MiniLM-L12 on two CPU cores (docs/LOG.md: about 140 pairs of 100
tokens a second), and a guess for a GPU. Attention is a third of the time at 512 tokens. The first
steps correct the level; only the proportions matter for long."""


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of work, as the model counts it.

    Attributes:
        steps: forward passes.
        tokens: tokens paid for.
        squares: sum over the pairs of their squared tokens.
    """

    steps: int
    tokens: int
    squares: int


def work_of(lengths: Sequence[int] | IntArray, cost: Cost) -> Work:
    """One step of pairs of these lengths."""
    array = np.asarray(lengths, dtype=np.int64)
    if cost == "padded" and len(array):
        array = np.full(len(array), array.max())
    return Work(1, int(array.sum()), int(array @ array))


class CostModel:
    """Predicts step times, and corrects itself by what steps really took.

    Args:
        prior: prices to begin with; see :data:`DEFAULT_COEFFICIENTS`.
        cost: how the scorer pays.
    """

    def __init__(
        self, prior: Coefficients = DEFAULT_COEFFICIENTS["cpu"], cost: Cost = "ragged"
    ) -> None:
        self.begin(prior, cost)

    def begin(self, prior: Coefficients, cost: Cost) -> None:
        """Start from other prices, and forget all steps seen."""
        self.cost: Cost = cost
        self.prior = self.coefficients = prior
        self._window = Window(prior.prices)

    @property
    def scale(self) -> float:
        """Seconds of the last steps over what the prior says of them, the median."""
        return self._window.scale

    def predict(self, lengths: Sequence[int] | IntArray) -> float:
        """Seconds that one step of pairs of these lengths will take."""
        return self.seconds(work_of(lengths, self.cost))

    def seconds(self, work: Work) -> float:
        """Seconds that an amount of work will take on one worker."""
        return self.coefficients.seconds(work)

    def observe(self, lengths: Sequence[int] | IntArray, seconds: float) -> None:
        """Learn from a step that took ``seconds``; a time of zero or less teaches nothing."""
        work = work_of(lengths, self.cost)
        if seconds <= 0 or not math.isfinite(seconds) or self.prior.seconds(work) <= 0:
            return
        prices = self._window.learn(self.prior.amounts(work), seconds)
        self.coefficients = self.prior.priced(prices)
