"""Steps begun before the logits of the last one are asked for, on cards whose work is deferred."""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import shim_card
import torch
from helpers import random_batch, reference_logits, vocabulary_of

from echelon import Reranker
from echelon.models import base
from echelon.models.base import DeviceOutOfMemory
from echelon.models.cuda_scorer import CardStep, CudaScorer
from echelon.models.registry import open_scorer

MIXES = ([5, 9, 30], [20] * 9, [12, 3], [60] * 5, [40], [7, 7, 31])
"""Most are replayed, and one is too large for that."""

ALIKE = (0, 5)  # these are replayed from one graph


@pytest.fixture
def opened(toy):
    """A scorer on a card that works only when somebody waits, its steps, and their logits."""
    folder = toy("bert")
    batches = [
        random_batch(lengths, vocabulary_of(folder), seed, types=True)
        for seed, lengths in enumerate(MIXES)
    ]
    expected = [reference_logits(folder, batch) for batch in batches]
    with shim_card.cards(deferred=True):
        yield open_scorer(folder, device="cuda", precision="fp32"), batches, expected


def worst(steps, expected):
    """Largest error of all logits."""
    errors = [np.abs(step.result() - logits) for step, logits in zip(steps, expected, strict=True)]
    return max(error.max() for error in errors)


def test_steps_that_run_ahead_keep_their_logits(opened):
    scorer, batches, expected = opened
    assert worst([base.start(scorer, batch) for batch in batches], expected) <= 1e-4


def test_a_step_is_not_waited_for_before_its_logits_are_asked_for(opened):
    scorer, batches, expected = opened
    steps = [scorer.start(batch) for batch in batches[:2]]
    assert not any(step.ready() for step in steps)
    np.testing.assert_allclose(steps[0].result(), expected[0], rtol=0, atol=1e-4)
    assert [step.ready() for step in steps] == [True, False]
    np.testing.assert_allclose(steps[1].result(), expected[1], rtol=0, atol=1e-4)


def test_logits_survive_the_steps_after(opened):
    scorer, batches, expected = opened
    first = scorer.score(batches[0])
    for batch in batches:
        scorer.score(batch)
    np.testing.assert_allclose(first, expected[0], rtol=0, atol=1e-4)


def test_a_staging_buffer_that_is_written_again_is_noticed(opened):
    """What the deferred stream is for: this is how a race would look."""
    scorer, batches, expected = opened
    shared = torch.empty(4096, dtype=torch.int32, pin_memory=True)

    def staged(self, batch, shape):
        block = CudaScorer._staged(self, batch, shape)
        return shared[: len(block)].copy_(block)

    scorer._staged = MethodType(staged, scorer)
    assert worst([scorer.start(batches[i]) for i in ALIKE], [expected[i] for i in ALIKE]) > 1e-3


def test_logits_that_stay_where_the_next_step_writes_are_noticed(opened, monkeypatch):
    scorer, batches, expected = opened

    def later(self, logits):
        self._place, self._copied = logits, None

    monkeypatch.setattr(CardStep, "__init__", later)
    monkeypatch.setattr(CardStep, "_wait", lambda self: self._place.cpu().numpy())
    assert worst([scorer.start(batches[i]) for i in ALIKE], [expected[i] for i in ALIKE]) > 1e-3


def test_the_engine_begins_a_step_while_the_one_before_it_runs(toy, monkeypatch):
    """All of a call's steps, in their order, never more than two of them at once."""
    log = []
    for name in ("start", "result"):
        owner = CudaScorer if name == "start" else CardStep
        kept = getattr(owner, name)
        monkeypatch.setattr(owner, name, logged(log, name, kept))
    pairs = [("where is it", word * 20) for word in ("here ", "there ", "nowhere ", "far ")]
    with Reranker(toy("bert"), device="cpu", precision="fp32", threads=1) as exact:
        expected = exact.score_pairs(pairs).logits
    with (
        shim_card.cards(deferred=True),
        Reranker(toy("bert"), device="cuda", precision="fp32") as reranker,
    ):
        found = reranker.score_pairs(pairs, token_budget=16).logits
    assert log == ["start", *["start", "result"] * 3, "result"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def logged(log, name, kept):
    """A method that writes down its calls."""

    def call(*arguments):
        log.append(name)
        return kept(*arguments)

    return call


def test_a_step_without_memory_says_so_and_the_one_before_it_ends_well(opened):
    scorer, batches, expected = opened
    running = scorer.start(batches[0])
    scorer._step = lambda batch: torch.empty(1 << 45, device="cuda")
    with pytest.raises(DeviceOutOfMemory):
        scorer.start(batches[1])
    np.testing.assert_allclose(running.result(), expected[0], rtol=0, atol=1e-4)
