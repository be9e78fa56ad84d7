"""Prices of a step kept true while steps run: the last steps, weighed anew after each. Pure.

Three looks at a window of steps, each correcting the one before:

1. The *scale*, the median of actual over predicted of the newest steps, moves all prices together.
   It follows a machine that changes its speed within eight steps, and outliers do not move it.
2. Each price by itself, by non-negative least squares on the relative error of the whole window.
   Old steps count less and less; a step far off counts as much as its direction, not its distance
   (Huber, Robust Statistics, 1981). A pull towards the scaled prior keeps what the steps say
   nothing of: the price of long texts does not drift while only short ones come.
3. The *level*, the median once more, of what those prices leave over.

Nothing else is remembered, so that whatever went wrong is forgotten with the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from echelon.plan.nonnegative import solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.plan.nonnegative import Array

REMEMBERED_STEPS = 15
"""Steps that the medians look at. The median of 15 follows a machine that changes its speed after
8 steps and does not move for 7 outliers in a row."""

WINDOW = 48
"""Steps that prices are fitted to: after 50 steps nothing is left of a machine that has changed."""

FORGETTING = 0.97
"""A step's weight falls by this with each newer one: half after 23."""

MEMORY = FORGETTING ** np.arange(WINDOW - 1, -1, -1)

TOLERANCE = 0.10
"""Relative error above which a step counts less than its square: repeats of one step on a machine
that does other work too differ by as much."""

PULL = 0.01
"""Weight of the prior beside some thirty steps: a price that is a fiftieth of the time is half
learned from a window, one that is a tenth nearly whole; about 1 % of a step is left over."""

LEAST_SHARE = 0.05
"""A price of zero may come back: the pull takes it for this share of a typical step's time."""

LEAST_PRICE = 1e-3
"""Of the prior at its level: a price never falls lower, or a step that pays it alone would be
predicted to take no time."""

ROUNDS = 4
"""Weighings of the window; further ones change prices by less than a percent."""


class Window:
    """The last steps, and the prices that fit them.

    Args:
        prior: prices to start from and to come back to, seconds each.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self.scale = 1.0
        self._prior = np.array(prior, dtype=np.float64)
        self._amounts = np.zeros((0, len(prior)))
        self._seconds = np.zeros(0)

    def learn(self, amounts: Sequence[float], seconds: float) -> Array:
        """Take a step in, of which the prior predicts more than nothing.

        Args:
            amounts: how much of each price it pays.
            seconds: what it took, above zero.

        Returns:
            float64, the prices from now on.
        """
        self._amounts = matrix = np.vstack([self._amounts[1 - WINDOW :], amounts])
        self._seconds = took = np.append(self._seconds[1 - WINDOW :], seconds)
        self.scale = _level(matrix @ self._prior, took)
        anchor = self.scale * self._prior
        prices = np.maximum(refit(anchor, matrix, took), LEAST_PRICE * anchor)
        return prices * _level(matrix @ prices, took)


def refit(anchor: Array, matrix: Array, took: Array) -> Array:
    """Prices that fit steps, and stay near the anchor where the steps do not tell.

    Args:
        anchor: float64 [prices], none negative.
        matrix: float64 [steps, prices], how much of each price a step pays, newest last.
        took: float64 [steps], seconds.
    """
    used = (anchor > 0) | (matrix.max(axis=0) > 0)
    pull = np.sqrt(PULL) / _units(anchor, matrix)
    memory = MEMORY[-len(took) :]
    prices = anchor
    for _ in range(ROUNDS):
        said = matrix @ prices
        size = np.maximum(said, took)  # of the two, so that no step counts for more than one
        error = np.abs(took - said) / size
        trust = np.minimum(1.0, TOLERANCE / np.maximum(error, TOLERANCE))
        weight = np.sqrt(memory * trust) / size
        rows = np.vstack([matrix * weight[:, None], np.diag(pull)])
        prices = solve(rows[:, used], np.concatenate([took * weight, pull * anchor]))
        full = np.zeros(len(anchor))
        full[used] = prices
        prices = full
    return prices


def _units(anchor: Array, matrix: Array) -> Array:
    """What each price is measured in for the pull: itself, or a share of a typical step."""
    typical = matrix.mean(axis=0)
    share = LEAST_SHARE * float(typical @ anchor)
    least = np.divide(share, typical, out=np.full(len(anchor), np.inf), where=typical > 0)
    found: Array = np.where(anchor > 0, anchor, least)
    return found


def _level(said: Array, took: Array) -> float:
    """Actual over predicted of the newest steps: the median, by weight.

    Each counts with the time it was predicted to take, so that tiny steps, which are mostly
    overhead, have little say about the price of a token.
    """
    said, took = said[-REMEMBERED_STEPS:], took[-REMEMBERED_STEPS:]
    known = said > 0
    if not known.any():
        return 1.0
    ratio, weight = took[known] / said[known], said[known]
    order = np.argsort(ratio, kind="stable")
    reached = np.cumsum(weight[order])
    return float(ratio[order][np.searchsorted(reached, reached[-1] / 2)])
