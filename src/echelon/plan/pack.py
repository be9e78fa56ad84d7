"""Packing: which pairs go through the model together.

Knows lengths and budgets; must not know texts, devices or time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from echelon.types import Cost, IntArray

Step = list[int]
"""Indices of the pairs of one forward pass."""

DEFAULT_BUDGETS = {"cpu": 2048, "cuda": 16384}
"""Tokens a step before any tuning: a CPU gains nothing beyond, a GPU is full (docs/LOG.md)."""

FIRST_WINDOW, WINDOW = 2**17, 2**20
"""Characters of a window of texts: dozens of steps, so that its last, short one costs little, and
for the longest texts some megabytes of ids."""

NO_BUDGET = 2**62
"""A budget that never binds: pairs alone decide."""


def step_budget(token_budget: int | None, batch_size: int | None, device: str) -> int:
    """The token budget that the two knobs mean together.

    ``batch_size`` alone is the classical knob: pairs decide and tokens do not. Neither is the
    device's default.
    """
    if token_budget is not None:
        return token_budget
    return NO_BUDGET if batch_size is not None else DEFAULT_BUDGETS[device.partition(":")[0]]


def step_cost(lengths: Sequence[int] | IntArray, cost: Cost) -> int:
    """Tokens that a step of these lengths is paid for.

    A ragged scorer pays for its tokens; a padded one for longest × pairs.
    """
    if len(lengths) == 0:
        return 0
    array = np.asarray(lengths)
    return int(array.sum()) if cost == "ragged" else int(array.max()) * len(array)


def pack(
    lengths: Sequence[int] | IntArray,
    budget: int,
    *,
    cost: Cost = "ragged",
    max_pairs: int | None = None,
) -> list[Step]:
    """Split pairs into steps, longest first.

    Longest first means that a step holds pairs of nearly one length, that the largest step comes
    first (so memory runs out at the start or never), and that the order is the same for the same
    lengths. Pairs of one length keep their input order.

    Args:
        lengths: tokens of each pair.
        budget: most tokens a step may cost. A pair that alone costs more cannot be split: it
            gets a step to itself.
        cost: how the scorer pays.
        max_pairs: most pairs a step may hold; None means no limit.

    Returns:
        Steps that together hold every index exactly once.
    """
    array = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-array, kind="stable")
    steps: list[Step] = []
    step: Step = []
    paid = 0
    for index in order.tolist():
        length = int(array[index])
        paid_with = paid + length if cost == "ragged" or not step else _padded(array, step)
        full = max_pairs is not None and len(step) >= max_pairs
        if step and (full or paid_with > budget):
            steps.append(step)
            step, paid_with = [], length
        step.append(index)
        paid = paid_with
    if step:
        steps.append(step)
    return steps


def windows(sizes: Sequence[int]) -> list[list[int]]:
    """Split many texts into windows to encode one after another, longest texts first.

    Encoding a window is hidden behind the scoring of the one before, but for the first, which is
    short so that the device need not wait long. A call of everyday size is one window.

    Args:
        sizes: characters of each pair.

    Returns:
        At least one list of indices; together they hold every index once.
    """
    if sum(sizes) <= FIRST_WINDOW:
        return [list(range(len(sizes)))]
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    parts: list[list[int]] = [[]]
    room = FIRST_WINDOW
    for index in order:
        if parts[-1] and room < sizes[index]:
            parts.append([])
            room = WINDOW
        parts[-1].append(index)
        room -= sizes[index]
    return parts


def _padded(array: npt.NDArray[np.int64], step: Step) -> int:
    """Cost of the step with one pair more: its first pair is its longest."""
    return int(array[step[0]]) * (len(step) + 1)
