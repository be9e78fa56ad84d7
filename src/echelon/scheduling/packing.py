"""Packing: which pairs go through the model together. Pure: it knows lengths and budgets only.

:func:`pack` splits all pairs of a call into steps. :func:`choose` forms one step from candidates in
the order of their turn; the first candidate always goes, so no pair waits without end.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.types import IntArray, Padding

Step = list[int]
"""Indices of the pairs of one forward pass."""

DEFAULT_BUDGETS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens of a step before tuning: a CPU gains nothing beyond, a GPU is full (docs/LOG.md). Apple's
GPUs (``mps``) are a guess."""

FIRST_WINDOW, WINDOW = 2**17, 2**20
"""Characters of a window of texts: dozens of steps, so that the last, short one costs little, and a
few megabytes of ids for the longest texts."""

NO_BUDGET = 2**62
"""A token budget without effect: the number of pairs decides."""


def step_budget(token_budget: int | None, batch_size: int | None, device: str) -> int:
    """The token budget: without effect if only ``batch_size`` is set; else the device's default."""
    if token_budget is not None:
        return token_budget
    return NO_BUDGET if batch_size is not None else DEFAULT_BUDGETS[device.partition(":")[0]]


def step_cost(lengths: Sequence[int] | IntArray, padding: Padding) -> int:
    """Tokens of a step, padding included: longest × pairs with rectangular padding."""
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

    A step then holds pairs of almost one length, the largest step comes first (memory runs out at
    the start or never), and the same lengths give the same order. Pairs of one length keep their
    input order.

    Args:
        lengths: tokens of each pair.
        budget: maximum tokens of a step; a larger pair gets a step to itself.
        padding: how the scorer pads.
        max_pairs: maximum pairs of a step; None means no limit.

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
        if padding == "none" or not step:
            larger = cost_tokens + length
        else:  # the first pair of a step is its longest
            larger = int(array[step[0]]) * (len(step) + 1)
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
    """Split many texts into windows that are encoded one after another, longest texts first.

    A window is encoded while the previous one is scored. The first is short, so that the device
    does not wait long. A call of usual size is one window. ``sizes`` are the characters of each
    pair. Returns at least one list of indices; together they hold every index once.
    """
    if sum(sizes) <= FIRST_WINDOW:
        return [list(range(len(sizes)))]
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    parts: list[list[int]] = [[]]
    left = FIRST_WINDOW
    for index in order:
        if parts[-1] and left < sizes[index]:
            parts.append([])
            left = WINDOW
        parts[-1].append(index)
        left -= sizes[index]
    return parts


REACH: dict[Padding, float] = {"none": 1.25, "rectangular": 4.0}
"""Tokens of the candidates, in budgets. Without padding only the last gap of a step must be filled;
with padding pairs of one length are wanted, and four budgets hold enough of them."""

MAX_FILL = 0.8
"""A step with padding takes no pair shorter than this share of its longest: the padding would cost
more than the overhead of another step (an eighth to a quarter of a step)."""

SPLIT_GAIN_S = 0.005
"""Waiting pairs are shared among idle workers if a step then ends this much sooner: sending another
step takes 1 to 2 ms between machines."""


def choose(lengths: Sequence[int], budget: int, max_pairs: int | None, padding: Padding) -> Step:
    """Choose candidates for one step; returns their indices in their order.

    Args:
        lengths: tokens of each candidate, in the order of their turn.
        budget: maximum tokens of the step, unless its first pair alone is larger.
        max_pairs: maximum pairs of the step; None means no limit.
        padding: how the scorer pads.
    """
    if max_pairs is None:
        max_pairs = len(lengths)
    chooser = _first_fit if padding == "none" else _one_length
    return chooser(lengths, budget, max_pairs)


def share(
    pairs: int, tokens: int, idle: int, budget: int, seconds: Callable[[int, int], float]
) -> int:
    """Budget of the next step: one idle worker's part of the waiting pairs if they end sooner.

    ``seconds`` predicts the time of (tokens, pairs); ``idle`` workers have no step.
    """
    part, whole = -(-tokens // max(1, idle)), min(tokens, budget)
    if part >= whole:
        return budget
    gain_s = seconds(whole, pairs * whole // tokens) - seconds(part, pairs * part // tokens)
    return part if gain_s >= SPLIT_GAIN_S else budget


def _first_fit(lengths: Sequence[int], budget: int, max_pairs: int) -> Step:
    """Candidates in turn, each that fits."""
    chosen, cost_tokens = [0], lengths[0]
    for index in range(1, len(lengths)):
        if len(chosen) >= max_pairs:
            break
        if cost_tokens + lengths[index] <= budget:
            chosen.append(index)
            cost_tokens += lengths[index]
    return chosen


def _one_length(lengths: Sequence[int], budget: int, max_pairs: int) -> Step:
    """The best run of candidates of similar length that includes the first.

    A run's gain is its tokens over :data:`MAX_FILL` minus its tokens with padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    falling = [-lengths[i] for i in order]
    sums = list(accumulate((lengths[i] for i in order), initial=0))
    first = order.index(0)
    best, best_gain = (first, first + 1), float("-inf")
    for start in range(first, -1, -1):
        longest = -falling[start]
        end = min(
            start + min(max_pairs, budget // longest), bisect_right(falling, -MAX_FILL * longest)
        )
        if end <= first and start < first:
            break  # longer pairs leave even less room
        end = max(end, start + 1)
        gain = (sums[end] - sums[start]) / MAX_FILL - longest * (end - start)
        if gain > best_gain:
            best, best_gain = (start, end), gain
    return sorted(order[slice(*best)])
