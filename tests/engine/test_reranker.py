"""Texts in, ranked documents out."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from helpers import SENTENCES, PatientScorer, reference_logits, words
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon import EchelonWarning, InvalidInput, OutOfMemory, Ranking, Reranker
from echelon.engine.engine import Engine, StepLimits
from echelon.reranker import sigmoid
from echelon.tokenization.tokenizer import PairEncoder
from echelon.types import RunReport

EXACT = 1e-4
QUERY = "rain at the kitchen window"
DOCUMENTS = [*SENTENCES, words(60), "rain"]


@pytest.fixture(scope="module")
def reranker(bert):
    with Reranker(bert, device="cpu", precision="fp32", threads=1) as opened:
        yield opened


@pytest.fixture
def small_memory(bert):
    """A reranker whose scorer is a fake one that holds 40 tokens."""
    opened = Reranker(bert, device="cpu", threads=1)
    scorer = PatientScorer(40, max_tokens=130)
    opened._engine = Engine(scorer, StepLimits(2048))
    return opened, scorer


def test_scores_are_the_references(reranker, bert):
    pairs = [(q, d) for q in SENTENCES[:3] for d in DOCUMENTS]
    encoded = PairEncoder(bert).encode(pairs, reranker.max_length, "longest_first")
    expected = reference_logits(bert, encoded.batch(range(len(pairs))))
    found = reranker.score_pairs(pairs)
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=EXACT)
    assert found.logits.dtype == np.float32
    assert found.truncated_tokens.tolist() == encoded.truncated_tokens.tolist()
    assert found.report.tokens == int(encoded.lengths.sum())


def test_the_limit_is_the_models_own(reranker):
    assert reranker.max_length == 130
    assert reranker.facts.max_tokens == 130


def test_rank_is_sorted_on_logits(reranker):
    ranking = reranker.rank(QUERY, DOCUMENTS)
    assert isinstance(ranking, Ranking)
    assert ranking.query == QUERY
    logits = [result.logit for result in ranking.results]
    assert logits == sorted(logits, reverse=True)
    assert sorted(result.index for result in ranking.results) == list(range(len(DOCUMENTS)))
    scored = reranker.score_pairs([(QUERY, d) for d in DOCUMENTS])
    for result in ranking.results:
        assert result.document == DOCUMENTS[result.index]
        assert result.logit == pytest.approx(scored.logits[result.index], abs=EXACT)
        assert result.score == pytest.approx(1 / (1 + np.exp(-result.logit)))
        assert result.truncated_tokens == scored.truncated_tokens[result.index]
        assert type(result.score) is type(result.logit) is float
        assert type(result.index) is type(result.truncated_tokens) is int


def test_equal_logits_keep_their_input_order(reranker):
    documents = ["rain", SENTENCES[2], "rain", SENTENCES[0], "rain"]
    order = [r.index for r in reranker.rank(QUERY, documents).results]
    assert [i for i in order if documents[i] == "rain"] == [0, 2, 4]


def test_near_one_the_logits_still_decide(reranker, monkeypatch):
    """Sigmoids of 40 and 41 are both 1.0 in any float; the ranking must not care."""
    scored = replace(
        reranker.score_pairs([(QUERY, str(i)) for i in range(4)]),
        logits=np.array([40, 42, 41, -800], np.float32),
    )
    monkeypatch.setattr(reranker, "score_pairs", lambda pairs: scored)
    results = reranker.rank(QUERY, list("0123")).results
    assert [result.index for result in results] == [1, 2, 0, 3]
    assert [result.score for result in results] == pytest.approx([1, 1, 1, 0])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_sigmoid_is_monotonic_and_quiet(logits):
    array = np.sort(np.array(logits, dtype=np.float32))
    with np.errstate(all="raise", under="ignore"):
        chances = sigmoid(array)
    assert np.all((chances >= 0) & (chances <= 1))
    assert np.all(np.diff(chances) >= 0)
    assert sigmoid(np.zeros(1, np.float32)) == 0.5


@pytest.mark.parametrize(("top_n", "length"), [(1, 1), (3, 3), (12, 12), (99, 12), (None, 12)])
def test_top_n(reranker, top_n, length):
    whole = reranker.rank(QUERY, DOCUMENTS).results
    found = reranker.rank(QUERY, DOCUMENTS, top_n=top_n).results
    assert [r.index for r in found] == [r.index for r in whole[:length]]
    assert len(found) == length


def test_no_documents_are_an_empty_ranking(reranker):
    assert reranker.rank(QUERY, []) == Ranking(QUERY, (), RunReport())
    assert reranker.score([]).shape == (0,)
    assert reranker.rank(QUERY, (), top_n=3).results == ()


def test_empty_texts_are_texts(reranker, bert):
    pairs = [("", ""), ("rain", ""), ("", "rain")]
    batch = PairEncoder(bert).encode(pairs, 130, "longest_first").batch(range(3))
    np.testing.assert_allclose(
        reranker.score(pairs), reference_logits(bert, batch), rtol=0, atol=EXACT
    )


def test_duplicates_of_one_call_are_scored_once(reranker):
    pairs = [("a", "rain"), ("b", "rain"), ("a", "rain"), ("a", "tea"), ("b", "rain")] * 3
    found = reranker.score_pairs(pairs)
    assert (found.report.pairs, found.report.scored) == (15, 3)
    alone = [reranker.score([pair])[0] for pair in pairs]
    np.testing.assert_allclose(found.logits, alone, rtol=0, atol=EXACT)
    assert found.logits[0] == found.logits[2]


def test_truncated_tokens_belong_to_their_documents(reranker):
    found = reranker.rank(QUERY, [words(400), "rain", words(50)], max_length=40)
    lost = {result.index: result.truncated_tokens for result in found.results}
    assert lost[1] == 0
    assert lost[0] > lost[2] > 0


def test_score_warns_that_pairs_were_cut(bert):
    with Reranker(bert, device="cpu", threads=1, max_length=30) as reranker:
        with pytest.warns(EchelonWarning, match="1 of 2 pairs were cut to 30 tokens") as caught:
            reranker.score([(QUERY, "rain"), (QUERY, words(80))])
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reranker.score([(QUERY, "rain")])
            reranker.score_pairs([(QUERY, words(80))])


def test_overrides_hold_for_one_call(reranker):
    pairs = [(QUERY, document) for document in DOCUMENTS]
    plain = reranker.score_pairs(pairs)
    one_each = reranker.score_pairs(pairs, batch_size=1)
    assert one_each.report.steps == len(pairs)
    assert plain.report.steps == 1
    assert reranker.score_pairs(pairs, token_budget=100).report.steps > 3
    shorter = reranker.score_pairs(pairs, max_length=20)
    assert shorter.report.tokens <= 20 * len(pairs)
    assert shorter.truncated_tokens.sum() > plain.truncated_tokens.sum()
    query_cut = reranker.score_pairs(pairs, max_query_tokens=1)
    assert query_cut.report.tokens < plain.report.tokens
    for found in (one_each, reranker.score_pairs(pairs)):
        np.testing.assert_allclose(found.logits, plain.logits, rtol=0, atol=EXACT)
    assert reranker.options.batch_size is None


def test_batch_size_alone_leaves_tokens_free(bert):
    """The classical knob: 40 long pairs in one step, far beyond the default token budget."""
    pairs = [(QUERY, words(100, seed=i)) for i in range(40)]
    with Reranker(bert, device="cpu", threads=1) as reranker:
        assert reranker.score_pairs(pairs).report.steps > 1
        assert reranker.score_pairs(pairs, batch_size=40).report.steps == 1
        assert reranker.score_pairs(pairs, token_budget=40 * 130).report.steps == 1
    with Reranker(bert, device="cpu", threads=1, batch_size=40) as reranker:
        assert reranker.score_pairs(pairs).report.steps == 1


def test_truncation_override(reranker):
    long_query = " ".join(SENTENCES[:2])
    with pytest.raises(InvalidInput, match=r"pairs\[0\]\.query: .* max_length=20"):
        reranker.rank(long_query, DOCUMENTS, max_length=20, truncation="only_second")
    found = reranker.rank(long_query, DOCUMENTS, max_length=20, truncation="longest_first")
    assert len(found.results) == len(DOCUMENTS)


@pytest.mark.parametrize("name", ["device", "precision", "threads", "label", "profile", "revision"])
def test_what_is_fixed_at_loading_cannot_be_overridden(reranker, name):
    with pytest.raises(InvalidInput, match="cannot be set for one call") as caught:
        reranker.rank(QUERY, DOCUMENTS, **{name: 1})
    assert caught.value.field == name
    assert "token_budget" in caught.value.remedy


@settings(max_examples=20)
@given(st.lists(st.sampled_from(DOCUMENTS), max_size=12), st.randoms(use_true_random=False))
def test_document_order_does_not_change_scores(reranker, documents, chance):
    order = list(range(len(documents)))
    chance.shuffle(order)
    straight = reranker.score_pairs([(QUERY, d) for d in documents]).logits
    shuffled = reranker.score_pairs([(QUERY, documents[i]) for i in order]).logits
    np.testing.assert_allclose(shuffled, straight[order], rtol=0, atol=EXACT)


def test_pairs_may_come_from_a_generator_and_as_lists(reranker):
    expected = reranker.score([("a", "b"), ("c", "d")])
    found = reranker.score(pair for pair in (["a", "b"], ["c", "d"]))
    assert found.tolist() == expected.tolist()


def test_names_in_memory_errors_are_the_callers(small_memory):
    reranker, scorer = small_memory
    with pytest.raises(OutOfMemory, match=r"^out of memory: pairs\[4\] of \d+ tokens"):
        reranker.score_pairs([("a", "b"), ("a", "b"), ("a", "b"), ("a", "c"), ("a", words(60))])
    found = reranker.score_pairs([("a", "b"), ("a", "c")] * 20)
    assert found.report.scored == 2
    assert reranker.token_budget < 2048
    assert all(batch.lengths.sum() <= 40 for batch in scorer.batches)


def test_names_in_query_errors_are_the_callers(reranker):
    pairs = [("a", "b"), ("a", "b"), (words(40), "rain " * 30)]
    with pytest.raises(InvalidInput) as caught:
        reranker.score_pairs(pairs, truncation="only_second", max_length=30)
    assert caught.value.field == "pairs[2].query"


def test_after_closing_the_error_is_clear(bert):
    reranker = Reranker(bert, device="cpu", threads=1)
    with reranker as entered:
        assert entered is reranker
    reranker.close()
    with pytest.raises(InvalidInput, match="reranker: it is closed"):
        reranker.rank(QUERY, DOCUMENTS)


def test_facts_name_the_model(reranker, bert):
    assert reranker.facts.family == "bert"
    assert (reranker.facts.device, reranker.facts.precision) == ("cpu", "fp32")
    assert reranker.facts.threads == 1
    assert reranker.model.path == bert.resolve()
    assert reranker.token_budget == 2048


def test_threads_share_a_reranker(reranker):
    def rank(query: str) -> list[int]:
        return [r.index for r in reranker.rank(query, DOCUMENTS, token_budget=150).results]

    expected = [rank(query) for query in SENTENCES]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(rank, SENTENCES)) == expected


def test_demo_puts_the_answer_first(demo_folder):
    with Reranker(demo_folder, device="cpu") as reranker:
        ranking = reranker.rank(
            "How many people live in Berlin?",
            [
                "New York City is famous for the Metropolitan Museum of Art.",
                "Berlin has a population of 3,520,031 registered inhabitants.",
                "The kettle boils on the old stove.",
            ],
        )
    best, *others = ranking.results
    assert best.index == 1
    assert best.score > 0.9
    assert all(other.score < 0.1 for other in others)


def test_many_texts_are_encoded_in_windows_with_the_same_answers(bert, monkeypatch):
    from echelon.scheduling import packing

    pairs = [("how to boil an egg", "water " * (1 + i % 37)) for i in range(80)]
    pairs += [("a" * 4, f"text number {i}") for i in range(40)]
    with Reranker(bert, device="cpu", precision="fp32") as reranker:
        whole = reranker.score_pairs(pairs, max_length=30)
        monkeypatch.setattr(packing, "FIRST_WINDOW", 100)
        monkeypatch.setattr(packing, "WINDOW", 700)
        assert len(packing.windows([len(q) + len(d) for q, d in set(pairs)])) > 4
        parts = reranker.score_pairs(pairs, max_length=30)
        np.testing.assert_allclose(parts.logits, whole.logits, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(parts.truncated_tokens, whole.truncated_tokens)
        assert parts.truncated_tokens.any()
        for name in ("pairs", "scored", "tokens"):
            assert getattr(parts.report, name) == getattr(whole.report, name)
        assert parts.report.steps > whole.report.steps
        bad = [*pairs, ("word " * 200, "short")]
        with pytest.raises(InvalidInput, match=r"pairs\[120\].query"):
            reranker.score_pairs(bad, truncation="only_second", max_length=30)
