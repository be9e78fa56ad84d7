"""A service with a score cache: what a hit costs, what is kept, and what never is."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest
from scorers import MARK, NAN, Obedient
from services import RecordingListener, coded, run, scores, service, submit, texts, until

from echelon.engine.score_cache import ENTRY_BYTES, ScoreCache
from echelon.errors import DeadlinePassed, InvalidInput, NonFiniteScore, Overloaded, TooLarge
from echelon.scheduling.admission import AdmissionLimits
from echelon.types import Chunking

LONG = [("q", "d" * 300)]


class CachingService:
    """A service with a cache, and how many pairs its steps scored."""

    def __init__(self, opener=Obedient, entries=1000, **settings):
        self.listener = RecordingListener()
        self.cache = ScoreCache(entries * ENTRY_BYTES)
        self.made = service(opener, listener=self.listener, cache=self.cache, **settings)

    def run(self, main):
        return run(main, self.made)

    @property
    def scored(self) -> int:
        return sum(event.pairs for event in self.listener.of("StepFinished"))

    @property
    def sought(self) -> list:
        return [(event.hits, event.misses) for event in self.listener.of("ScoresSought")]


def test_a_request_with_hits_alone_is_answered_without_a_step():
    cached, pairs = CachingService(), texts(1, 4)

    async def main(made):
        first = await submit(made, pairs)
        again = await submit(made, pairs)
        assert again.logits.tobytes() == first.logits.tobytes()
        assert again.truncated_tokens.tolist() == first.truncated_tokens.tolist()
        assert (again.tokens, again.cost_tokens) == (first.tokens, 0)
        assert (first.cached, again.cached) == (0, 4)
        assert again.batch_sizes == ()
        assert again.timings.tokenise_s == again.timings.queue_s == again.timings.compute_s == 0

    cached.run(main)
    assert cached.scored == 4
    assert cached.sought == [(0, 4), (4, 0)]
    ended = cached.listener.of("RequestEnded")
    assert [(event.outcome, event.documents) for event in ended] == [("answered", 4)] * 2
    assert ended[0].tokens == ended[1].tokens


def test_hits_and_misses_of_a_request_come_in_its_order():
    cached, pairs = CachingService(), texts(1, 6)

    async def main(made):
        await submit(made, [pairs[4], pairs[1]])
        answer = await submit(made, pairs)
        assert answer.logits.tolist() == scores(pairs)
        assert answer.cached == 2
        assert answer.tokens == sum(len(query) + len(text) + 3 for query, text in pairs)
        assert (await submit(made, pairs)).cached == 6

    cached.run(main)
    assert cached.scored == 6


def test_only_misses_are_charged_in_admission():
    pairs = texts(1, 8)
    cached = CachingService(bounds=AdmissionLimits(max_request_tokens=200))

    async def main(made):
        for first in range(0, 8, 2):
            await submit(made, pairs[first : first + 2])
        assert (await submit(made, pairs)).cached == 8
        with pytest.raises(TooLarge):
            await submit(made, texts(2, 8))

    cached.run(main)


def test_a_request_of_hits_alone_passes_a_full_service():
    opener, bounds = partial(Obedient, pace_s=0.005), AdmissionLimits(max_requests=1)
    cached = CachingService(opener, bounds=bounds, token_budget=100)

    async def main(made):
        known = await submit(made, texts(1))
        waiting = asyncio.create_task(submit(made, texts(2)))
        await until(lambda: made.snapshot().requests)
        with pytest.raises(Overloaded):
            await submit(made, texts(3))
        again = await submit(made, texts(1))
        assert not waiting.done()
        assert again.logits.tobytes() == known.logits.tobytes()
        await waiting

    cached.run(main)


def test_more_documents_than_allowed_are_refused_though_they_are_cached():
    pairs = texts(1, 3)
    cached = CachingService(bounds=AdmissionLimits(max_documents=2))

    async def main(made):
        await submit(made, pairs[:2])
        await submit(made, pairs[2:])
        with pytest.raises(TooLarge):
            await submit(made, pairs)

    cached.run(main)


def test_a_deadline_that_has_passed_is_refused_though_all_is_cached():
    cached = CachingService()

    async def main(made):
        await submit(made, texts(1))
        with pytest.raises(DeadlinePassed):
            await submit(made, texts(1), deadline=made.clock() - 1)

    cached.run(main)


def test_an_error_names_the_callers_pair_beside_hits():
    pairs = [("q", "a"), ("q", "b"), ("q" * 600, "c")]
    cached = CachingService(truncation="only_second")

    async def main(made):
        await submit(made, pairs[:2])
        answer = await submit(made, [pairs[0], ("q", chr(300))])
        assert answer.cached == 1
        with pytest.raises(NonFiniteScore, match=r"pairs\[2\]"):
            await submit(made, [*pairs[:2], *coded(NAN)])
        with pytest.raises(InvalidInput, match=r"pairs\[1\]"):
            await submit(made, [pairs[0], ("q", 7)])

    cached.run(main)
    assert cached.cache.usage.entries == 3  # failed requests leave nothing


def test_what_differs_in_its_settings_is_scored_again():
    cached, pairs = CachingService(), LONG

    async def main(made):
        asked = [
            {},
            {"max_length": 100},
            {"side": "left", "max_length": 100},
            {"chunking": Chunking()},
        ]
        for settings in asked:
            computed = await submit(made, pairs, **settings)
            assert computed.cached == 0
            again = await submit(made, pairs, **settings)
            assert again.cached == 1
            assert again.logits.tobytes() == computed.logits.tobytes()
            assert again.truncated_tokens.tolist() == computed.truncated_tokens.tolist()
            assert again.tokens == computed.tokens

    cached.run(main)


def test_chunks_are_kept_as_their_documents_score():
    cached, chunking = CachingService(), Chunking()
    pairs = [("q", "ab" * 400), ("q", "short"), ("q", "yz" * 500)]

    async def main(made):
        computed = await submit(made, pairs, chunking=chunking, max_length=100)
        mixed = await submit(made, [("q", "new"), *pairs], chunking=chunking, max_length=100)
        assert mixed.cached == 3
        assert mixed.logits[1:].tobytes() == computed.logits.tobytes()
        assert mixed.truncated_tokens[1:].tolist() == computed.truncated_tokens.tolist()

    cached.run(main)


def test_a_request_that_refuses_truncation_gets_no_score_of_a_cut_pair():
    cached = CachingService()

    async def main(made):
        assert (await submit(made, LONG, max_length=100)).truncated_tokens.tolist() == [204]
        with pytest.raises(InvalidInput, match="304 tokens or more, and 100 is the most"):
            await submit(made, LONG, max_length=100, refuse_truncation=True)
        await submit(made, texts(1))
        assert (await submit(made, texts(1), refuse_truncation=True)).cached == 5

    cached.run(main)


def test_a_fresh_request_is_scored_and_not_kept():
    cached = CachingService()

    async def main(made):
        for _ in range(2):
            assert (await submit(made, texts(1), fresh=True)).cached == 0
        assert (await submit(made, texts(1))).cached == 0
        assert (await submit(made, texts(1), fresh=True)).cached == 0

    cached.run(main)
    assert cached.scored == 20


def test_a_canary_is_scored_each_time():
    cached = CachingService()

    async def main(made):
        for count in (1, 2):
            made._dispatcher.last_scored = None
            assert (await made.ready()).ready
            assert cached.scored == count

    cached.run(main)


def test_scores_of_another_precision_are_not_used_and_mixed_ones_not_kept():
    cached = CachingService(partial(Obedient, 200), allow=("precision",))
    pairs = texts(1, 2)

    async def main(made):
        await submit(made, pairs)
        assert (await submit(made, pairs)).cached == 2
        lowered = await submit(made, [*pairs, *LONG])  # its long pair needs bf16
        assert lowered.cached == 2
        assert made.info.precision == "bf16"
        assert (await submit(made, [*pairs, *LONG])).cached == 0
        assert (await submit(made, [*pairs, *LONG])).cached == 3  # all in bf16

    cached.run(main)


def test_scores_of_shortened_pairs_are_not_kept():
    cached = CachingService(partial(Obedient, 200), allow=("max_length",))

    async def main(made):
        for _ in range(2):
            answer = await submit(made, LONG)
            assert answer.ladder[-1].rung == "shorten"
            assert answer.cached == 0

    cached.run(main)
    assert cached.cache.usage.entries == 0


def test_while_load_is_shed_hits_alone_are_answered_in_full_and_nothing_is_kept():
    cached = CachingService(fallback_max_length=50)

    async def main(made):
        full = await submit(made, LONG)
        made._admission.shedding.on = True
        made._admission.shedding._last_busy = made.clock()
        again = await submit(made, LONG, priority="low")
        assert (again.cached, again.fallback) == (1, None)
        assert again.logits.tobytes() == full.logits.tobytes()
        for _ in range(2):
            mixed = await submit(made, [*LONG, ("q", "e" * 300)], priority="low")
            assert (mixed.cached, mixed.fallback) == (0, 50)
            assert (mixed.truncated_tokens > 0).all()
        assert (await submit(made, [("q", "e" * 300)])).cached == 0

    cached.run(main)


def test_many_callers_at_once_get_their_own_scores():
    cached = CachingService(entries=40, workers=2)
    generator = np.random.default_rng(5)
    asked = [
        [texts(int(seed), 5)[place] for seed, place in generator.integers(0, 5, (6, 2))]
        for _ in range(200)
    ]

    async def main(made):
        answers = await asyncio.gather(*(submit(made, pairs) for pairs in asked[:50]))
        for pairs in asked[50:]:
            answers.append(await submit(made, pairs))
        for answer, pairs in zip(answers, asked, strict=True):
            assert answer.logits.tolist() == scores(pairs)
        assert sum(answer.cached for answer in answers) > 0

    cached.run(main)


def test_each_worker_that_opens_the_model_asks_for_its_revision(tmp_path):
    asked = []
    cached = CachingService(partial(Obedient, marks=str(tmp_path)))
    cached.cache._tell_revision = lambda: asked.append(1) or str(len(asked))

    async def main(made):
        await submit(made, texts(1))
        assert (await submit(made, texts(1))).cached == 5
        await submit(made, coded(MARK))  # its worker dies, and another one opens the model
        await until(lambda: len(asked) == 2)
        assert (await submit(made, texts(1))).cached == 0

    cached.run(main)


def test_a_cancelled_request_leaves_nothing():
    cached = CachingService(partial(Obedient, pace_s=0.002), token_budget=100)

    async def main(made):
        asking = asyncio.create_task(submit(made, texts(1)))
        await until(lambda: made.snapshot().load.requests)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert made.snapshot().cache.entries == 0

    cached.run(main)


def test_a_large_request_is_looked_up_beside_the_event_loop():
    cached = CachingService()
    pairs = [("q", f"{i} " + "x" * 300) for i in range(300)]

    async def main(made):
        await submit(made, pairs)
        assert (await submit(made, pairs)).cached == 300

    cached.run(main)
