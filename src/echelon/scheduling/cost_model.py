"""Cost and memory models: what a step takes, from the lengths of its pairs alone. Pure.

Time: ``base + token · Σ n + square · Σ n² + beyond · max(0, Σ n − knee)``, with n the tokens of a
pair. Linear layers cost by tokens and attention by their squares; a device that small steps leave
idle costs by tokens only beyond its knee. A scorer with rectangular padding costs as if every pair
were the longest. Memory at the peak: ``fixed + token · Σ n + square · Σ n²``, of the process on CPU
and of the card on CUDA. :mod:`echelon.scheduling.fit` fits both to measurements.

While steps run, the coefficients are fitted anew to a window of the last steps, in three parts:

1. The *scale*, the median of actual over predicted of the newest steps, multiplies all of them. It
   follows a machine that changes its speed within eight steps; outliers do not move it.
2. Each coefficient, by non-negative least squares on the relative error of the window. Old steps
   count less, and a step far off counts by its direction, not its distance (Huber, Robust
   Statistics, 1981). A pull towards the scaled prior keeps what the steps do not show: the
   coefficient of long texts does not drift while only short ones come.
3. The *level*, the median once more, of what those coefficients leave over.

Nothing but the window is remembered, so any error is forgotten with it. :class:`Drift` watches
whether the scale stays where it was when the machine was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from echelon.types import IntArray, Padding

    Array = npt.NDArray[np.float64]

MAX_COLUMNS = 6
"""The sets of columns double with each column: 63 sets take a millisecond."""

CONDITION = 1e-12
"""Relative singular value below which columns count as dependent (shortest solution)."""


def solve(matrix: Array, target: Array) -> Array:
    """Solve least squares for x ≥ 0, the smallest ``‖matrix · x − target‖²``: float64 [columns].

    It is plain least squares on the columns that stay above zero. With few columns all sets can be
    tried: exact, without iteration, and done after the full set if nothing is negative.
    """
    columns = matrix.shape[1]
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} columns are more than {MAX_COLUMNS}. This is a bug.")
    norms = np.sqrt(np.einsum("rc,rc->c", matrix, matrix))
    scale = np.where(norms > 0, norms, 1.0)
    q, r = np.linalg.qr(matrix / scale)  # not the normal equations: they square the condition
    wanted = q.T @ target
    best, best_error = np.zeros(columns), float(wanted @ wanted)
    for chosen in _supports(columns):
        found = _on(r, wanted, chosen)
        if found is None:
            continue
        missed = r @ found - wanted
        error = float(missed @ missed)
        if error < best_error:
            best, best_error = found, error
        if len(chosen) == columns:
            break  # nothing is negative, so no smaller set is better
    return best / scale


@lru_cache(maxsize=MAX_COLUMNS + 1)
def _supports(columns: int) -> tuple[tuple[int, ...], ...]:
    """All sets of columns, the full set first."""
    sizes = range(columns, 0, -1)
    return tuple(chosen for size in sizes for chosen in combinations(range(columns), size))


def _on(r: Array, wanted: Array, chosen: tuple[int, ...]) -> Array | None:
    """Least squares on some columns; None if one of them is negative."""
    index = np.array(chosen)
    part, *_ = np.linalg.lstsq(r[:, index], wanted, rcond=CONDITION)
    if part.min() < 0:
        return None
    full = np.zeros(r.shape[1])
    full[index] = part
    return full


REMEMBERED_STEPS = 15
"""Steps of the medians: the median of 15 follows a change of speed after about 8 steps, and ignores
outliers while they are less than half of the predicted time."""

WINDOW = 48
"""Steps of the fit: after 50 steps nothing is left of the time before a change."""

FORGETTING = 0.97
"""Factor on a step's weight for each newer step: half after 23."""

MEMORY = FORGETTING ** np.arange(WINDOW - 1, -1, -1)

TOLERANCE = 0.10
"""Relative error above which a step counts less than its square: repeats of a step on a machine
with other work differ by this much."""

PULL = 0.01
"""Weight of the prior beside some thirty steps. A coefficient that is 2 % of the time is half
learned from a window, one of 10 % almost entirely; about 1 % of a step is left over."""

MIN_SHARE = 0.05
"""A coefficient of zero may come back: the pull counts it as this share of a typical step."""

MIN_VALUE = 1e-3
"""Lowest share of the scaled prior, or a step of only this part would be predicted at no time."""

ROUNDS = 4
"""Rounds of weighting; further ones change coefficients by less than a percent."""


