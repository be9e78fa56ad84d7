"""The compiled kernel of causal attention, with and without shared beginnings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ways import TESTED, use

from echelon.models.causal_attention import CausalAttention, KeysAndValues
from echelon.models.prefixes import lay_out

pytestmark = pytest.mark.device


def exact_causal(query, own, beginnings, layout):
    """Attention in float64 of each pair's rows: a list of [rows, heads, size]."""
    group = query.shape[1] // own.keys.shape[1]
    mixed = []
    for run in layout.runs:
        for pair in range(run.count):
            rows = slice(run.row + pair * run.length, run.row + (pair + 1) * run.length)
            tokens = own[rows] if run.prefix is None else beginnings[run.prefix].then(own[rows])
            keys, values = (
                part.double().repeat_interleave(group, 1).transpose(0, 1)
                for part in (tokens.keys, tokens.values)
            )
            mine = query[rows].double().transpose(0, 1)
            scores = mine @ keys.transpose(1, 2) * query.shape[2] ** -0.5
            later = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            mixed.append((weights @ values).transpose(0, 1))
    return mixed


def causal_step(lengths, prefixes, size, group, seed):
    """A step of pairs that begin with one of some prefixes, the first of them partly cached."""
    torch.manual_seed(seed)
    texts = []
    for place, length in enumerate(lengths):
        begin = prefixes[place % len(prefixes)]
        ids = np.arange(begin) + 1000 * begin, 500 + place + np.arange(length)
        texts.append(np.concatenate(ids).astype(np.int32))
    begun = min(20, prefixes[0])
    known = [begun * (place % len(prefixes) == 0) for place in range(len(texts))]
    layout = lay_out(texts, known)
    rows = len(layout.ids)
    parts = torch.randn(rows, 2 * group + 4, size).bfloat16()
    own = KeysAndValues(parts[:, 2 * group : 2 * group + 2].contiguous(), parts[:, 2 * group + 2 :])
    cached = [
        KeysAndValues(*torch.randn(2, prefix.known, 2, size).bfloat16()) if prefix.known else None
        for prefix in layout.prefixes
    ]
    attention = CausalAttention(layout, (2 * group, 2), torch.device("cpu"), torch.bfloat16)
    return attention, layout, parts[:, : 2 * group].contiguous(), own, cached


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize(("size", "group"), [(128, 2), (64, 1), (64, 7)])
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    prefixes=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_causal_attention_of_pairs_that_begin_alike(name, size, group, lengths, prefixes, seed):
    attention, layout, query, own, cached = causal_step(lengths, prefixes, size, group, seed)
    beginnings = attention.beginnings(own, cached)
    pairs = exact_causal(query, own, beginnings, layout)
    exact = torch.cat(pairs).flatten(1)
    lasts = torch.cat([pair[-1:] for pair in pairs]).flatten(1)
    with use(name):
        mixed = attention.attend(query, own, beginnings)
        last = attention.attend_last(query[layout.lasts], own, beginnings)
    first, end = layout.runs[0].row, layout.lasts[-1] + 1
    assert (mixed[first:end] - exact).abs().max() <= 0.03
    assert (last - lasts).abs().max() <= 0.03
    assert torch.equal(last, mixed[layout.lasts])
    assert (mixed[end:] == 0).all()  # filler
    with use(None):
        by_torch = attention.attend(query, own, beginnings)
    assert (mixed - by_torch).abs().max() <= 0.05  # the prefixes' own rows too


@pytest.mark.parametrize("name", TESTED)
def test_a_pair_attends_alike_alone_and_behind_a_shared_beginning(name):
    attention, layout, query, own, cached = causal_step([30, 41, 7], [64], 128, 2, 1)
    beginnings = attention.beginnings(own, cached)
    with use(name):
        shared = attention.attend(query, own, beginnings)
    run = layout.runs[-1]
    whole = beginnings[0].then(own[run.rows])
    alone = lay_out([np.arange(len(whole.keys), dtype=np.int32)], [0])
    single = CausalAttention(alone, (4, 2), torch.device("cpu"), torch.bfloat16)
    filled = torch.zeros(len(whole.keys), 4, 128).bfloat16()
    filled[-run.length :] = query[run.rows]
    with use(name):
        lonely = single.attend(filled, whole, [])
    assert torch.equal(lonely[-run.length :], shared[run.rows])
