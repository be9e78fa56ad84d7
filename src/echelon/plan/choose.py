"""Which of the candidates make up a step.

Pure: knows lengths and budgets. Candidates come in the order of their turn; the first always goes,
whatever it costs, so that nobody waits for ever.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.types import Cost

Choice = list[int]
"""Indices of the chosen candidates, in their order."""

REACH: dict[Cost, float] = {"ragged": 1.25, "padded": 4.0}
"""How many budgets' worth of candidates are looked at. A ragged step only wants its last gap
filled; a padded one wants pairs of one length, and finds them among four steps' worth."""

MAX_FILL = 0.8
"""A padded step takes no pair shorter than this share of its longest: it would pay more for the
padding than the base cost of a step of its own is worth (an eighth to a quarter of a step)."""

SPLIT_GAIN_S = 0.005
"""What waits is shared among idle workers where a step then ends so much sooner: less is eaten up
by handing another step over, which takes a millisecond or two between machines."""


def choose(lengths: Sequence[int], budget: int, max_pairs: int | None, cost: Cost) -> Choice:
    """Choose candidates for one step.

    Args:
        lengths: tokens of each candidate, in the order of their turn.
        budget: most tokens the step may cost, unless its first pair alone costs more.
        max_pairs: most pairs it may hold; None means no limit.
        cost: how the scorer pays.
    """
    most = len(lengths) if max_pairs is None else max_pairs
    return CHOOSERS[cost](lengths, budget, most)


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
    chosen, paid = [0], lengths[0]
    for index in range(1, len(lengths)):
        if len(chosen) >= most:
            break
        if paid + lengths[index] <= budget:
            chosen.append(index)
            paid += lengths[index]
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


CHOOSERS: dict[Cost, Callable[[Sequence[int], int, int], Choice]] = {
    "ragged": _first_fit,
    "padded": _one_length,
}
