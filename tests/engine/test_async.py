"""The asyncio face: same answers, and a loop that never waits for the model."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from helpers import SENTENCES, words

from echelon import AsyncReranker, EchelonWarning, InvalidInput, Reranker
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.packing import windows

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
                alone = await reranker.rank(query, SENTENCES)
                assert [r.index for r in ranking.results] == [r.index for r in alone.results]
                assert [r.logit for r in ranking.results] == pytest.approx(
                    [r.logit for r in alone.results], abs=1e-4
                )
                # Its steps were shared: how many they were depends on who else called.
                assert replace(ranking.report, steps=alone.report.steps) == alone.report

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


class Gate:
    """Holds the first step until it is opened, and counts steps."""

    def __init__(self, reranker, monkeypatch):
        scorer = reranker.reranker._engine._scorer
        self.entered, self.opened, self.sizes = threading.Event(), threading.Event(), []
        self._score = scorer.score
        monkeypatch.setattr(scorer, "score", self.score)

    def score(self, batch):
        self.entered.set()
        assert self.opened.wait(60)
        self.sizes.append(len(batch))
        return self._score(batch)


async def waiting(reranker, requests):
    while reranker._together._dispatcher.load().requests < requests:  # noqa: ASYNC110 - threads
        await asyncio.sleep(0.001)


def test_calls_at_the_same_time_share_steps(bert, monkeypatch):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            gate = Gate(reranker, monkeypatch)
            calls = [asyncio.create_task(reranker.rank(QUERY, ["rain", s])) for s in SENTENCES[:9]]
            await waiting(reranker, 9)
            gate.opened.set()
            rankings = await asyncio.gather(*calls)
            assert [len(ranking.results) for ranking in rankings] == [2] * 9
            assert len(gate.sizes) <= 3
            assert sum(gate.sizes) == 10  # nine times the same pair is one

    asyncio.run(main())


def test_a_cancelled_call_is_taken_out(bert, monkeypatch):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            gate = Gate(reranker, monkeypatch)
            first = asyncio.create_task(reranker.rank(QUERY, ["rain"]))
            await waiting(reranker, 1)
            gone = asyncio.create_task(reranker.rank(QUERY, SENTENCES))
            await waiting(reranker, 2)
            gone.cancel()
            await asyncio.wait([gone])
            gate.opened.set()
            assert len((await first).results) == 1
        assert sum(gate.sizes) == 1

    asyncio.run(main())


def test_what_the_scorer_raises_is_raised(bert, monkeypatch):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            scorer = reranker.reranker._engine._scorer
            fault = RuntimeError("the device is on fire")

            def burn(batch):
                raise fault

            monkeypatch.setattr(scorer, "score", burn)
            with pytest.raises(RuntimeError) as caught:
                await reranker.rank(QUERY, ["rain"])
            assert caught.value is fault
            monkeypatch.undo()
            assert len((await reranker.rank(QUERY, ["rain"])).results) == 1

    asyncio.run(main())


def test_a_short_call_does_not_wait_for_a_long_one(bert, monkeypatch):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1, batch_size=2) as reranker:
            gate = Gate(reranker, monkeypatch)
            long = asyncio.create_task(reranker.rank(QUERY, [words(1 + i) for i in range(40)]))
            await waiting(reranker, 1)
            short = asyncio.create_task(reranker.rank(QUERY, ["snow"]))
            await waiting(reranker, 2)
            gate.opened.set()
            assert len((await short).results) == 1
            scored = sum(gate.sizes)
            assert len((await long).results) == 40
            assert scored < sum(gate.sizes) == 41

    asyncio.run(main())


def test_a_call_in_windows_keeps_its_order(bert, monkeypatch):
    documents = [words(1 + i) for i in range(60)]
    with Reranker(bert, device="cpu", threads=1) as plain:
        expected = plain.score([(QUERY, document) for document in documents]).tolist()
    quarters = [[*range(i, 60, 4)] for i in range(4)]
    monkeypatch.setattr(
        "echelon.engine.call.windows",
        lambda sizes: quarters if len(sizes) == 60 else windows(sizes),
    )

    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as reranker:
            ranking = await reranker.rank(QUERY, documents)
            for result in ranking.results:
                assert result.logit == pytest.approx(expected[result.index], abs=1e-4)
            with pytest.raises(InvalidInput, match=r"pairs\[0\].query"):
                await reranker.score_pairs([(words(300), "rain")], truncation="only_second")

    asyncio.run(main())


def test_memory_teaches_a_smaller_budget(bert, monkeypatch):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1, token_budget=400) as reranker:
            scorer = reranker.reranker._engine._scorer
            score = scorer.score

            def narrow(batch):
                if len(batch.ids) > 200:
                    raise DeviceOutOfMemory("full")
                return score(batch)

            monkeypatch.setattr(scorer, "score", narrow)
            ranking = await reranker.rank(QUERY, [words(20 + i) for i in range(12)])
            assert len(ranking.results) == 12
            assert [step.rung for step in ranking.report.ladder] == ["drop_caches", "halve_budget"]
            assert reranker.reranker.token_budget <= 200

    asyncio.run(main())
