"""The search for the highest rate: what it finds holds, in few probes, also with noise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import InvalidInput
from echelon.simulation.rate_search import LOADS, RateSearch, RisingLoad, highest

limits = st.floats(0.001, 100_000)
begins = st.floats(0.05, 10_000)
max_rates = st.just(math.inf) | st.floats(10_000, 50_000)
precisions = st.floats(0.01, 0.5)


def probes_of(search, limit):
    """All rates that were tried."""
    tried = []
    highest(lambda rate: tried.append(rate) or rate <= limit, search)
    return tried


@given(limits, begins, max_rates, precisions)
def test_the_rate_that_is_found_holds_and_little_more_does(limit, begin, max_rate, precision):
    search = RateSearch(begin, max_rate, precision=precision)
    found = highest(lambda rate: rate <= limit, search)
    if limit < search.min_rate:
        assert found == 0.0
    else:
        assert found <= min(limit, max_rate)
        assert found * (1 + precision) >= min(limit, max_rate) * (1 - 1e-9)


@given(limits, begins, max_rates, precisions)
def test_every_probe_tells_something_new(limit, begin, max_rate, precision):
    search = RateSearch(begin, max_rate, precision=precision)
    low, high = 0.0, math.inf
    while not search.over:
        assert low < search.rate < high
        assert search.min_rate <= search.rate <= max_rate
        held = search.rate <= limit
        low, high = (search.rate, high) if held else (low, search.rate)
        search.tell(held=held)
        assert (search.held, search.broke) == (low, high)


@given(limits, begins, precisions)
def test_few_probes_are_enough(limit, begin, precision):
    tried = probes_of(RateSearch(begin, precision=precision), limit)
    doublings = abs(math.log2(max(limit, 0.05) / begin)) + 2
    halvings = math.log2(math.log(2) / math.log1p(precision)) + 1
    assert len(tried) <= doublings + max(0, halvings)


@given(st.data(), begins, precisions)
def test_with_noise_it_ends_between_a_rate_that_held_and_one_that_broke(data, begin, precision):
    search, verdicts = RateSearch(begin, 1e6, precision=precision), {}
    while not search.over:
        rate = search.rate
        verdicts[rate] = data.draw(st.booleans())
        search.tell(held=verdicts[rate])
    assert search.held == 0.0 or verdicts[search.held]
    assert math.isinf(search.broke) or not verdicts[search.broke]
    assert search.held < search.broke
    assert len(verdicts) < 200


@given(st.integers(0, 20_000), st.integers(1, 100), st.integers(100, 2**14))
def test_whole_numbers_are_found_exactly(limit, begin, max_rate):
    search = RateSearch(begin, max_rate, min_rate=1, precision=1e-9, whole=True)
    tried = probes_of(search, limit)
    assert search.held == min(limit, max_rate)
    assert all(rate == int(rate) for rate in tried)
    assert len(tried) == len(set(tried))


@given(st.lists(st.floats(0.01, 100), min_size=1, unique=True), limits)
def test_steps_are_tried_from_below_up_to_the_first_that_breaks(steps, limit):
    steps = sorted(steps)
    search = RateSearch.of_steps(steps)
    tried = probes_of(search, limit)
    held = [step for step in steps if step <= limit]
    assert tried == steps[: len(held) + 1]
    assert search.held == (held[-1] if held else 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RateSearch(0.0),
        lambda: RateSearch(math.nan),
        lambda: RateSearch(5.0, 4.0),
        lambda: RateSearch(0.1, min_rate=1.0),
        lambda: RateSearch(1.0, precision=0.0),
        lambda: RateSearch(1.0, min_rate=0.0),
    ],
)
def test_a_search_that_cannot_be_is_refused(make):
    with pytest.raises(InvalidInput):
        make()


@given(st.lists(st.booleans(), min_size=len(LOADS), max_size=len(LOADS)), st.floats(0.001, 1.2))
def test_a_load_holds_only_if_all_loads_below_hold(verdicts, load):
    asked = []

    def run(at):
        asked.append(at)
        return SimpleNamespace(held=verdicts[LOADS.index(at)])

    rising = RisingLoad(run)
    found = rising.at(load)
    good = next((i for i, held in enumerate(verdicts) if not held), len(verdicts))
    max_load = LOADS[good - 1] if good else 0.0
    assert (found is not None) == (load <= max_load)
    assert found is None or found.held
    assert rising.max_load == max_load
    assert rising.calm.held == verdicts[0]
    assert len(asked) == len(set(asked)) <= good + 1
