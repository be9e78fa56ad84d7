"""Least squares with coefficients that are not negative, for a handful of columns. Pure.

The solution is the plain least-squares solution on the columns that it leaves above zero, so for
few columns all sets of columns are tried: exact, without iteration, and done after the first where
nothing wants to be negative.

Prices of a step kept true while steps run: the last steps, weighed anew after each. Pure.

Three looks at a window of steps, each correcting the one before:

1. The *scale*, the median of actual over predicted of the newest steps, moves all prices together.
   It follows a machine that changes its speed within eight steps, and outliers do not move it.
2. Each price by itself, by non-negative least squares on the relative error of the whole window.
   Old steps count less and less; a step far off counts as much as its direction, not its distance
   (Huber, Robust Statistics, 1981). A pull towards the scaled prior keeps what the steps say
   nothing of: the price of long texts does not drift while only short ones come.
3. The *level*, the median once more, of what those prices leave over.

Nothing else is remembered, so that whatever went wrong is forgotten with the window.

The cost model: how long a step takes, from the lengths of its pairs alone.

Pure: it is told what steps took and answers what the next will take; it must not know texts,
devices or the time of day. ``T = base + token · Σ n + square · Σ n² + beyond · max(0, Σ n − knee)``
with n the tokens of a pair: the linear layers pay for tokens, attention for their squares, and a
device that small steps leave idle pays for tokens only beyond its knee. A padded scorer pays for
every pair as if it were the longest. :mod:`echelon.scheduling.fit` measures the prices,
:mod:`echelon.scheduling.cost_model` keeps them true while steps run.

The memory model: how much a step needs at its peak, from the lengths of its pairs alone. Pure.

``fixed + token · Σ n + square · Σ n²``, as :mod:`echelon.scheduling.cost_model` counts. It holds
for the
process on CPU and for the card on CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from echelon.types import IntArray, Padding

if TYPE_CHECKING:
    Array = npt.NDArray[np.float64]

MOST_COLUMNS = 6
"""Sets of columns double with each: 63 are tried in a millisecond."""

NOTHING = 1e-9
"""A coefficient below zero by this share of the largest, columns scaled alike, is rounding."""

CONDITION = 1e-12
"""Columns that depend on one another to this share are one: the shortest solution is taken."""


def solve(matrix: Array, target: Array) -> Array:
    """The x ≥ 0 with the least ``‖matrix · x − target‖²``.

    Args:
        matrix: float64 [rows, columns], at most :data:`MOST_COLUMNS` columns.
        target: float64 [rows].

    Returns:
        float64 [columns].
    """
    columns = matrix.shape[1]
    if columns > MOST_COLUMNS:
        raise ValueError(f"{columns} columns are more than {MOST_COLUMNS}. This is a bug.")
    norms = np.sqrt(np.einsum("rc,rc->c", matrix, matrix))
    scale = np.where(norms > 0, norms, 1.0)
    scaled = matrix / scale
    gram, wanted = scaled.T @ scaled, scaled.T @ target
    best, best_gain = np.zeros(columns), 0.0
    for chosen in _supports(columns):
        found = _on(gram, wanted, chosen)
        if found is None:
            continue
        gain = 2 * float(wanted @ found) - float(found @ gram @ found)  # what the error falls by
        if gain > best_gain:
            best, best_gain = found, gain
        if len(chosen) == columns:
            break  # nothing wants to be negative: no smaller set does better
    return best / scale


@lru_cache(maxsize=MOST_COLUMNS + 1)
def _supports(columns: int) -> tuple[tuple[int, ...], ...]:
    """All sets of columns, the whole one first."""
    sizes = range(columns, 0, -1)
    return tuple(chosen for size in sizes for chosen in combinations(range(columns), size))


def _on(gram: Array, wanted: Array, chosen: tuple[int, ...]) -> Array | None:
    """Least squares on some columns; None where one of them comes out negative."""
    index = np.array(chosen)
    part, *_ = np.linalg.lstsq(gram[np.ix_(index, index)], wanted[index], rcond=CONDITION)
    if part.min() < -NOTHING * max(1.0, float(np.abs(part).max())):
        return None
    full = np.zeros(len(wanted))
    full[index] = np.maximum(part, 0.0)
    return full


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


class StepWindow:
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


def work_of(lengths: Sequence[int] | IntArray, padding: Padding) -> Work:
    """One step of pairs of these lengths."""
    array = np.asarray(lengths, dtype=np.int64)
    if padding == "rectangular" and len(array):
        array = np.full(len(array), array.max())
    return Work(1, int(array.sum()), int(array @ array))


class CostModel:
    """Predicts step times, and corrects itself by what steps really took.

    Args:
        prior: prices to begin with; see :data:`DEFAULT_COEFFICIENTS`.
        padding: how the scorer pads.
    """

    def __init__(
        self, prior: Coefficients = DEFAULT_COEFFICIENTS["cpu"], padding: Padding = "none"
    ) -> None:
        self.begin(prior, padding)

    def begin(self, prior: Coefficients, padding: Padding) -> None:
        """Start from other prices, and forget all steps seen."""
        self.padding: Padding = padding
        self.prior = self.coefficients = prior
        self._window = StepWindow(prior.prices)

    @property
    def scale(self) -> float:
        """Seconds of the last steps over what the prior says of them, the median."""
        return self._window.scale

    def predict(self, lengths: Sequence[int] | IntArray) -> float:
        """Seconds that one step of pairs of these lengths will take."""
        return self.seconds(work_of(lengths, self.padding))

    def seconds(self, work: Work) -> float:
        """Seconds that an amount of work will take on one worker."""
        return self.coefficients.seconds(work)

    def observe(self, lengths: Sequence[int] | IntArray, seconds: float) -> None:
        """Learn from a step that took ``seconds``; a time of zero or less teaches nothing."""
        work = work_of(lengths, self.padding)
        if seconds <= 0 or not math.isfinite(seconds) or self.prior.seconds(work) <= 0:
            return
        prices = self._window.learn(self.prior.amounts(work), seconds)
        self.coefficients = self.prior.priced(prices)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What a step needs; nothing is negative.

    Attributes:
        fixed_bytes: bytes without any step: weights, libraries.
        token_bytes: bytes a token.
        square_bytes: bytes a squared token of one pair; 0 where they are not told from tokens.
    """

    fixed_bytes: float
    token_bytes: float
    square_bytes: float = 0.0

    def peak_bytes(self, work: Work) -> float:
        """Bytes at the peak of one step."""
        steps = self.token_bytes * work.tokens + self.square_bytes * work.squares
        return self.fixed_bytes + steps

    def of_length(self, length: float) -> MemoryModel:
        """The same where all pairs have one length: their squares are tokens then."""
        return MemoryModel(self.fixed_bytes, self.token_bytes + self.square_bytes * length)

    def shifted(self, more_bytes: float) -> MemoryModel:
        """The same where so much more is held without any step; less where it is negative."""
        return replace(self, fixed_bytes=max(0.0, self.fixed_bytes + more_bytes))

    def bytes_of(self, tokens: int) -> float:
        """Bytes at the peak of a step of so many tokens, squares left out; see `of_length`."""
        return self.fixed_bytes + self.token_bytes * tokens

    def tokens_within(self, limit_bytes: float, length: int = 0) -> int:
        """Most tokens of a step of pairs of one length under a limit; 0 leaves squares out.

        Returns:
            0 where not even an empty step fits; NO_BUDGET where tokens cost nothing.
        """
        room, each = limit_bytes - self.fixed_bytes, self.token_bytes + self.square_bytes * length
        if room < 0:
            return 0
        return int(room / each) if room < each * NO_BUDGET else NO_BUDGET