def refit(anchor: Array, matrix: Array, took: Array) -> Array:
    """Fit coefficients to steps, newest last; what the steps do not show stays near the anchor.

    ``matrix`` is float64 [steps, coefficients], the amounts of each step.
    """
    used = (anchor > 0) | (matrix.max(axis=0) > 0)
    pull = np.sqrt(PULL) / _units(anchor, matrix)
    memory = MEMORY[-len(took) :]
    values = anchor
    for _ in range(ROUNDS):
        predicted = matrix @ values
        size = np.maximum(predicted, took)  # the larger, so that no error exceeds 1
        error = np.abs(took - predicted) / size
        trust = np.minimum(1.0, TOLERANCE / np.maximum(error, TOLERANCE))
        weight = np.sqrt(memory * trust) / size
        rows = np.vstack([matrix * weight[:, None], np.diag(pull)])
        solved = solve(rows[:, used], np.concatenate([took * weight, pull * anchor]))
        values = np.zeros(len(anchor))
        values[used] = solved
    return values


def _units(anchor: Array, matrix: Array) -> Array:
    """Unit of each coefficient for the pull: itself, or a share of a typical step."""
    typical = matrix.mean(axis=0)
    share = MIN_SHARE * float(typical @ anchor)
    lowest = np.divide(share, typical, out=np.full(len(anchor), np.inf), where=typical > 0)
    found: Array = np.where(anchor > 0, anchor, lowest)
    return found


def _level(predicted: Array, took: Array) -> float:
    """Median of actual over predicted of the newest steps, weighted by predicted time.

    Tiny steps, which are mostly overhead, then count little.
    """
    predicted, took = predicted[-REMEMBERED_STEPS:], took[-REMEMBERED_STEPS:]
    known = predicted > 0
    if not known.any():
        return 1.0
    ratio, weight = took[known] / predicted[known], predicted[known]
    order = np.argsort(ratio, kind="stable")
    reached = np.cumsum(weight[order])
    return float(ratio[order][np.searchsorted(reached, reached[-1] / 2)])


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Cost coefficients of a step; none is negative."""

    base_s: float  # seconds of an empty step
    token_s: float
    square_s: float  # seconds for a squared token of one pair
    knee_tokens: int = 0  # tokens of a step beyond which each token costs ``beyond_s`` more
    beyond_s: float = 0.0  # 0 if the device has no knee

    @property
    def values(self) -> tuple[float, float, float, float]:
        """Seconds for each of :meth:`amounts`."""
        return self.base_s, self.token_s, self.square_s, self.beyond_s

    def amounts(self, work: Work) -> tuple[int, int, int, int]:
        """Steps, tokens, squares, and tokens beyond the knee if all steps are alike."""
        knee = self.knee_tokens
        beyond = max(0, work.tokens - knee * work.steps) if knee else 0
        return work.steps, work.tokens, work.squares, beyond

    def seconds(self, work: Work) -> float:
        """Seconds that an amount of work takes on one worker."""
        pairs = zip(self.values, self.amounts(work), strict=True)
        return sum(value * amount for value, amount in pairs)

    def with_values(self, values: Iterable[float]) -> Coefficients:
        """Other coefficients with the same knee."""
        base, token, square, beyond = map(float, values)
        return Coefficients(base, token, square, self.knee_tokens, beyond)


DEFAULT_COEFFICIENTS = {
    "cpu": Coefficients(4e-3, 7e-5, 3.5e-8),
    "cuda": Coefficients(3e-3, 5e-6, 2.5e-9),
    "mps": Coefficients(5e-3, 2e-5, 1e-8),
}
"""Coefficients before any measurement: MiniLM-L12 on two CPU cores (docs/LOG.md: about 140 pairs of
100 tokens a second), and guesses for GPUs. Attention is a third of the time at 512 tokens. The
first steps correct the level; only the proportions matter for long."""


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of work."""

    steps: int
    tokens: int  # padding included
    squares: int  # sum of the squared tokens of the pairs


def work_of(lengths: Sequence[int] | IntArray, padding: Padding) -> Work:
    """One step of pairs of these lengths."""
    array = np.asarray(lengths, dtype=np.int64)
    if padding == "rectangular" and len(array):
        array = np.full(len(array), array.max())
    return Work(1, int(array.sum()), int(array @ array))


