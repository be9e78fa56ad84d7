"""Packing: properties that hold for any lengths and budgets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.packing import (
    DEFAULT_BUDGETS,
    FIRST_WINDOW,
    NO_BUDGET,
    WINDOW,
    pack,
    step_budget,
    step_cost,
    windows,
)

lengths = st.lists(st.integers(1, 600), max_size=80)
budgets = st.integers(1, 4000)
costs = st.sampled_from(["none", "rectangular"])
limits = st.none() | st.integers(1, 12)


@given(lengths, budgets, costs, limits)
def test_every_pair_goes_exactly_once(lengths, budget, cost, max_pairs):
    steps = pack(lengths, budget, padding=cost, max_pairs=max_pairs)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert all(steps)


@given(lengths, budgets, costs, limits)
def test_no_step_costs_more_than_the_budget_save_a_pair_alone(lengths, budget, cost, max_pairs):
    for step in pack(lengths, budget, padding=cost, max_pairs=max_pairs):
        cost_tokens = step_cost([lengths[i] for i in step], cost)
        assert cost_tokens <= budget or len(step) == 1
        assert max_pairs is None or len(step) <= max_pairs


@given(lengths, budgets, costs, limits)
def test_longest_first_and_equals_in_input_order(lengths, budget, cost, max_pairs):
    steps = pack(lengths, budget, padding=cost, max_pairs=max_pairs)
    order = [i for step in steps for i in step]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(lengths, budgets, costs, limits)
def test_no_step_is_closed_early(lengths, budget, cost, max_pairs):
    steps = pack(lengths, budget, padding=cost, max_pairs=max_pairs)
    for step, following in pairwise(steps):
        with_one_more = [lengths[i] for i in (*step, following[0])]
        assert step_cost(with_one_more, cost) > budget or len(step) == max_pairs


@given(lengths, budgets, costs, limits)
def test_the_same_lengths_give_the_same_steps(lengths, budget, cost, max_pairs):
    again = np.array(lengths, dtype=np.int32)
    assert pack(lengths, budget, padding=cost, max_pairs=max_pairs) == pack(
        again, budget, padding=cost, max_pairs=max_pairs
    )


@given(lengths, budgets, costs, st.randoms(use_true_random=False))
def test_shuffled_pairs_are_packed_to_the_same_lengths(lengths, budget, cost, chance):
    shuffled = list(lengths)
    chance.shuffle(shuffled)

    def shape(values: list[int]) -> list[list[int]]:
        return [[values[i] for i in step] for step in pack(values, budget, padding=cost)]

    assert shape(lengths) == shape(shuffled)


@given(lengths)
def test_cost_of_a_step(lengths):
    assert step_cost(lengths, "none") == sum(lengths)
    assert step_cost(lengths, "rectangular") == max(lengths, default=0) * len(lengths)


@pytest.mark.parametrize(
    ("lengths", "budget", "cost", "max_pairs", "steps"),
    [
        ([5, 9, 5, 2], 14, "none", None, [[1, 0], [2, 3]]),
        ([5, 9, 5, 2], 14, "rectangular", None, [[1], [0, 2], [3]]),
        ([5, 9, 5, 2], 15, "rectangular", None, [[1], [0, 2, 3]]),
        ([5, 9, 5, 2], 1, "none", None, [[1], [0], [2], [3]]),
        ([5, 9, 5, 2], NO_BUDGET, "none", 3, [[1, 0, 2], [3]]),
        ([], 14, "none", None, []),
    ],
)
def test_examples(lengths, budget, cost, max_pairs, steps):
    assert pack(lengths, budget, padding=cost, max_pairs=max_pairs) == steps


def test_an_endless_budget_does_not_overflow():
    many = np.full(5000, 8192, dtype=np.int32)
    assert [len(step) for step in pack(many, NO_BUDGET, padding="rectangular")] == [5000]
    assert step_cost(np.full(300_000, 8192, dtype=np.int32), "none") == 300_000 * 8192
    assert step_cost(np.full(300_000, 8192, dtype=np.int32), "rectangular") == 300_000 * 8192


@pytest.mark.parametrize(
    ("token_budget", "batch_size", "device", "budget"),
    [
        (500, None, "cpu", 500),
        (500, 8, "cuda:1", 500),
        (None, 8, "cpu", NO_BUDGET),
        (None, None, "cpu", DEFAULT_BUDGETS["cpu"]),
        (None, None, "cuda:1", DEFAULT_BUDGETS["cuda"]),
    ],
)
def test_the_budget_that_two_knobs_mean(token_budget, batch_size, device, budget):
    assert step_budget(token_budget, batch_size, device) == budget


@given(st.lists(st.integers(0, 400_000), max_size=40))
def test_windows_hold_every_text_once_and_no_more_than_fits(sizes):
    parts = windows(sizes)
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    in_order = [sizes[index] for part in parts for index in part]
    assert in_order == (sorted(sizes, reverse=True) if len(parts) > 1 else sizes)
    for number, part in enumerate(parts):
        limit = WINDOW if number else FIRST_WINDOW
        assert len(part) <= 1 or sum(sizes[index] for index in part) <= limit
        assert part or not sizes


def test_an_everyday_call_is_one_window():
    assert len(windows([1200] * 100)) == 1
