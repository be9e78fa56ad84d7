"""The engine with a scorer that has no weights but can run out of memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import PatientScorer, pairs_of
from hypothesis import given
from hypothesis import strategies as st
from services import encoded, texts

from echelon.engine.engine import Engine, NonFiniteScore, StepLimits
from echelon.errors import InvalidInput, OutOfMemory
from echelon.models.base import DeviceOutOfMemory, FakeScorer
from echelon.scheduling.packing import NO_BUDGET, step_cost
from echelon.tokenization.pairs import encode_pairs

lengths = st.lists(st.integers(5, 300), max_size=30)
costs = st.sampled_from(["none", "rectangular"])


def expected(pairs) -> np.ndarray:
    """What the scorer says of each pair alone."""
    scorer = PatientScorer()
    return np.array([scorer.score(pairs.batch([i]))[0] for i in range(len(pairs))], np.float32)


def scored_pairs(scorer: PatientScorer) -> list[bytes]:
    """Ids of every pair of every step that succeeded."""
    return [
        batch.ids[start:end].tobytes()
        for batch in scorer.batches
        for start, end in pairwise(batch.offsets)
    ]


@given(
    lengths,
    st.integers(1, 2000),
    st.none() | st.integers(1, 5),
    costs,
    st.none() | st.integers(300, 2000),
    st.integers(0, 500),
)
def test_every_pair_once_in_order_whatever_memory_does(
    lengths, budget, max_pairs, cost, memory, stale
):
    scorer = PatientScorer(memory, stale_tokens=stale, padding=cost)
    pairs = pairs_of(lengths)
    finished: list[int] = []
    outcome = Engine(scorer, StepLimits(budget, max_pairs)).run(pairs, scored=finished.append)
    assert outcome.logits.tolist() == expected(pairs).tolist()
    done = scored_pairs(scorer)
    assert sorted(done) == sorted(pairs.batch([i]).ids.tobytes() for i in range(len(pairs)))
    assert sum(finished) == len(lengths)
    assert all(finished)
    report = outcome.report
    assert (report.pairs, report.scored) == (len(lengths), len(lengths))
    assert report.tokens == sum(lengths)
    assert report.steps == len(scorer.batches) == len(finished)
    assert report.cost_tokens == sum(step_cost(batch.lengths, cost) for batch in scorer.batches)
    assert 0 <= report.padding_share < 1
    for batch in scorer.batches:
        cost_tokens = step_cost(batch.lengths, cost)
        assert cost_tokens <= budget or len(batch) == 1
        assert memory is None or cost_tokens <= memory
        assert max_pairs is None or len(batch) <= max_pairs


def test_no_pairs_are_no_steps():
    scorer = PatientScorer()
    outcome = Engine(scorer, StepLimits(100)).run(pairs_of([]))
    assert outcome.logits.shape == outcome.truncated_tokens.shape == (0,)
    assert outcome.logits.dtype == np.float32
    assert scorer.batches == []


def test_finished_pairs_are_not_started_again():
    scorer = PatientScorer(100)
    run = Engine(scorer, StepLimits(120)).run(pairs_of([60, 60, 50, 50, 40]))
    # 120 fails twice, 60 is left: from then on one pair of at most 60 tokens a step.
    assert [batch.lengths.tolist() for batch in scorer.batches] == [[60], [60], [50], [50], [40]]
    assert [step.rung for step in run.report.ladder] == ["drop_caches", "one_pair"]


def test_memory_that_shrinks_midway_costs_no_finished_pair():
    class Shrinking(PatientScorer):
        def score(self, batch):
            logits = super().score(batch)
            self._memory_tokens = 50
            return logits

    scorer = Shrinking(100)
    pairs = pairs_of([30] * 9)
    outcome = Engine(scorer, StepLimits(90)).run(pairs)
    assert [len(batch) for batch in scorer.batches] == [3, 1, 1, 1, 1, 1, 1]
    assert outcome.logits.tolist() == expected(pairs).tolist()
    assert [step.rung for step in outcome.report.ladder] == [
        "drop_caches",
        "halve_budget",
    ]


def test_the_budget_is_learned_and_kept():
    learned: list[int] = []
    scorer = PatientScorer(100)
    engine = Engine(scorer, StepLimits(400), learned=learned.append)
    assert engine.budget == 400
    first = engine.run(pairs_of([20] * 40))
    assert [step.rung for step in first.report.ladder] == [
        "drop_caches",
        "halve_budget",
        "halve_budget",
    ]
    assert learned == [200, 100]
    assert engine.budget == 100
    second = engine.run(pairs_of([20] * 40), limits=StepLimits(4000))
    assert second.report.ladder == ()
    assert {len(batch) for batch in scorer.batches} == {5}


def test_limits_of_one_call_may_exceed_the_engines_own():
    scorer = PatientScorer()
    engine = Engine(scorer, StepLimits(40))
    engine.run(pairs_of([20] * 6), limits=StepLimits(NO_BUDGET, max_pairs=3))
    engine.run(pairs_of([20] * 6))
    assert [len(batch) for batch in scorer.batches] == [3, 3, 2, 2, 2]
    assert engine.budget == 40


def test_stale_caches_are_dropped_before_anything_shrinks():
    scorer = PatientScorer(100, stale_tokens=60)
    engine = Engine(scorer, StepLimits(100))
    outcome = engine.run(pairs_of([50, 50]))
    assert [step.rung for step in outcome.report.ladder] == ["drop_caches"]
    assert engine.budget == 100
    assert outcome.report.steps == 1


def test_caches_are_dropped_anew_after_a_success():
    class Refilling(PatientScorer):
        def score(self, batch):
            logits = super().score(batch)
            self._stale_tokens = 60
            return logits

    outcome = Engine(Refilling(100), StepLimits(100)).run(pairs_of([50] * 6))
    assert [step.rung for step in outcome.report.ladder] == ["drop_caches"] * 2
    assert outcome.report.steps == 3


def test_lower_precision_where_allowed():
    opened: list[PatientScorer] = []

    def reopen(precision: str) -> PatientScorer:
        opened.append(PatientScorer(100, precision=precision))
        return opened[-1]

    first = PatientScorer(100)
    engine = Engine(first, StepLimits(150, allow=("precision",)), reopen=reopen)
    pairs = pairs_of([150, 90])
    outcome = engine.run(pairs)
    assert [step.rung for step in outcome.report.ladder] == ["drop_caches", "lower_precision"]
    assert outcome.report.ladder[1].detail == "precision fp32 -> bf16"
    assert first.closed
    assert engine.info.precision == "bf16"
    assert outcome.logits.tolist() == expected(pairs).tolist()
    engine.close()
    assert opened[0].closed


def test_a_model_that_cannot_be_reopened_leaves_a_closed_engine():
    def reopen(precision: str) -> PatientScorer:
        raise OutOfMemory(f"no memory for {precision}")

    engine = Engine(PatientScorer(100), StepLimits(150, allow=("precision",)), reopen=reopen)
    with pytest.raises(OutOfMemory, match="no memory for bf16"):
        engine.run(pairs_of([150]))
    with pytest.raises(InvalidInput, match="reranker: it is closed"):
        engine.run(pairs_of([20]))
    engine.close()


def test_shorter_pairs_where_allowed():
    scorer = PatientScorer(160)
    pairs = pairs_of([400, 200, 150, 20])
    outcome = Engine(scorer, StepLimits(1000, allow=("max_length",))).run(pairs)
    rungs = [step.rung for step in outcome.report.ladder]
    assert rungs == ["drop_caches", *["one_pair", "shorten"] * 2, "one_pair"]
    assert outcome.truncated_tokens.tolist() == [300, 100, 50, 0]
    assert sorted(map(len, scored_pairs(scorer))) == [80, 400, 400, 400]
    assert outcome.report.tokens == 320


def test_shortening_spares_what_is_finished():
    class Shrinking(PatientScorer):
        def score(self, batch):
            logits = super().score(batch)
            self._memory_tokens = 70
            return logits

    pairs = pairs_of([300, 130], truncation="only_second", query=90)
    engine = Engine(Shrinking(300), StepLimits(300, allow=("max_length",)))
    with pytest.raises(InvalidInput, match=r"pairs\[1\]\.query: its 90 tokens leave no room"):
        engine.run(pairs)
    pairs = pairs_of([300, 130], truncation="longest_first", query=90)
    engine = Engine(Shrinking(300), StepLimits(300, allow=("max_length",)))
    outcome = engine.run(pairs)
    assert outcome.truncated_tokens.tolist() == [0, 65]
    assert outcome.report.tokens == 300 + 65


def test_the_end_of_the_ladder_names_pair_tokens_and_remedy():
    scorer = PatientScorer(100)
    engine = Engine(scorer, StepLimits(1000))
    with pytest.raises(OutOfMemory) as caught:
        engine.run(pairs_of([20, 20, 130, 20]))
    words = str(caught.value)
    assert words.startswith(
        "out of memory: pairs[2] of 130 tokens does not fit in the memory of cpu even alone"
    )
    assert "130 tokens over 100" in words
    assert "set a smaller max_length" in words
    # Usable afterwards.
    pairs = pairs_of([20, 100])
    assert engine.run(pairs).logits.tolist() == expected(pairs).tolist()


def test_precision_is_not_offered_where_nothing_can_reopen():
    with pytest.raises(OutOfMemory):
        Engine(PatientScorer(10), StepLimits(100, allow=("precision",))).run(pairs_of([20]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_score_is_invented_for_nan(bad):
    class Broken(PatientScorer):
        def score(self, batch):
            logits = super().score(batch)
            logits[batch.lengths == 33] = bad
            return logits

    engine = Engine(Broken(), StepLimits(1000))
    with pytest.raises(NonFiniteScore, match=r"pairs\[1\]: the model gave .* in fp32"):
        engine.run(pairs_of([50, 33, 20]))
    pairs = pairs_of([50, 20])
    assert engine.run(pairs).logits.tolist() == expected(pairs).tolist()


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), ValueError("no"), KeyboardInterrupt()]
)
def test_other_errors_pass_through(error):
    class Broken(PatientScorer):
        def score(self, batch):
            raise error

    with pytest.raises(type(error)) as caught:
        Engine(Broken(), StepLimits(100)).run(pairs_of([20]))
    assert caught.value is error


def test_after_closing_the_error_is_clear():
    scorer = PatientScorer()
    engine = Engine(scorer, StepLimits(100))
    engine.close()
    engine.close()
    assert scorer.closed
    with pytest.raises(InvalidInput, match="closed"):
        engine.run(pairs_of([20]))


@given(lengths, st.integers(300, 900), st.integers(300, 900), costs)
def test_the_same_trace_gives_the_same_decisions(lengths, budget, memory, cost):
    def trace():
        scorer = PatientScorer(memory, padding=cost, stale_tokens=100)
        report = Engine(scorer, StepLimits(budget)).run(pairs_of(lengths)).report
        return [batch.ids.tolist() for batch in scorer.batches], report

    assert trace() == trace()


@given(st.lists(st.integers(5, 200), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_change_their_scores(lengths, chance):
    pairs = pairs_of(lengths)
    order = list(range(len(lengths)))
    chance.shuffle(order)
    whole = Engine(PatientScorer(250), StepLimits(1000)).run(pairs).logits
    shuffled = pairs_of(lengths)
    documents = [shuffled.documents[i] for i in order]
    other = encode_pairs(pairs.template, shuffled.queries, documents, 10_000, "longest_first")
    assert Engine(PatientScorer(250), StepLimits(1000)).run(other).logits.tolist() == [
        whole[i] for i in order
    ]


def test_steps_that_others_planned():
    scorer = PatientScorer(100)
    engine = Engine(scorer, StepLimits(150))
    pairs = pairs_of([30, 40])
    assert engine.step(pairs.batch([1])).tolist() == expected(pairs)[1:].tolist()
    engine.close()
    with pytest.raises(InvalidInput, match="it is closed"):
        engine.step(pairs.batch([0]))


class Told(FakeScorer):
    """Has memory for 100 tokens, and counts what it is told."""

    def __init__(self):
        super().__init__(100)
        self.told = []

    def memory_ran_out(self):
        self.told.append("ran out")

    def release(self):
        self.told.append("release")


def test_a_scorer_is_told_once_of_each_step_that_did_not_fit():
    scorer = Told()
    engine = Engine(scorer, StepLimits(budget=1000))
    ladder = engine.run(encoded(texts(1, 9))).report.ladder
    assert scorer.told == ["ran out"] * len(ladder)
    scorer.told.clear()
    with pytest.raises(DeviceOutOfMemory):
        engine.step(encoded(texts(1, 9)).batch(list(range(9))))
    engine.release()  # as a supervisor asks for
    assert scorer.told == ["ran out"]
