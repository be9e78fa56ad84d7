"""The memory ladder: it ends, in its order, and gives up nothing unasked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.oom_policy import (
    LOWER_PRECISION,
    RUNGS,
    SHORTEST_MAX_LENGTH,
    StepFailure,
    next_action,
)

ORDER = [
    "drop_caches",
    "halve_budget",
    "one_pair",
    "fresh_worker",
    "lower_precision",
    "shorten",
    "give_up",
]

allowances = st.lists(st.sampled_from(["precision", "max_length"]), unique=True).map(tuple)


@st.composite
def failures(draw: st.DrawFn) -> StepFailure:
    lengths = draw(st.lists(st.integers(1, 8192), min_size=1, max_size=20))
    padded = draw(st.booleans())
    return StepFailure(
        pairs=len(lengths),
        cost=max(lengths) * len(lengths) if padded else sum(lengths),
        longest=max(lengths),
        caches_dropped=draw(st.booleans()),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        allow=draw(allowances),
        fresh_may_do=draw(st.booleans()),
    )


def test_the_table_is_the_documented_ladder():
    assert [rung.__name__.lstrip("_") for rung in RUNGS] == ORDER


@given(failures())
def test_nothing_is_given_up_without_allowance(failure):
    action = next_action(failure)
    assert action.precision is None or "precision" in failure.allow
    assert action.max_length is None or "max_length" in failure.allow


@given(failures())
def test_an_action_says_what_and_what_to_do(failure):
    action = next_action(failure)
    assert action.rung in ORDER
    assert action.detail
    assert action.remedy.endswith(".")


@given(failures())
def test_caches_are_dropped_first_and_once(failure):
    assert (next_action(failure).rung == "drop_caches") == (not failure.caches_dropped)


@given(failures())
def test_budgets_shrink_and_still_hold_the_longest_pair(failure):
    action = next_action(failure)
    if action.budget is None:
        assert failure.pairs == 1 or not failure.caches_dropped
        return
    assert failure.pairs > 1
    assert failure.longest <= action.budget < failure.cost


@given(failures())
def test_a_lone_pair_has_a_fresh_process_before_anything_is_given_up(failure):
    lone = replace(failure, pairs=1, cost=failure.longest, caches_dropped=True, fresh_may_do=True)
    assert next_action(lone).rung == "fresh_worker"


@given(failures())
def test_a_lone_pair_is_shortened_only_after_precision(failure):
    lone = replace(failure, pairs=1, cost=failure.longest, caches_dropped=True, fresh_may_do=False)
    lower = LOWER_PRECISION.get(lone.precision) if "precision" in lone.allow else None
    may_cut = "max_length" in lone.allow and lone.longest // 2 >= SHORTEST_MAX_LENGTH
    expected = "lower_precision" if lower else "shorten" if may_cut else "give_up"
    assert next_action(lone).rung == expected


@given(failures())
def test_the_ladder_ends_in_order(failure):
    """Whatever is tried fails again: few steps, never back to an earlier rung, then the end."""
    rungs = []
    while not rungs or rungs[-1] != "give_up":
        action = next_action(failure)
        rungs.append(action.rung)
        failure = _after(failure, action)
        assert len(rungs) < 64
    places = [ORDER.index(rung) for rung in rungs]
    assert places == sorted(places)
    for once in ("drop_caches", "one_pair", "fresh_worker", "lower_precision", "give_up"):
        assert rungs.count(once) <= 1


def _after(failure: StepFailure, action: object) -> StepFailure:
    """What may fail next: as many equal pairs as the new budget holds."""
    failure = replace(failure, caches_dropped=True)
    if action.budget is not None:
        pairs = max(1, min(failure.pairs - 1, action.budget // failure.longest))
        failure = replace(failure, pairs=pairs, cost=pairs * failure.longest)
    if action.rung == "fresh_worker":
        failure = replace(failure, fresh_may_do=False)
    if action.precision is not None:
        failure = replace(failure, precision=action.precision)
    if action.max_length is not None:
        failure = replace(failure, longest=action.max_length, cost=action.max_length)
    return failure


BASE = StepFailure(pairs=4, cost=400, longest=100, caches_dropped=True, precision="fp32")


@pytest.mark.parametrize(
    ("failure", "rung", "budget"),
    [
        (replace(BASE, caches_dropped=False), "drop_caches", None),
        (BASE, "halve_budget", 200),
        (replace(BASE, cost=401), "halve_budget", 200),
        (replace(BASE, pairs=2, cost=200), "one_pair", 100),
        (replace(BASE, pairs=2, cost=101), "one_pair", 100),
        (replace(BASE, pairs=1, cost=100, fresh_may_do=True), "fresh_worker", None),
        (replace(BASE, pairs=1, cost=100), "give_up", None),
    ],
)
def test_examples(failure, rung, budget):
    action = next_action(failure)
    assert (action.rung, action.budget) == (rung, budget)


def test_words_name_the_numbers():
    assert next_action(BASE).detail == "token budget 400 -> 200"
    assert "token_budget=200" in next_action(BASE).remedy
    lone = replace(BASE, pairs=1, cost=300, longest=300, allow=("max_length",))
    assert next_action(lone).max_length == 150
    assert "300 -> 150" in next_action(lone).detail
    assert "allow=('precision', 'max_length')" in next_action(replace(lone, allow=())).remedy
