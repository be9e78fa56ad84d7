"""The asyncio face: same answers, and a loop that never waits for the model."""

from __future__ import annotations

import asyncio
import threading

import pytest

from echelon import AsyncReranker, EchelonWarning, InvalidInput, Reranker
from helpers import SENTENCES, words

QUERY = "rain at the kitchen window"


def test_the_same_results(bert):
    with Reranker(bert, device="cpu", threads=1) as plain:
        ranking = plain.rank(QUERY, SENTENCES, top_n=4)
        pairs = [(QUERY, sentence) for sentence in SENTENCES]
        logits = plain.score(pairs).tolist()

    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            assert await reranker.rank(QUERY, SENTENCES, top_n=4) == ranking
            assert await reranker.rank(QUERY, SENTENCES, 4, batch_size=50) == ranking
            assert (await reranker.score(pairs)).tolist() == logits
            scored = await reranker.score_pairs(pairs, batch_size=1)
            assert scored.report.steps == len(pairs)
            assert scored.logits.tolist() == pytest.approx(logits, abs=1e-4)

    asyncio.run(main())


def test_the_loop_runs_on_while_the_model_computes(bert, monkeypatch):
    """The step waits for the loop to tick: were the loop blocked, neither would ever go on."""

    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            scorer = reranker.reranker._engine._scorer
            score, ticked = scorer.score, threading.Event()

            def wait_for_the_loop(batch):
                assert ticked.wait(60)
                return score(batch)

            monkeypatch.setattr(scorer, "score", wait_for_the_loop)
            ranking = asyncio.create_task(reranker.rank(QUERY, SENTENCES))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not ranking.done()
            ticked.set()
            assert len((await ranking).results) == len(SENTENCES)

    asyncio.run(main())


def test_many_calls_at_once(bert):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            rankings = await asyncio.gather(*(reranker.rank(q, SENTENCES) for q in SENTENCES))
            for query, ranking in zip(SENTENCES, rankings, strict=True):
                assert ranking.query == query
                assert ranking == await reranker.rank(query, SENTENCES)

    asyncio.run(main())


def test_errors_and_warnings_arrive(bert):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            with pytest.raises(InvalidInput, match="documents"):
                await reranker.rank(QUERY, "one string")
            with pytest.warns(EchelonWarning, match="1 of 1 pairs were cut"):
                await reranker.score([(QUERY, words(300))])
            assert len(await reranker.score([(QUERY, "rain")])) == 1

    asyncio.run(main())


def test_bad_options_are_refused_at_once():
    with pytest.raises(InvalidInput, match="unknown option"):
        AsyncReranker("demo", bach_size=3)


def test_closing_lets_the_call_under_way_end(bert):
    async def main():
        reranker = AsyncReranker(bert, device="cpu", threads=1)
        running = asyncio.create_task(reranker.rank(QUERY, SENTENCES))
        await asyncio.sleep(0)
        await reranker.close()
        assert len((await running).results) == len(SENTENCES)

    asyncio.run(main())


def test_after_closing_the_error_is_clear(bert):
    async def main():
        reranker = AsyncReranker(bert, device="cpu", threads=1)
        async with reranker as entered:
            assert entered is reranker
        await reranker.close()
        for call in (reranker.rank(QUERY, ["rain"]), reranker.score([]), reranker.score_pairs([])):
            with pytest.raises(InvalidInput, match="reranker: it is closed"):
                await call

    asyncio.run(main())
