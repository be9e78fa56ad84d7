"""Load shedding: only as configured, only low priority, and not on and off with each burst."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.admission import OFF_SHARE, ON_SHARE, QUIET_S, LoadShedding
from echelon.scheduling.queue import WEIGHTS

GOAL_S = 8.0
ON_S, OFF_S = ON_SHARE * GOAL_S, OFF_SHARE * GOAL_S

looks = st.lists(st.tuples(st.floats(0, 2 * GOAL_S), st.floats(0, 2 * QUIET_S)), max_size=60)
priorities = st.sampled_from(sorted(WEIGHTS))


def watched(shedding, seen):
    """(time, backlog, change, whether it is on) of each look; ``seen`` has the pauses."""
    now, looked = 0.0, []
    for backlog_s, later_s in seen:
        now += later_s
        change = shedding.update(backlog_s, now)
        looked.append((now, backlog_s, change, shedding.on))
    return looked


@given(looks, priorities)
def test_never_without_configuration(seen, priority):
    shedding = LoadShedding(None, GOAL_S)
    assert not any(change or on for _, _, change, on in watched(shedding, seen))
    assert shedding.fallback(priority, 512) is None


@given(looks, st.integers(1, 600), st.integers(1, 600))
def test_only_low_priority_and_only_what_is_longer(seen, max_length, longest):
    shedding = LoadShedding(max_length, GOAL_S)
    watched(shedding, seen)
    assert shedding.fallback("normal", longest) is None
    assert shedding.fallback("high", longest) is None
    expected = max_length if shedding.on and max_length < longest else None
    assert shedding.fallback("low", longest) == expected


@given(looks)
def test_on_only_above_the_upper_threshold_and_off_only_after_quiet_below_the_lower(seen):
    before = False
    looked = watched(LoadShedding(64, GOAL_S), seen)
    for place, (now, backlog_s, change, on) in enumerate(looked):
        quiet = all(b < OFF_S for at, b, _, _ in looked[: place + 1] if at > now - QUIET_S)
        if before:
            assert on is not quiet
        else:
            assert on is (backlog_s > ON_S)
        assert change == {(False, True): "on", (True, False): "off"}.get((before, on))
        before = on


@given(looks)
def test_the_same_looks_give_the_same_answer(seen):
    assert watched(LoadShedding(64, GOAL_S), seen) == watched(LoadShedding(64, GOAL_S), seen)


@given(looks)
def test_it_switches_at_most_twice_in_a_time_of_quiet(seen):
    ends = [now for now, _, change, _ in watched(LoadShedding(64, GOAL_S), seen) if change == "off"]
    assert all(b - a >= QUIET_S for a, b in pairwise(ends))


def test_the_thresholds_themselves():
    shedding = LoadShedding(64, GOAL_S)
    assert shedding.update(ON_S, 0.0) is None
    assert shedding.update(ON_S * 1.001, 1.0) == "on"
    assert shedding.update(OFF_S, 2.0) is None
    assert shedding.update(OFF_S * 0.999, 1.999 + QUIET_S) is None
    assert shedding.update(OFF_S * 0.999, 2.0 + QUIET_S) == "off"
    assert shedding.update(ON_S, 3.0 + QUIET_S) is None
    assert not shedding.on


@pytest.mark.parametrize("gap_s", [QUIET_S, 100 * QUIET_S])
def test_the_first_request_after_a_long_idle_time_is_read_in_full(gap_s):
    shedding = LoadShedding(64, GOAL_S)
    shedding.update(GOAL_S, 1000.0)
    assert shedding.fallback("low", 512) == 64
    assert shedding.update(0.0, 1000.0 + gap_s) == "off"
    assert shedding.fallback("low", 512) is None
