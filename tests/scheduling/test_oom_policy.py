"""The out-of-memory policy: it ends, keeps its order, and gives up nothing unasked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.oom_policy import (
    MIN_MAX_LENGTH,
    RUNGS,
    OomPolicy,
    StepFailure,
    next_action,
)
from echelon.scheduling.token_budget import MEMORY_QUIET, TokenBudget

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
        cost_tokens=max(lengths) * len(lengths) if padded else sum(lengths),
        longest=max(lengths),
        caches_dropped=draw(st.booleans()),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        allow=draw(allowances),
        fresh_may_help=draw(st.booleans()),
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
    assert failure.longest <= action.budget < failure.cost_tokens


@given(failures())
def test_a_lone_pair_has_a_fresh_process_before_anything_is_given_up(failure):
    lone = replace(
        failure, pairs=1, cost_tokens=failure.longest, caches_dropped=True, fresh_may_help=True
    )
    assert next_action(lone).rung == "fresh_worker"


@given(failures())
def test_a_lone_pair_is_shortened_only_after_precision(failure):
    lone = replace(
        failure, pairs=1, cost_tokens=failure.longest, caches_dropped=True, fresh_may_help=False
    )
    lower = "precision" in lone.allow and lone.precision == "fp32"
    may_cut = "max_length" in lone.allow and lone.longest // 2 >= MIN_MAX_LENGTH
    expected = "lower_precision" if lower else "shorten" if may_cut else "give_up"
    assert next_action(lone).rung == expected


def test_a_card_without_bf16_units_goes_down_to_fp16():
    lone = replace(BASE, pairs=1, cost_tokens=100, allow=("precision",))
    assert next_action(lone).precision == "bf16"
    old = next_action(replace(lone, lower_precision="fp16"))
    assert old.precision == "fp16"
    assert "fp32 -> fp16" in old.detail
    assert "precision='fp16'" in old.remedy


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
        failure = replace(failure, pairs=pairs, cost_tokens=pairs * failure.longest)
    if action.rung == "fresh_worker":
        failure = replace(failure, fresh_may_help=False)
    if action.precision is not None:
        failure = replace(failure, precision=action.precision)
    if action.max_length is not None:
        failure = replace(failure, longest=action.max_length, cost_tokens=action.max_length)
    return failure


BASE = StepFailure(pairs=4, cost_tokens=400, longest=100, caches_dropped=True, precision="fp32")


@pytest.mark.parametrize(
    ("failure", "rung", "budget"),
    [
        (replace(BASE, caches_dropped=False), "drop_caches", None),
        (BASE, "halve_budget", 200),
        (replace(BASE, cost_tokens=401), "halve_budget", 200),
        (replace(BASE, pairs=2, cost_tokens=200), "one_pair", 100),
        (replace(BASE, pairs=2, cost_tokens=101), "one_pair", 100),
        (replace(BASE, pairs=1, cost_tokens=100, fresh_may_help=True), "fresh_worker", None),
        (replace(BASE, pairs=1, cost_tokens=100), "give_up", None),
    ],
)
def test_examples(failure, rung, budget):
    action = next_action(failure)
    assert (action.rung, action.budget) == (rung, budget)


def test_words_name_the_numbers():
    assert next_action(BASE).detail == "token budget 400 -> 200"
    assert "token_budget=200" in next_action(BASE).remedy
    lone = replace(BASE, pairs=1, cost_tokens=300, longest=300, allow=("max_length",))
    assert next_action(lone).max_length == 150
    assert "300 -> 150" in next_action(lone).detail
    assert "allow=('precision', 'max_length')" in next_action(replace(lone, allow=())).remedy


# What the policy remembers.


def step(*lengths: int, allow: tuple = ()) -> StepFailure:
    return StepFailure(len(lengths), sum(lengths), max(lengths), "fp32", allow)


def policy(max_tokens: int = 10_000, learned: list | None = None) -> OomPolicy:
    report = None if learned is None else learned.append
    return OomPolicy(TokenBudget(max_tokens), learned=report)


def rung(made: OomPolicy, failure: StepFailure, request: object = 1, **settings) -> str:
    return made.failed(failure, [request], **settings).rung


def test_caches_are_dropped_once_until_a_step_of_the_process_has_fitted():
    made = policy()
    assert rung(made, step(50, 50), 1) == "drop_caches"
    assert rung(made, step(40, 40), 2) == "one_pair"
    assert rung(made, step(40), 3, worker=1) == "drop_caches"
    made.fitted([4], 10, 10)
    assert rung(made, step(40, 40), 5) == "drop_caches"
    assert rung(made, step(40, 40), 6, worker=1) == "one_pair"


def test_caches_are_dropped_once_for_a_request_until_one_of_its_pairs_is_scored():
    made = policy()
    assert rung(made, step(50), 1) == "drop_caches"
    made.fitted([2], 10, 10)
    assert rung(made, step(50), 1) == "give_up"
    made.fitted([1, 2], 10, 10)
    assert rung(made, step(50), 1) == "drop_caches"


def test_nothing_is_remembered_of_a_request_that_has_ended():
    made = policy()
    assert rung(made, step(50), 1) == "drop_caches"
    made.fitted([2], 10, 10)
    made.forget(1)
    assert rung(made, step(50), 1) == "drop_caches"


def test_a_request_whose_pair_a_fresh_process_scored_may_have_another():
    """Meanwhile a pair of another request may have filled that process."""
    made = policy()
    rung(made, step(50), 1)
    assert rung(made, step(50), 1, renewable=True) == "fresh_worker"
    made.fitted([1], 50, 50)
    rung(made, step(300), 2)
    assert rung(made, step(50), 1, renewable=True) == "fresh_worker"


def test_a_request_whose_pairs_do_not_fit_in_two_processes_may_have_both_replaced():
    made = policy()
    rung(made, step(50), 1)
    rung(made, step(50), 2, worker=1)
    assert rung(made, step(50), 1, renewable=True) == "fresh_worker"
    assert rung(made, step(50), 1, worker=1, renewable=True) == "fresh_worker"
    assert rung(made, step(50), 1, worker=1, renewable=True) == "give_up"


def test_a_request_has_one_fresh_process_and_only_where_there_can_be_one():
    made = policy()
    assert rung(made, step(50), 1, renewable=True) == "drop_caches"
    assert rung(made, step(50), 1, renewable=True) == "fresh_worker"
    assert rung(made, step(50), 1, renewable=True) == "give_up"
    assert rung(made, step(50), 2) == "give_up"
    assert rung(made, step(50, 50), 3, renewable=True) == "one_pair"


def test_no_pair_as_long_as_one_that_a_fresh_process_refused_is_tried_until_one_fits():
    made = policy()
    rung(made, step(50), 1)
    assert rung(made, step(50), 1, fresh=True, renewable=True) == "give_up"
    assert rung(made, step(60), 2, renewable=True) == "give_up"
    assert rung(made, step(50), 3, renewable=True) == "give_up"
    assert rung(made, step(49), 4, renewable=True) == "fresh_worker"
    made.fitted([5], 50, 49)
    rung(made, step(50), 6)
    assert rung(made, step(50), 6, renewable=True) == "give_up"
    made.fitted([7], 51, 50)
    rung(made, step(60), 8)
    assert rung(made, step(60), 8, renewable=True) == "fresh_worker"


def test_a_step_of_several_pairs_says_nothing_of_one_alone():
    made = policy()
    rung(made, step(50, 50), 1)
    assert rung(made, step(50, 50), 1, fresh=True, renewable=True) == "one_pair"
    assert rung(made, step(50), 2, renewable=True) == "fresh_worker"


def test_the_budget_that_memory_allows_is_reported_when_it_falls_and_when_it_rises():
    learned: list = []
    made = policy(400, learned)
    for _ in range(3):
        rung(made, step(*[20] * 20))
    assert learned == [200]
    assert made.budget.tokens == 200
    reasons = [made.fitted([1], 10, 10) for _ in range(4 * MEMORY_QUIET)]
    assert reasons.count("recovered") == len(learned) - 1
    assert learned[1:-1] == sorted(learned[1:-1])
    assert learned[-1] is None
    assert made.budget.tokens == 400


def test_a_budget_that_lateness_lowered_is_not_reported():
    learned: list = []
    made = policy(400, learned)
    assert [made.fitted([1], 400, 20, predicted_s=1, actual_s=9) for _ in range(3)][-1] == "late"
    for _ in range(MEMORY_QUIET):
        made.fitted([1], 10, 10)
    assert made.budget.tokens == 400
    assert learned == []


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    allowances,
    st.booleans(),
    st.data(),
)
def test_the_ladder_of_a_request_ends_whatever_others_do(lengths, allow, renewable, data):
    """Steps of other requests fit between any two tries, and no pair of the request ever does."""
    made, waiting, failures = policy(), lengths, 0
    while True:
        if data.draw(st.booleans()):
            made.fitted(["other"], data.draw(st.integers(1, 900)), data.draw(st.integers(1, 300)))
        action = made.failed(step(*waiting, allow=allow), [1], renewable=renewable)
        if action.rung == "give_up":
            break
        if action.budget is not None:
            waiting = waiting[: max(1, len(waiting) // 2)]
        if action.max_length is not None:
            waiting = [min(waiting[0], action.max_length)]
        if action.precision is not None:
            allow = tuple(name for name in allow if name != "precision")
        failures += 1
        assert failures < 40
