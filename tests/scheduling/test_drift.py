"""A machine that changes its speed for good is reported once; one that is only busy is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.drift import FAR, HOLD, NEAR, Drift

levels = st.floats(0.01, 100)


@pytest.mark.parametrize("factor", [FAR * 1.01, 1 / FAR / 1.01, 2.0, 0.1])
def test_a_change_that_stays_is_told_once_and_taken_back_once(factor):
    drift = Drift(1.0)
    heard = [drift.see(factor) for _ in range(5 * HOLD)]
    assert heard.index("drifted") == HOLD - 1
    assert heard.count(None) == len(heard) - 1
    assert drift.drifted
    assert drift.ratio == pytest.approx(factor, rel=1e-3)
    heard = [drift.see(1.0) for _ in range(5 * HOLD)]
    assert heard.index("recovered") == HOLD - 1
    assert heard.count(None) == len(heard) - 1
    assert drift.ratio == pytest.approx(1, rel=1e-3)


def test_a_busy_minute_is_no_drift_and_between_the_limits_nothing_changes():
    drift = Drift(1.0)
    assert all(drift.see(3.0 if i % HOLD else 1.0) is None for i in range(1, 10 * HOLD))
    for _ in range(HOLD):
        drift.see(2.0)
    assert drift.drifted
    assert all(drift.see((FAR + NEAR) / 2) is None for _ in range(3 * HOLD))
    assert drift.drifted


@given(levels)
def test_without_a_profile_the_first_steps_are_what_is_normal(level):
    drift = Drift()
    assert all(drift.see(level) is None for _ in range(3 * HOLD))
    assert drift.ratio == pytest.approx(1)
    assert [drift.see(2 * level) for _ in range(HOLD)][-1] == "drifted"


@given(st.lists(levels, max_size=400))
def test_news_alternate_and_are_rare(seen):
    drift = Drift(1.0)
    news = [found for level in seen if (found := drift.see(level))]
    assert news == ["drifted", "recovered"] * (len(news) // 2) + ["drifted"] * (len(news) % 2)
    assert len(news) <= len(seen) / HOLD
    assert drift.ratio > 0
