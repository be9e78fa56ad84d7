"""Blocks of integers that are steps on a card, and the sizes that are captured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_batch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from echelon.models.cuda_steps import (
    FINE_TOKENS,
    LEAST_TOKENS,
    MOST_TOKENS,
    CaptureShape,
    Card,
    Ladder,
    fill,
    host_bound_tokens,
    read,
)

LENGTHS = st.lists(st.integers(4, 90), min_size=1, max_size=40)
LADDER = Ladder(4096, 8192)
XLM_R_LARGE, MINILM = 4 * 24 * 1024 * (2 * 1024 + 4096), 4 * 6 * 384 * (2 * 384 + 1536)


@given(st.lists(st.integers(4, 600), min_size=1, max_size=60))
def test_a_shape_holds_the_step_and_wastes_little(lengths):
    exact = CaptureShape.of(random_batch(lengths, 100, 0))
    shape = LADDER.find(exact)
    assume(shape is not None)
    assert shape.holds(exact)
    assert shape.tokens - exact.tokens < max(FINE_TOKENS, exact.tokens / 8)
    assert shape in LADDER.shapes()


@pytest.mark.parametrize(
    "lengths", [[40] * 50, [150] * 10, [500, 20, 20, 30, 400], [12] * 100, [3500], [5], [4] * 16]
)
def test_usual_steps_have_a_shape(lengths):
    exact = CaptureShape.of(random_batch(lengths, 100, 0))
    shape = LADDER.find(exact)
    assert shape.attention_blocks <= 16 * max(16, exact.attention_blocks)


def test_shapes_are_few_and_the_largest_is_first():
    shapes = Ladder(2048, 512).shapes()
    assert len(shapes) == len(set(shapes)) < 80
    assert max(shape.tokens for shape in shapes) == 2048 == shapes[0].tokens
    assert [s.tokens for s in shapes] == sorted((s.tokens for s in shapes), reverse=True)
    assert max(shape.longest for shape in shapes) == 512
    assert len(Ladder(MOST_TOKENS, 512).shapes()) < 160
    assert Ladder(2048, 512).find(CaptureShape(2049, 1, 1)) is None
    assert Ladder(2048, 512).find(CaptureShape(2000, 600, 4)) is None


@pytest.mark.parametrize(
    ("card", "flops", "launches", "least", "most"),
    [
        (Card(9, 132), XLM_R_LARGE, 204, 1_000, 2_500),
        (Card(9, 132), MINILM, 60, 10_000, 16_000),
        (Card(8, 58), MINILM, 60, 1_000, 3_000),  # L4
        (Card(7, 40), XLM_R_LARGE, 204, LEAST_TOKENS, LEAST_TOKENS),  # T4
        (Card(10, 148), MINILM, 60, MOST_TOKENS, MOST_TOKENS),
    ],
)
def test_sizes_end_where_the_card_is_slower_than_the_host(card, flops, launches, least, most):
    assert least <= host_bound_tokens(card, flops, launches, half=True) <= most


@pytest.mark.parametrize("major", range(5, 14))
def test_every_card_has_a_speed(major):
    half, whole = (Card(major, 100).token_s(1e9, half=half) for half in (True, False))
    assert 0 < half < whole


@pytest.mark.parametrize("segments", [False, True])
@given(lengths=LENGTHS)
@settings(max_examples=30)
def test_what_is_read_is_what_was_filled_in(lengths, segments):
    batch = random_batch(lengths, 100, 1, types=True)
    positions = np.arange(len(batch.ids), dtype=np.int32)
    shape = LADDER.find(CaptureShape.of(batch))
    assert shape is not None
    block = torch.full((shape.size(segments=segments),), -1, dtype=torch.int32)
    fill(block.numpy(), shape, batch, positions, segments=segments)
    inputs = read(block, shape, segments=segments)
    tokens, pairs = len(batch.ids), len(batch)
    assert inputs.ids.tolist() == [*batch.ids, *[0] * (shape.tokens - tokens)]
    assert inputs.positions.tolist() == [*positions, *[0] * (shape.tokens - tokens)]
    assert inputs.offsets.tolist() == [*batch.offsets, *[tokens] * (shape.pairs - pairs)]
    assert inputs.firsts.tolist() == [*batch.offsets[:-1], *[0] * (shape.pairs - pairs)]
    assert inputs.singles.tolist() == list(range(shape.pairs + 1))
    assert (inputs.segments is None) != segments
    if segments:
        assert inputs.segments[:tokens].tolist() == batch.type_ids.tolist()
        assert inputs.segments[tokens:].eq(0).all()
    assert all(part.is_contiguous() for part in (inputs.offsets, inputs.singles))
