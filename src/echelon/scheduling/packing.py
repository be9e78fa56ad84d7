"""Packing: which pairs go through the model together.

Knows lengths and budgets; must not know texts, devices or time.

Which of the candidates make up a step.

Pure: knows lengths and budgets. Candidates come in the order of their turn; the first always goes,
whatever it costs, so that nobody waits for ever.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from echelon.types import IntArray, Padding

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


def step_cost(lengths: Sequence[int] | IntArray, padding: Padding) -> int:
    """Tokens that a step of these lengths is paid for.

    A ragged scorer pays for its tokens; a padded one for longest × pairs.
    """
    if len(lengths) == 0:
        return 0
    array = np.asarray(lengths)
    return int(array.sum()) if padding == "none" else int(array.max()) * len(array)


def pack(
    lengths: Sequence[int] | IntArray,
    budget: int,
    *,
    padding: Padding = "none",
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
        padding: how the scorer pads.
        max_pairs: most pairs a step may hold; None means no limit.

    Returns:
        Steps that together hold every index exactly once.
    """
    array = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-array, kind="stable")
    steps: list[Step] = []
    step: Step = []
    cost_tokens = 0
    for index in order.tolist():
        length = int(array[index])
        larger = cost_tokens + length if padding == "none" or not step else _padded(array, step)
        full = max_pairs is not None and len(step) >= max_pairs
        if step and (full or larger > budget):
            steps.append(step)
            step, larger = [], length
        step.append(index)
        cost_tokens = larger
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


Choice = list[int]
"""Indices of the chosen candidates, in their order."""

REACH: dict[Padding, float] = {"none": 1.25, "rectangular": 4.0}
"""How many budgets' worth of candidates are looked at. A ragged step only wants its last gap
filled; a padded one wants pairs of one length, and finds them among four steps' worth."""

MAX_FILL = 0.8
"""A padded step takes no pair shorter than this share of its longest: it would pay more for the
padding than the base cost of a step of its own is worth (an eighth to a quarter of a step)."""

SPLIT_GAIN_S = 0.005
"""What waits is shared among idle workers where a step then ends so much sooner: less is eaten up
by handing another step over, which takes a millisecond or two between machines."""


def choose(lengths: Sequence[int], budget: int, max_pairs: int | None, padding: Padding) -> Choice:
    """Choose candidates for one step.

    Args:
        lengths: tokens of each candidate, in the order of their turn.
        budget: most tokens the step may cost, unless its first pair alone costs more.
        max_pairs: most pairs it may hold; None means no limit.
        padding: how the scorer pads.
    """
    most = len(lengths) if max_pairs is None else max_pairs
    return CHOOSERS[padding](lengths, budget, most)


def share(
    pairs: int, tokens: int, idle: int, budget: int, seconds: Callable[[int, int], float]
) -> int:
    """Budget of the next step: one idle worker's part, where what waits then ends sooner.

    Args:
        pairs: pairs that wait.
        tokens: their tokens.
        idle: workers that could take a step now.
        budget: most tokens a step may cost.
        seconds: predicts how long so many tokens, in so many pairs, take.
    """
    part, whole = -(-tokens // max(1, idle)), min(tokens, budget)
    if part >= whole:
        return budget
    gain_s = seconds(whole, pairs * whole // tokens) - seconds(part, pairs * part // tokens)
    return part if gain_s >= SPLIT_GAIN_S else budget


def _first_fit(lengths: Sequence[int], budget: int, most: int) -> Choice:
    """In turn, whatever fits."""
    chosen, cost_tokens = [0], lengths[0]
    for index in range(1, len(lengths)):
        if len(chosen) >= most:
            break
        if cost_tokens + lengths[index] <= budget:
            chosen.append(index)
            cost_tokens += lengths[index]
    return chosen


def _one_length(lengths: Sequence[int], budget: int, most: int) -> Choice:
    """Neighbours in length around the first candidate: the run that gains most.

    A run's gain is its tokens, at the price they have in a step filled to :data:`MAX_FILL`, less
    what the step costs.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    falling = [-lengths[i] for i in order]
    sums = list(accumulate((lengths[i] for i in order), initial=0))
    first = order.index(0)
    best, best_gain = (first, first + 1), float("-inf")
    for start in range(first, -1, -1):
        longest = -falling[start]
        end = min(start + min(most, budget // longest), bisect_right(falling, -MAX_FILL * longest))
        if end <= first and start < first:
            break  # longer pairs leave even less room
        end = max(end, start + 1)
        gain = (sums[end] - sums[start]) / MAX_FILL - longest * (end - start)
        if gain > best_gain:
            best, best_gain = (start, end), gain
    return sorted(order[slice(*best)])


CHOOSERS: dict[Padding, Callable[[Sequence[int], int, int], Choice]] = {
    "none": _first_fit,
    "rectangular": _one_length,
}
