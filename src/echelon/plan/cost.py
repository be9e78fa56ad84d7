"""The cost model: how long a step takes, from the lengths of its pairs alone.

Pure: it is told what steps took and answers what the next will take; it must not know texts,
devices or the time of day. ``T = base + token · Σ n + square · Σ n²`` with n the tokens of a pair:
the linear layers pay for tokens, attention for their squares. A padded scorer pays for every pair
as if it were the longest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.types import Cost, IntArray

REMEMBERED_STEPS = 15
"""Steps whose times count. The median of 15 follows a machine that changes its speed after 8 steps
and does not move for 7 outliers in a row."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a step costs.

    Attributes:
        base_s: seconds of an empty step.
        token_s: seconds a token.
        square_s: seconds a squared token of one pair.
    """

    base_s: float
    token_s: float
    square_s: float


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

    The correction is one factor: the median of actual over predicted of the last steps, each
    weighted with the time it was predicted to take, so that tiny steps, which are mostly overhead,
    have little say about the price of a token.

    Args:
        coefficients: prices; see :data:`DEFAULT_COEFFICIENTS`.
        cost: how the scorer pays.
    """

    def __init__(
        self, coefficients: Coefficients = DEFAULT_COEFFICIENTS["cpu"], cost: Cost = "ragged"
    ) -> None:
        self.coefficients = coefficients
        self.cost: Cost = cost
        self.scale = 1.0
        self._seen: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_STEPS)

    def predict(self, lengths: Sequence[int] | IntArray) -> float:
        """Seconds that one step of pairs of these lengths will take."""
        return self.seconds(work_of(lengths, self.cost))

    def seconds(self, work: Work) -> float:
        """Seconds that an amount of work will take on one worker."""
        return self.scale * self._unscaled(work)

    def observe(self, lengths: Sequence[int] | IntArray, seconds: float) -> None:
        """Learn from a step that took ``seconds``; a time of zero or less teaches nothing."""
        plain = self._unscaled(work_of(lengths, self.cost))
        if seconds <= 0 or plain <= 0 or not math.isfinite(seconds):
            return
        self._seen.append((seconds / plain, plain))
        self.scale = _weighted_median(self._seen)

    def _unscaled(self, work: Work) -> float:
        c = self.coefficients
        return c.base_s * work.steps + c.token_s * work.tokens + c.square_s * work.squares


def _weighted_median(seen: deque[tuple[float, float]]) -> float:
    """The value at which half of the weight is reached, of (value, weight)."""
    half = sum(weight for _, weight in seen) / 2
    reached = 0.0
    for value, weight in sorted(seen):
        reached += weight
        if reached >= half:
            return value
    raise AssertionError("no observation. This is a bug.")
