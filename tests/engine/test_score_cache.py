"""The score cache: its keys, its bound, and what leaves it first."""

from __future__ import annotations

import gc
import tracemalloc
from collections import OrderedDict
from dataclasses import fields, replace
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from echelon.engine.admission_pipeline import score_settings
from echelon.engine.events import ServiceSettings
from echelon.engine.score_cache import ENTRY_BYTES, DocumentScores, ScoreCache, ScoreSettings
from echelon.types import Chunking, RerankRequest

SETTINGS = ScoreSettings("fp32", 512, "longest_first", None, None)
ROOM = 5


def scores_of(rows):
    logits, truncated, tokens = zip(*rows, strict=True)
    return DocumentScores(
        np.array(logits, dtype=np.float32), np.array(truncated, dtype=np.int32), np.array(tokens)
    )


def filled(pairs, first=0.0, room=100):
    """A cache that has a score of each pair."""
    cache = ScoreCache(room * ENTRY_BYTES)
    found = cache.find(pairs, SETTINGS)
    cache.keep(found.keys, scores_of([(first + i, i % 2, 9) for i in range(len(pairs))]))
    return cache


class LeastRecentlyUsed(RuleBasedStateMachine):
    """The cache against a dictionary in the order of use."""

    pairs = st.lists(st.integers(0, 9), min_size=1, max_size=2 * ROOM)

    def __init__(self):
        super().__init__()
        self.cache = ScoreCache(ROOM * ENTRY_BYTES + ENTRY_BYTES // 2)
        self.model = OrderedDict()

    @rule(numbers=pairs)
    def look_up(self, numbers):
        found = self.cache.find([("q", str(number)) for number in numbers], SETTINGS)
        for index, number in enumerate(numbers):
            if number in self.model:
                self.model.move_to_end(number)
                logit, lost, tokens = (part[index] for part in found.scores)
                assert (logit, lost, tokens) == self.model[number]
        missing = [i for i, number in enumerate(numbers) if number not in self.model]
        assert found.missing.tolist() == missing
        assert found.hits == len(numbers) - len(missing)

    @rule(numbers=pairs, logits=st.data())
    def keep(self, numbers, logits):
        anything = st.tuples(st.floats(width=32, allow_nan=False), *[st.integers(0, 2**31 - 1)] * 2)
        rows = [logits.draw(anything) for _ in numbers]
        keys = self.cache.find([("q", str(number)) for number in numbers], SETTINGS).keys
        for number in numbers:  # looking up is a use, too
            if number in self.model:
                self.model.move_to_end(number)
        self.cache.keep(keys, scores_of(rows))
        for number, row in zip(numbers, rows, strict=True):
            self.model[number] = row
            self.model.move_to_end(number)
            while len(self.model) > ROOM:
                self.model.popitem(last=False)

    @invariant()
    def is_bounded(self):
        usage = self.cache.usage
        assert usage.entries == len(self.model)
        assert usage.bytes == usage.entries * ENTRY_BYTES <= usage.max_bytes


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase


@pytest.mark.parametrize("entries", [2000, 22_000, 44_000])
def test_a_score_takes_no_more_memory_than_is_counted(entries):
    cache = ScoreCache(entries * ENTRY_BYTES)
    gc.collect()
    tracemalloc.start()
    try:
        for begin in range(0, int(1.5 * entries), 1000):
            found = cache.find([("q", str(begin + i)) for i in range(1000)], SETTINGS)
            cache.keep(found.keys, scores_of([(begin + i, i + 300, 400) for i in range(1000)]))
            del found
            assert tracemalloc.get_traced_memory()[0] <= cache.usage.max_bytes
    finally:
        tracemalloc.stop()
    assert cache.usage.entries == entries


@given(st.lists(st.tuples(st.text(), st.text()), max_size=8, unique=True))
def test_other_texts_have_other_keys(pairs):
    keys = ScoreCache(ENTRY_BYTES).find(pairs, SETTINGS).keys
    assert len(set(keys)) == len(pairs)
    assert {len(key) for key in keys} <= {16}


def test_the_border_of_query_and_document_counts():
    cache = filled([("ab", "c"), ("", "1 x")])
    assert cache.find([("a", "bc"), ("abc", ""), ("1 x", ""), ("1", " x")], SETTINGS).hits == 0


OTHER = ScoreSettings(
    precision="bf16",
    max_length=511,
    truncation="only_second",
    max_query_tokens=7,
    instruction="Judge.",
    chunking=Chunking(max_chunks=1),
    side="left",
)


@pytest.mark.parametrize("name", [field.name for field in fields(ScoreSettings)])
def test_every_setting_is_in_the_key(name):
    pairs = [("q", "d")]
    cache = filled(pairs)
    assert cache.find(pairs, replace(SETTINGS)).hits == 1
    assert cache.find(pairs, replace(SETTINGS, **{name: getattr(OTHER, name)})).hits == 0


NO_INFLUENCE = {"pairs", "deadline", "priority", "refuse_truncation", "fresh"}
"""Fields of a request that change no score."""


def test_every_field_of_a_request_that_changes_a_score_is_in_its_settings():
    """A new field of requests belongs to one of the two."""
    names = {field.name for field in fields(RerankRequest)} - NO_INFLUENCE
    asked = {name: getattr(OTHER, name) for name in names if name != "max_length"}
    usual = score_settings(RerankRequest([]), ServiceSettings(), 512, "fp32")
    assert usual == SETTINGS
    for name, value in asked.items():
        request = RerankRequest([], **{name: value})
        found = score_settings(request, ServiceSettings(), 512, "fp32")
        assert found == replace(SETTINGS, **{name: value})


def test_what_the_service_sets_is_in_the_settings_of_its_requests():
    service = ServiceSettings(truncation="only_second", max_query_tokens=3)
    found = score_settings(RerankRequest([]), service, 512, "fp32")
    assert found == replace(SETTINGS, truncation="only_second", max_query_tokens=3)


def test_scores_of_other_files_of_the_model_are_not_found_once_it_is_reopened():
    revisions, pairs = iter("aab"), [("q", "d")]
    cache = ScoreCache(10 * ENTRY_BYTES, lambda: next(revisions))
    cache.keep(cache.find(pairs, SETTINGS).keys, scores_of([(1.0, 0, 1)]))
    cache.reopened()
    assert cache.find(pairs, SETTINGS).hits == 1
    cache.reopened()
    assert cache.find(pairs, SETTINGS).hits == 0


def test_two_caches_hash_with_different_secrets():
    pairs = [("q", "d")]
    first, second = ScoreCache(ENTRY_BYTES), ScoreCache(ENTRY_BYTES)
    assert first.find(pairs, SETTINGS).keys != second.find(pairs, SETTINGS).keys


def test_scores_are_completed_in_the_callers_order():
    cache = filled([("q", "b"), ("q", "d")], first=5.0)
    found = cache.find([("q", letter) for letter in "abcd"], SETTINGS)
    whole = found.completed(scores_of([(1.0, 7, 70), (2.0, 8, 80)]))
    assert whole.logits.tolist() == [1.0, 5.0, 2.0, 6.0]
    assert whole.truncated_tokens.tolist() == [7, 0, 8, 1]
    assert whole.tokens.tolist() == [70, 9, 80, 9]
    assert np.isnan(found.scores.logits[0])  # what was found stays as it was


def test_pairs_that_lost_tokens_can_be_left_out():
    pairs = [("q", "a"), ("q", "b")]
    cache = filled(pairs)  # the second one lost a token
    assert cache.find(pairs, SETTINGS, whole=True).missing.tolist() == [1]


@settings(max_examples=20)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_a_score_comes_back_to_the_bit(logits):
    cache = ScoreCache(100 * ENTRY_BYTES)
    pairs = [("q", str(i)) for i in range(len(logits))]
    kept = scores_of([(logit, 0, 1) for logit in logits])
    cache.keep(cache.find(pairs, SETTINGS).keys, kept)
    assert cache.find(pairs, SETTINGS).scores.logits.tobytes() == kept.logits.tobytes()


def test_many_threads_use_it_at_once():
    cache, wrong = ScoreCache(50 * ENTRY_BYTES), []

    def use(seed):
        for turn in range(60):
            numbers = [(seed * 7 + turn * 3 + i) % 120 for i in range(20)]
            found = cache.find([("q", str(number)) for number in numbers], SETTINGS)
            known = set(range(20)) - set(found.missing.tolist())
            wrong.extend(i for i in known if found.scores.logits[i] != numbers[i])
            cache.keep(found.keys, scores_of([(number, 0, 1) for number in numbers]))

    threads = [Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.usage.entries == 50
