"""The score cache of Reranker and AsyncReranker."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import SENTENCES, PatientScorer, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echelon import AsyncReranker, InvalidInput, Reranker
from echelon.engine.engine import Engine, StepLimits

QUERY = "rain at the kitchen window"
DOCUMENTS = [*SENTENCES, words(60), "rain"]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
OPTIONS = {"device": "cpu", "precision": "fp32", "threads": 1, "score_cache": "1MB"}


@pytest.fixture
def reranker(bert):
    with Reranker(bert, **OPTIONS) as opened:
        yield opened


def faked(bert, scorer, reopen=None, **options):
    """A reranker whose scorer is a fake one."""
    opened = Reranker(bert, **OPTIONS | options)
    opened._engine.close()
    opened._engine = Engine(scorer, StepLimits(2048, allow=opened.options.allow), reopen=reopen)
    return opened


def test_a_second_call_computes_nothing_and_says_so(reranker):
    first, again = reranker.score_pairs(PAIRS), reranker.score_pairs(PAIRS)
    assert again.logits.tobytes() == first.logits.tobytes()
    assert again.truncated_tokens.tolist() == first.truncated_tokens.tolist()
    assert (first.report.cached, again.report.cached) == (0, len(PAIRS))
    assert (again.report.pairs, again.report.scored, again.report.steps) == (len(PAIRS), 0, 0)
    assert reranker.rank(QUERY, DOCUMENTS).results == reranker.rank(QUERY, DOCUMENTS).results


def test_without_the_option_nothing_is_kept(bert):
    with Reranker(bert, **OPTIONS | {"score_cache": None}) as opened:
        for _ in range(2):
            report = opened.score_pairs(PAIRS).report
            assert (report.cached, report.scored) == (0, len(PAIRS))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(range(12)), max_size=10), max_size=8))
def test_hits_misses_and_repeated_pairs_come_in_the_order_of_the_call(bert, calls):
    opened = faked(bert, PatientScorer(None), score_cache=6 * 512)
    expected = faked(bert, PatientScorer(None), score_cache=0)
    for numbers in calls:
        pairs = [PAIRS[number] for number in numbers]
        found, plain = opened.score_pairs(pairs), expected.score_pairs(pairs)
        assert found.logits.tobytes() == plain.logits.tobytes()
        assert found.truncated_tokens.tolist() == plain.truncated_tokens.tolist()
        assert found.report.scored + found.report.cached == plain.report.scored


@pytest.mark.parametrize(
    "changed",
    [{"max_length": 40}, {"truncation": "only_second"}, {"max_query_tokens": 2}],
    ids=lambda changed: next(iter(changed)),
)
def test_another_option_for_a_call_is_another_score(reranker, changed):
    reranker.score_pairs(PAIRS)
    computed = reranker.score_pairs(PAIRS, **changed)
    assert computed.report.cached == 0
    again = reranker.score_pairs(PAIRS, **changed)
    assert again.report.cached == len(PAIRS)
    assert again.logits.tobytes() == computed.logits.tobytes()


def test_scores_in_a_lower_precision_are_others_and_mixed_ones_are_not_kept(bert):
    opened = faked(
        bert,
        PatientScorer(40),
        lambda precision: PatientScorer(None, precision=precision),
        allow="precision",
    )
    short, long = [("rain", "rain")], [(QUERY, words(60))]
    assert [opened.score_pairs(short).report.cached for _ in range(2)] == [0, 1]
    lowered = opened.score_pairs([*short, *long])
    assert lowered.report.ladder[-1].rung == "lower_precision"
    assert opened.facts.precision == "bf16"
    both = [opened.score_pairs([*short, *long]).report.cached for _ in range(2)]
    assert both == [0, 2]


def test_scores_of_shortened_pairs_are_not_kept(bert):
    opened = faked(bert, PatientScorer(70), allow="max_length")
    for _ in range(2):
        found = opened.score_pairs([(QUERY, words(90))])
        assert found.report.ladder[-1].rung == "shorten"
        assert found.report.cached == 0


def test_a_closed_reranker_answers_nothing_from_its_cache(reranker):
    reranker.score_pairs(PAIRS)
    reranker.close()
    with pytest.raises(InvalidInput, match="closed"):
        reranker.score_pairs(PAIRS)


def test_threads_share_it(reranker):
    expected = reranker.score_pairs(PAIRS).logits

    def call(seed):
        chosen = np.random.default_rng(seed).permutation(len(PAIRS))[:6]
        return chosen, reranker.score_pairs([PAIRS[i] for i in chosen]).logits

    with ThreadPoolExecutor(4) as threads:
        for chosen, logits in threads.map(call, range(20)):
            assert logits.tobytes() == expected[chosen].tobytes()


def test_concurrent_calls_share_it(bert):
    async def main():
        async with AsyncReranker(bert, **OPTIONS) as shared:
            first = await shared.score_pairs(PAIRS)
            again = await asyncio.gather(*(shared.score_pairs(PAIRS[i:]) for i in range(4)))
            for start, found in enumerate(again):
                assert found.logits.tobytes() == first.logits[start:].tobytes()
                assert found.report.cached == len(PAIRS) - start
                assert found.report.steps == 0

    asyncio.run(main())


def test_scores_of_a_call_during_which_another_reopened_the_model_are_not_kept(bert):
    opened = faked(bert, PatientScorer(None), lambda precision: PatientScorer(None))
    score = opened._engine._scorer.score

    def score_and_reopen(batch):
        logits = score(batch)
        opened._engine._switch("fp32")  # as another thread would, in the middle of the call
        return logits

    opened._engine._scorer.score = score_and_reopen
    assert [opened.score_pairs(PAIRS).report.cached for _ in range(3)] == [0, 0, len(PAIRS)]
