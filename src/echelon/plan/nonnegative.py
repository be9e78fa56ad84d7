"""Least squares with coefficients that are not negative, for a handful of columns. Pure.

The solution is the plain least-squares solution on the columns that it leaves above zero, so for
few columns all sets of columns are tried: exact, without iteration, and done after the first where
nothing wants to be negative.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

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
