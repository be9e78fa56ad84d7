"""The token budget while steps run: down where they do not fit or come late, up slowly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.packing import NO_BUDGET
from echelon.scheduling.token_budget import (
    GOAL_SHARE,
    LATE,
    LATE_OF,
    MAX_DOUBLINGS,
    MEMORY_QUIET,
    MIN_SHARE,
    QUIET,
    TokenBudget,
)

MOST = 1024


def well(budget, count, seconds=1.0):
    """Full steps that take what was predicted; how the budget moved."""
    return [budget.ended(budget.tokens, 1.0, seconds) for _ in range(count)]


def late(budget, count=LATE_OF[0]):
    return well(budget, count, LATE * 1.1)


def test_late_steps_lower_it_by_a_quarter_and_one_alone_does_not():
    budget = TokenBudget(MOST)
    assert late(budget, 2) == [None, None]
    well(budget, LATE_OF[1])
    assert late(budget) == [None, None, "late"]
    assert budget.tokens == 768
    assert well(budget, 20, LATE) == [None] * 20  # as late as that is not late
    assert budget.tokens == 768


def test_small_late_steps_say_nothing_of_large_ones():
    budget = TokenBudget(MOST)
    for _ in range(10):
        assert budget.ended(MOST // 2, 1.0, 9.0) is None
    assert budget.ended(MOST // 2 + 1, 1.0, 9.0) is None
    assert budget.tokens == MOST


def test_lateness_stops_at_an_eighth_and_it_comes_all_the_way_back():
    budget = TokenBudget(MOST)
    late(budget, 100)
    assert budget.tokens == MOST // MIN_SHARE
    changes = well(budget, 40 * QUIET)
    assert budget.tokens == MOST
    assert changes[: QUIET - 1] == [None] * (QUIET - 1)
    assert changes[QUIET - 1] == "recovered"


def test_memory_lowers_it_at_once_and_each_time_for_longer():
    budget, waits = TokenBudget(MOST), []
    for _ in range(MAX_DOUBLINGS + 3):
        assert budget.out_of_memory(budget.tokens // 2)
        before = budget.tokens
        changes = well(budget, 2 * (MEMORY_QUIET << MAX_DOUBLINGS))
        waits.append(changes.index("recovered") + 1)
        assert before < budget.tokens <= MOST
    assert waits[:3] == [MEMORY_QUIET, 2 * MEMORY_QUIET, 4 * MEMORY_QUIET]
    assert waits[-1] == waits[-2] == MEMORY_QUIET << MAX_DOUBLINGS


def test_memory_that_asks_for_no_less_changes_nothing():
    budget = TokenBudget(MOST)
    assert not budget.out_of_memory(MOST)
    assert budget.tokens == MOST


@given(st.floats(1e-5, 1e-2), st.floats(0.05, 10))
def test_under_a_goal_steps_come_to_lie_below_its_share_and_stay(token_s, goal_s):
    budget = TokenBudget(MOST, goal_s)

    def run(count):
        return [
            budget.ended(budget.tokens, token_s * budget.tokens, token_s * budget.tokens)
            for _ in range(count)
        ]

    run(20 * LATE_OF[1])
    fits = token_s * budget.tokens <= GOAL_SHARE * goal_s
    assert fits or budget.tokens == MOST // MIN_SHARE
    changes = run(30 * QUIET)
    assert set(changes) <= {None, "recovered"}
    grown = budget.tokens + max(1, budget.tokens // 8)
    assert budget.tokens == MOST or token_s * grown > GOAL_SHARE * goal_s


def test_the_reason_is_the_goal_where_the_goal_is_missed():
    budget = TokenBudget(MOST, goal_s=1.0)
    assert [budget.ended(MOST, 0.6, 0.6) for _ in range(3)][-1] == "goal"


@pytest.mark.parametrize("most", [1, 2, 7])
def test_a_tiny_budget_stays_one(most):
    budget = TokenBudget(most)
    late(budget, 100)
    assert budget.tokens >= 1


@given(
    st.sampled_from([1, 64, MOST, NO_BUDGET]),
    st.none() | st.floats(0.01, 10),
    st.lists(
        st.tuples(st.integers(1, 4096), st.floats(0.001, 2), st.floats(0.001, 20))
        | st.integers(1, 2048),
        max_size=300,
    ),
)
def test_whatever_happens_it_stays_within_its_bounds(most, goal_s, events):
    budget, taught = TokenBudget(most, goal_s), most
    for event in events:
        before = budget.tokens
        if isinstance(event, int):
            moved = budget.out_of_memory(event)
            assert moved == (budget.tokens < before)
            taught = min(taught, event)
        else:
            reason = budget.ended(*event)
            assert (reason is None) == (budget.tokens == before)
            assert (reason == "recovered") == (budget.tokens > before)
        assert min(taught, max(1, most // MIN_SHARE)) <= budget.tokens <= most
        assert before // 2 <= budget.tokens or isinstance(event, int)


def test_the_warm_up_says_with_how_many_tokens_a_goal_can_begin():
    budget = TokenBudget(16384, goal_s=0.1)  # steps of half of it
    budget.warmed_up(16384, 0.35)
    assert budget.tokens == 2340
    budget.warmed_up(16384, 0.02)  # the first pass loads kernels, the last one counts
    assert budget.tokens == 16384
    budget.warmed_up(16384, 60.0)
    assert budget.tokens == 16384 // 8
    budget.out_of_memory(1000)
    budget.warmed_up(16384, 0.02)  # a worker that starts again does not bring back what did not fit
    assert budget.tokens == 1000
    free = TokenBudget(16384)
    free.warmed_up(16384, 60.0)
    assert free.tokens == 16384