class CostModel:
    """Predicts step times, beginning with ``prior``, and corrects itself by measured ones."""

    def __init__(
        self, prior: Coefficients = DEFAULT_COEFFICIENTS["cpu"], padding: Padding = "none"
    ) -> None:
        self.begin(prior, padding)

    def begin(self, prior: Coefficients, padding: Padding) -> None:
        """Start from other coefficients and forget all steps."""
        self.padding: Padding = padding
        self.prior = self.coefficients = prior
        self.scale = 1.0  # median of measured over predicted by the prior, of the last steps
        self._amounts = np.zeros((0, len(prior.values)))
        self._seconds = np.zeros(0)

    def predict(self, lengths: Sequence[int] | IntArray) -> float:
        """Predicted seconds of a step of pairs of these lengths."""
        return self.seconds(work_of(lengths, self.padding))

    def seconds(self, work: Work) -> float:
        """Predicted seconds of an amount of work on one worker."""
        return self.coefficients.seconds(work)

    def observe(self, lengths: Sequence[int] | IntArray, seconds: float) -> None:
        """Learn from a measured step; a time of zero or less is ignored."""
        work = work_of(lengths, self.padding)
        if seconds <= 0 or not math.isfinite(seconds) or self.prior.seconds(work) <= 0:
            return
        prior, amounts = np.array(self.prior.values, dtype=np.float64), self.prior.amounts(work)
        self._amounts = matrix = np.vstack([self._amounts[1 - WINDOW :], amounts])
        self._seconds = took = np.append(self._seconds[1 - WINDOW :], seconds)
        self.scale = _level(matrix @ prior, took)
        anchor = self.scale * prior
        values = np.maximum(refit(anchor, matrix, took), MIN_VALUE * anchor)
        self.coefficients = self.prior.with_values(values * _level(matrix @ values, took))


FAR, NEAR = 1.25, 1.10
"""Factors, faster or slower, beyond which a machine has drifted and within which it has recovered.
Below the first, predictions of a fit are as wrong without drift; two limits prevent flapping."""

HOLD = 100
"""Steps in a row that change the state: seconds to a minute of work. Single slow steps or a busy
minute are no drift."""

SMOOTHING = 0.05
"""Weight of the newest step in the shown ratio, which follows the last twenty steps."""


class Drift:
    """Watches whether a machine is still as fast as when it was measured.

    Args:
        level: the normal level of step times; None takes the level after the first HOLD steps.

    Attributes:
        ratio: smoothed step times over normal ones; 1 until the normal level is known.
        drifted: whether the machine has drifted.
    """

    def __init__(self, level: float | None = None) -> None:
        self.ratio = 1.0
        self.drifted = False
        self._normal = level
        self._seen = self._streak = 0

    def see(self, level: float) -> Literal["drifted", "recovered"] | None:
        """Take the cost model's level after a step; returns the change of state, if any."""
        self._seen += 1
        if self._normal is None:
            if self._seen >= HOLD:
                self._normal = level
            return None
        off = math.log(level / self._normal)
        self.ratio = math.exp((1 - SMOOTHING) * math.log(self.ratio) + SMOOTHING * off)
        turned = abs(off) <= math.log(NEAR) if self.drifted else abs(off) > math.log(FAR)
        self._streak = self._streak + 1 if turned else 0
        if self._streak < HOLD:
            return None
        self._streak, self.drifted = 0, not self.drifted
        return "drifted" if self.drifted else "recovered"


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Memory that a step needs; nothing is negative."""

    fixed_bytes: float  # without a step: weights, libraries
    token_bytes: float
    square_bytes: float = 0.0  # for a squared token of one pair; 0 if included in ``token_bytes``

    def peak_bytes(self, work: Work) -> float:
        """Bytes at the peak of one step."""
        steps = self.token_bytes * work.tokens + self.square_bytes * work.squares
        return self.fixed_bytes + steps

    def of_length(self, length: float) -> MemoryModel:
        """The model for pairs of one length, without squares."""
        return MemoryModel(self.fixed_bytes, self.token_bytes + self.square_bytes * length)

    def shifted(self, more_bytes: float) -> MemoryModel:
        """The model with more (or, if negative, less) memory without a step."""
        return replace(self, fixed_bytes=max(0.0, self.fixed_bytes + more_bytes))

    def bytes_of(self, tokens: int) -> float:
        """Bytes at the peak of a step of ``tokens``, without squares; see :meth:`of_length`."""
        return self.fixed_bytes + self.token_bytes * tokens

    def tokens_within(self, limit_bytes: float, length: int = 0) -> int:
        """Maximum tokens of a step of pairs of one length under a limit; length 0 ignores squares.

        Returns:
            0 if not even an empty step fits; NO_BUDGET if tokens need no memory.
        """
        free, each = limit_bytes - self.fixed_bytes, self.token_bytes + self.square_bytes * length
        if free < 0:
            return 0
        return int(free / each) if free < each * NO_BUDGET else NO_BUDGET
