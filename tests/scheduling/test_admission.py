"""Admission: which requests are admitted, and why others are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import DeadlinePassed, InvalidInput, Overloaded, TooLarge
from echelon.scheduling.admission import (
    RULES,
    AdmissionLimits,
    RequestCost,
    SystemLoad,
    TokenEstimate,
    refuse,
)
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import Coefficients, CostModel
from echelon.scheduling.queue import PairRequest

COST = CostModel(Coefficients(0.0, 0.001, 0.0))
"""A thousand tokens a second, nothing else."""

BOUNDS = AdmissionLimits(
    max_requests=4, max_tokens=10_000, max_wait_s=5, max_documents=100, max_request_tokens=8000
)


def load_of(*requests: int, workers: int = 1, **settings) -> SystemLoad:
    """Requests of one document each, with so many tokens, waiting for steps of 100."""
    batcher = Batcher(COST, 100)
    for number, tokens in enumerate(requests):
        batcher.submit(PairRequest(number, (tokens,)), 0)
    return SystemLoad(batcher.load(), COST, workers, **settings)


def cost_of(tokens: int, **settings) -> RequestCost:
    return RequestCost(settings.pop("documents", 1), tokens, tokens * tokens, **settings)


CASES = {
    "deadline_passed": (cost_of(10, deadline=7.0), load_of(), DeadlinePassed, 504),
    "too_many_documents": (cost_of(10, documents=101), load_of(), TooLarge, 413),
    "too_many_tokens": (cost_of(8001), load_of(), TooLarge, 413),
    "requests_full": (cost_of(10), load_of(10, 10, 10, 10), Overloaded, 429),
    "tokens_full": (cost_of(6000), load_of(4001), Overloaded, 429),
    "deadline_impossible": (cost_of(4000, deadline=10.0), load_of(), DeadlinePassed, 504),
    "deadline_too_near": (cost_of(2000, deadline=10.0), load_of(3000), Overloaded, 429),
    "wait_too_long": (
        cost_of(6000),
        load_of(2000, 2000, workers=0, tokenising_tokens=0),
        Overloaded,
        429,
    ),
}


def test_every_reason_has_a_case():
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("reason", RULES)
def test_each_reason(reason):
    asked, inside, kind, status = CASES[reason]
    bounds = (
        replace(BOUNDS, max_tokens=20_000, max_wait_s=3.9) if reason == "wait_too_long" else BOUNDS
    )
    refusal = refuse(asked, inside, bounds, now=7.0)
    assert refusal is not None
    assert refusal.reason == reason
    assert type(refusal.error) is kind
    assert refusal.error.status == status


def test_an_idle_service_admits_requests_within_the_limits():
    assert refuse(cost_of(8000, documents=100), load_of(), BOUNDS, 0) is None
    assert refuse(cost_of(50, deadline=0.06), load_of(), BOUNDS, 0) is None


def test_the_fields_and_limits_are_named():
    refusal = refuse(cost_of(10, documents=101), load_of(), BOUNDS, 0)
    assert str(refusal.error) == (
        "documents: 101 are more than the 100 of one request. Send them in several requests."
    )
    assert refusal.error.field == "documents"


def test_a_short_request_does_not_wait_for_the_backlog():
    inside = load_of(4000, 4000)
    assert inside.backlog_s == pytest.approx(8)
    assert inside.wait_s(cost_of(100)) == pytest.approx(0.2)
    assert inside.wait_s(cost_of(100, priority="high")) == pytest.approx(0.05)
    assert inside.wait_s(cost_of(5000)) == pytest.approx(8)
    assert refuse(cost_of(100, deadline=0.5), inside, BOUNDS, 0) is None


def test_workers_share_the_work():
    assert load_of(4000, workers=4).backlog_s == pytest.approx(1)
    assert load_of(workers=4).own_s(cost_of(4000)) == pytest.approx(1)
    assert load_of(workers=4).own_s(cost_of(50)) == pytest.approx(0.05)
    assert load_of(4000, workers=0).backlog_s == pytest.approx(4)


def test_requests_still_being_tokenised_count():
    assert refuse(cost_of(10), load_of(10, tokenising=3), BOUNDS, 0).reason == "requests_full"
    assert (
        refuse(cost_of(10), load_of(10, tokenising=1, tokenising_tokens=9990), BOUNDS, 0).reason
        == "tokens_full"
    )


@given(
    st.lists(st.integers(1, 4000), max_size=6),
    st.integers(1, 8000),
    st.none() | st.floats(0.01, 20),
    st.integers(0, 3),
)
def test_a_request_is_admitted_after_retry_after(requests, tokens, deadline, workers):
    """The time in Retry-After is true: with that much work done, there is room."""
    inside = load_of(*requests, workers=workers)
    asked = cost_of(tokens, deadline=deadline)
    refusal = refuse(asked, inside, BOUNDS, 0)
    if refusal is None or not isinstance(refusal.error, Overloaded):
        return
    wait = refusal.error.retry_after_s
    assert 0 < wait <= inside.backlog_s + 1e-9
    done = wait * max(1, workers) * 1000 + 1
    if refusal.reason in {"tokens_full", "wait_too_long"}:
        load = inside.queue
        share = max(0.0, 1 - done / load.tokens)
        later = replace(load, tokens=int(load.tokens * share), squares=0)
        fewer = replace(asked, tokens=tokens, deadline=None)
        again = refuse(fewer, replace(inside, queue=later), BOUNDS, 0)
        assert again is None or again.reason != refusal.reason


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_requests": 0}, "max_requests"),
        ({"max_wait_s": 0}, "max_wait_s"),
        ({"max_wait_s": float("nan")}, "max_wait_s"),
        ({"max_tokens": 100}, "max_request_tokens"),
    ],
)
def test_invalid_limits_are_refused(settings, field):
    with pytest.raises(InvalidInput) as caught:
        AdmissionLimits(**settings)
    assert caught.value.field == field


def test_errors_travel_between_processes():
    for error in (Overloaded("full", 2.5), TooLarge("documents", "many", "Send fewer.")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_tokens_are_estimated_from_what_was_seen():
    estimate = TokenEstimate()
    for _ in range(60):
        estimate.observe(1000, 500)
    assert estimate.tokens([500] * 4, 512) == pytest.approx(1000, rel=0.02)
    assert estimate.tokens([10**6] * 4, 512) == 2048
    assert estimate.tokens([10**6, 0, 100], 512) == pytest.approx(512 + 1 + 50, rel=0.02)
    estimate.observe(0, 5)
    estimate.observe(1, 10**6)
    assert estimate.ratio <= 1
