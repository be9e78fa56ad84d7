"""Pairs that begin alike: grouped, laid out as rows, and their keys and values kept."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.models.causal_attention import KeysAndValues
from echelon.models.prefix_cache import MAX_PREFIXES, PrefixCache
from echelon.models.prefixes import (
    MIN_SHARED,
    common_length,
    group_pairs,
    lay_out,
    without_padding,
)


def ids(*parts):
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


@st.composite
def steps(draw):
    """Pairs that begin with a few texts or their beginnings, and what is cached of each."""
    texts = [
        np.random.default_rng(seed).integers(0, 3, 60).astype(np.int32)
        for seed in draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    ]
    beginnings = st.tuples(st.sampled_from(texts), st.integers(0, 60)).map(lambda t: t[0][: t[1]])
    endings = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    pairs = draw(
        st.lists(st.tuples(beginnings, endings).map(lambda t: ids(*t)), min_size=1, max_size=12)
    )
    cached = draw(st.lists(beginnings, max_size=2))
    known = [max((common_length(past, pair) for past in cached), default=0) for pair in pairs]
    return pairs, known


@given(st.lists(st.integers(0, 1), max_size=8), st.lists(st.integers(0, 1), max_size=8))
def test_the_common_beginning_is_the_longest(one, other):
    length = common_length(np.array(one, np.int32), np.array(other, np.int32))
    assert one[:length] == other[:length]
    assert one[: length + 1] != other[: length + 1] or length == min(len(one), len(other))


@given(steps())
def test_each_pair_is_in_one_group_and_keeps_its_last_token(step):
    pairs, known = step
    groups = group_pairs(pairs, known)
    assert sorted(pair for group in groups for pair in group.pairs) == list(range(len(pairs)))
    for group in groups:
        first = pairs[group.pairs[0]][: group.length]
        for pair in group.pairs:
            assert len(pairs[pair]) > group.length
            assert (pairs[pair][: group.length] == first).all()
        if len(group.pairs) == 1:
            assert group.length <= known[group.pairs[0]]


@given(steps())
@settings(max_examples=200)
def test_the_rows_are_the_pairs(step):
    """From the rows of a layout each pair comes out whole, and at its place."""
    pairs, known = step
    layout = lay_out(pairs, known)
    found, positions = {}, {}
    for run in layout.runs:
        rows = np.arange(len(layout.ids))[run.rows].reshape(run.count, run.length)
        for pair, own in zip(layout.order[run.pairs].tolist(), rows, strict=True):
            before = ids([]) if run.prefix is None else layout.prefixes[run.prefix].ids
            found[pair] = ids(before, layout.ids[own])
            positions[pair] = layout.positions[own]
            assert layout.lasts[run.pairs][(rows == own).all(1)] == own[-1]
            assert (positions[pair] == np.arange(len(before), len(pairs[pair]))).all()
    assert sorted(found) == list(range(len(pairs)))
    assert all((found[pair] == pairs[pair]).all() for pair in found)
    for prefix in layout.prefixes:
        assert (layout.ids[prefix.rows] == prefix.ids[prefix.known :]).all()
        computed = np.arange(prefix.known, len(prefix.ids))
        assert (layout.positions[prefix.rows] == computed).all()


@given(steps())
def test_no_row_is_computed_twice_for_nothing(step):
    """A layout has no more rows than its pairs have tokens, and few sizes in all."""
    pairs, known = step
    layout = lay_out(pairs, known)
    own = sum(run.count * run.length for run in layout.runs)
    shared = sum(len(prefix.ids) - prefix.known for prefix in layout.prefixes)
    assert own + shared <= sum(map(len, pairs))
    assert len(layout.ids) % 16 == 0
    assert len(layout.ids) - own - shared < 16
    assert all(prefix.known == 0 or prefix.known > MIN_SHARED for prefix in layout.prefixes)


QUERIES = [ids([1] * 40, [query] * 50) for query in (5, 6)]


def test_documents_of_a_query_share_it_and_queries_do_not_mix():
    """Sharing 90 tokens within each query saves more than 40 tokens among all."""
    pairs = [ids(QUERIES[at % 2], [7, at, 8]) for at in range(10)]
    groups = group_pairs(pairs, [0] * 10)
    assert sorted(group.pairs for group in groups) == [(0, 2, 4, 6, 8), (1, 3, 5, 7, 9)]
    assert {group.length for group in groups} == {91}


def test_single_pairs_of_many_queries_share_what_is_before_the_query():
    pairs = [ids([1] * 40, [query] * 50) for query in range(4)]
    assert [(g.length, len(g.pairs)) for g in group_pairs(pairs, [0] * 4)] == [(40, 4)]


def test_a_chance_word_in_common_does_not_split_a_query():
    pairs = [ids(QUERIES[0], [9, 9, 9] if at < 2 else [at], [at, 8]) for at in range(10)]
    assert [group.length for group in group_pairs(pairs, [0] * 10)] == [90]


def test_short_beginnings_are_not_shared():
    pairs = [ids([1] * MIN_SHARED, [at]) for at in range(5)]
    assert all(group.length == 0 for group in group_pairs(pairs, [0] * 5))


def test_equal_pairs_and_a_pair_that_begins_another():
    long = ids(range(100, 150))
    assert [group.length for group in group_pairs([long, long], [0] * 2)] == [49]
    (group,) = group_pairs([long, long, long[:30]], [0] * 3)
    assert (group.length, sorted(group.pairs)) == (29, [0, 1, 2])


def test_of_a_cached_prefix_only_the_rest_is_computed():
    pairs = [ids(QUERIES[0], [at, 8, 8]) for at in range(10, 14)]
    (prefix,) = lay_out(pairs, [40] * 4).prefixes
    assert (prefix.known, prefix.rows) == (40, slice(0, 50))
    (prefix,) = lay_out(pairs, [90] * 4).prefixes
    assert (prefix.known, prefix.rows) == (90, slice(0, 0))


def test_a_single_pair_uses_what_is_cached():
    pair = ids(QUERIES[0], [7, 8])
    (prefix,) = lay_out([pair], [90]).prefixes
    assert (len(prefix.ids), prefix.known) == (90, 90)
    # Of a whole pair that is cached the last token is still its own.
    (prefix,) = lay_out([pair], [92]).prefixes
    assert len(prefix.ids) == 91


def test_few_more_tokens_than_are_cached_are_not_shared():
    pairs = [ids(QUERIES[0], [3, 3, 3], [at]) for at in range(4)]
    (prefix,) = lay_out(pairs, [90] * 4).prefixes
    assert (len(prefix.ids), prefix.known) == (90, 90)


def test_padding_at_the_end_is_not_read():
    assert without_padding(ids([3, 0, 4, 0, 0]), 0).tolist() == [3, 0, 4]
    assert without_padding(ids([3, 0, 4]), 0).tolist() == [3, 0, 4]
    assert without_padding(ids([0, 0]), 0).tolist() == [0]
    assert without_padding(ids([0, 0]), None).tolist() == [0, 0]


def layers_of(tokens, layers=2):
    """Keys and values of 64 bytes a token."""
    part = torch.zeros(tokens, 2, 2)
    return [KeysAndValues(part, part) for _ in range(layers)]


def test_the_cache_keeps_to_its_bytes_and_drops_the_least_recent():
    cache = PrefixCache(max_bytes=64 * 100)
    texts = [ids([at], [1] * 39) for at in range(3)]
    cache.keep(texts[0], layers_of(40))
    cache.keep(texts[1], layers_of(40))
    assert cache.find(texts[0]).ids[0] == 0
    cache.keep(texts[2], layers_of(40))
    assert [cache.known(text) for text in texts] == [40, 0, 40]
    assert cache.nbytes == 64 * 80
    cache.clear()
    assert (cache.nbytes, len(cache), cache.find(texts[0])) == (0, 0, None)


def test_a_longer_prefix_takes_the_place_of_its_beginning():
    cache = PrefixCache()
    cache.keep(QUERIES[0][:40], layers_of(40))
    cache.keep(QUERIES[0], layers_of(90))
    assert (len(cache), cache.nbytes) == (1, 64 * 90)
    assert cache.known(QUERIES[1]) == 40
    cache.keep(QUERIES[0], layers_of(90))
    assert (len(cache), cache.nbytes) == (1, 64 * 90)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), max_size=150))
def test_the_cache_counts_what_it_holds(prefixes):
    cache = PrefixCache(max_bytes=64 * 400)
    for seed, tokens in prefixes:
        cache.keep(ids([seed], range(1, tokens)), layers_of(tokens))
        held = cache._prefixes.values()
        assert cache.nbytes == sum(64 * len(prefix.ids) for prefix in held) <= 64 * 400
        assert len(cache) <= MAX_PREFIXES
