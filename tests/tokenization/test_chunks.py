"""Long documents in chunks: every token is read, nothing is invented, and documents come back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import pairs_of
from hypothesis import given
from hypothesis import strategies as some
from services import scores, service, submit

from echelon.errors import InvalidInput, TooLarge
from echelon.scheduling.admission import AdmissionLimits
from echelon.tokenization.pairs import TruncationImpossible, chunk, cut_at, spans
from echelon.types import Chunking


@given(some.integers(0, 3000), some.integers(1, 300), some.none() | some.integers(1, 20))
def test_chunks_cover_the_document_with_overlap(length, window, limit):
    found = spans(length, window, limit)
    assert len(found) <= (limit or len(found))
    assert found[0][0] == 0
    assert all(0 <= start <= end <= length for start, end in found)
    if length > window:
        assert all(end - start == window for start, end in found)
        assert all(b <= a + window for (a, _), (b, _) in pairwise(found))
        assert len(set(found)) == len(found)
    if limit is None:
        assert found[-1][1] == length


def test_neighbours_share_an_eighth():
    assert spans(300, 160) == [(0, 160), (140, 300)]
    assert spans(500, 160) == [(0, 160), (140, 300), (280, 440), (340, 500)]
    assert spans(500, 160, 2) == [(0, 160), (140, 300)]


def test_what_fits_stays_as_it_is():
    pairs = pairs_of([10, 20, 60], 60, query=5)
    split, chunk_map = chunk(pairs, 60, Chunking())
    assert split.keys() == pairs.keys()
    assert split.lengths.tolist() == pairs.lengths.tolist()
    assert chunk_map.starts.tolist() == [0, 1, 2]
    assert chunk_map.cut.tolist() == [0, 0, 0]


def test_the_best_chunk_is_the_documents_score():
    pairs = pairs_of([10, 150, 20], 60, query=5)
    split, chunk_map = chunk(pairs, 60, Chunking())
    assert list(split.places) == [0, 1, 1, 1, 2]
    assert max(split.lengths) <= 60
    logits = np.array([1, -3, 7, 2, -5], dtype=np.float32)
    assert chunk_map.best(logits).tolist() == [1, 7, -5]
    assert chunk_map.truncated_tokens(np.array([0, 1, 2, 0, 4])).tolist() == [0, 3, 4]


def test_limits_are_counted_as_cut():
    pairs = pairs_of([400], 60, query=5)
    document = 400 - 5 - 3
    assert chunk(pairs, 60, Chunking())[1].cut.tolist() == [0]
    assert chunk(pairs, 60, Chunking(max_tokens=100))[1].cut.tolist() == [document - 100]
    split, chunk_map = chunk(pairs, 60, Chunking(max_chunks=2))
    window = 60 - 5 - 3
    assert len(split) == 2
    assert chunk_map.cut.tolist() == [document - (2 * window - window // 8)]


def test_a_long_query_leaves_half_of_the_room():
    pairs = pairs_of([200], 60, query=50)
    split, chunk_map = chunk(pairs, 60, Chunking())
    room = 60 - 3
    assert len(split.queries[0]) == room // 2
    assert chunk_map.cut.tolist() == [50 - room // 2]
    with pytest.raises(TruncationImpossible):
        chunk(replace(pairs, truncation="only_second"), 60, Chunking())


def test_models_that_keep_the_end_keep_it():
    pairs = pairs_of([200], 60, query=5)
    pairs = replace(pairs, template=replace(pairs.template, side="left"))
    split, _ = chunk(pairs, 60, Chunking(max_tokens=30))
    assert split.documents[0].tolist() == pairs.documents[0][-30:].tolist()


def test_the_other_end_may_be_cut():
    pairs = pairs_of([20, 200], 60, query=5)
    cut, chunk_map = cut_at(pairs, "left")
    assert cut.documents[0].tolist() == pairs.documents[0].tolist()
    assert cut.documents[1].tolist() == pairs.documents[1][-(60 - 5 - 3) :].tolist()
    assert cut.lengths.tolist() == pairs.lengths.tolist() == [20, 60]
    assert chunk_map.truncated_tokens(cut.truncated_tokens).tolist() == [0, 140]
    assert chunk_map.best(np.array([1, 2], dtype=np.float32)).tolist() == [1, 2]


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_chunks": -1}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(InvalidInput, match=r"_per_doc: .* is not positive"):
        Chunking(**wrong)


def test_a_service_reads_in_chunks():
    async def main():
        async with service(max_length=60) as made:
            text = "".join(chr(65 + i % 50) for i in range(140))
            answer = await submit(made, [("query", "d"), ("query", text)], chunking=Chunking())
            windows = [("query", text[start:end]) for start, end in spans(140, 60 - 5 - 3)]
            assert answer.logits.tolist() == [scores([("query", "d")])[0], max(scores(windows))]
            assert answer.truncated_tokens.tolist() == [0, 0]
            assert answer.tokens > 140
            one = await submit(made, [("query", text)], chunking=Chunking(max_chunks=1))
            cut = await submit(made, [("query", text)])
            assert one.logits.tolist() == cut.logits.tolist()
            assert one.truncated_tokens.tolist() == cut.truncated_tokens.tolist()
            left = await submit(made, [("query", text)], side="left")
            assert left.logits.tolist() == scores([("query", text[-52:])])
            assert left.truncated_tokens.tolist() == cut.truncated_tokens.tolist()
            with pytest.raises(InvalidInput, match=r"pairs\[1\]\.document: with its query it has"):
                await submit(made, [("query", "d"), ("query", text)], refuse_truncation=True)
            with pytest.raises(InvalidInput, match=r"pairs\[0\]\.query: its 50 tokens"):
                await submit(
                    made, [("q" * 50, text)], chunking=Chunking(), truncation="only_second"
                )

    asyncio.run(main())


def test_chunks_count_for_admission():
    async def main():
        bounds = AdmissionLimits(max_request_tokens=1000)
        async with service(max_length=60, bounds=bounds) as made:
            await submit(made, [("query", "x" * 5000)])
            with pytest.raises(TooLarge, match="tokens are more than the 1000"):
                await submit(made, [("query", "x" * 5000)], chunking=Chunking())

    asyncio.run(main())
