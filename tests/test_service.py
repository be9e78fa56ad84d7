"""The service with real child processes and a scorer without weights: nothing accepted is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest

import scorers
from echelon.encode.pairs import encode_pairs
from echelon.errors import (
    DeadlinePassed,
    InvalidInput,
    ModelNotFound,
    NonFiniteScore,
    OutOfMemory,
    Overloaded,
    ScoringFailed,
    ShuttingDown,
    TooLarge,
    WorkerLost,
)
from echelon.plan.admit import Bounds
from echelon.score.fake import FakeScorer
from echelon.score.worker import ChildWorker
from echelon.serve.crew import Orders
from echelon.serve.events import RequestEnded, Silence
from echelon.serve.service import Service
from echelon.serve.state import Settings
from helpers import TEMPLATE
from scorers import Obedient

GUARD_S = 60.0


class LetterEncoder:
    """A tokenizer whose tokens are characters."""

    template = TEMPLATE

    def encode(self, pairs, max_length, truncation, max_query_tokens=None, places=None):
        queries = [ids(query)[:max_query_tokens] for query, _ in pairs]
        documents = [ids(document) for _, document in pairs]
        return encode_pairs(TEMPLATE, queries, documents, max_length, truncation, places)


class Ears(Silence):
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []

    def note(self, event) -> None:
        self.heard.append(event)

    step_finished = request_ended = refused = ladder_taken = worker_changed = note

    def of(self, kind) -> list:
        return [event for event in self.heard if type(event).__name__ == kind]

    def states(self) -> list:
        return [event.state for event in self.of("WorkerChanged")]


async def until(condition) -> None:
    """Wait for something that must come."""
    while not condition():  # noqa: ASYNC110 - it changes in other threads
        await asyncio.sleep(0.001)


def ids(text):
    return np.array([ord(letter) for letter in text], dtype=np.int32)


def wish(*numbers, query="q", count=1):
    """Encoded pairs whose documents hold the given token ids."""
    documents = [np.array([*numbers, index], dtype=np.int32) for index in range(count)]
    return encode_pairs(TEMPLATE, [ids(query)] * count, documents, 500, "longest_first")


def scores(pairs):
    if isinstance(pairs, list):
        pairs = LetterEncoder().encode(pairs, 512, "longest_first")
    return [FakeScorer().score(pairs.batch([i]))[0] for i in range(len(pairs))]


def service(opener=Obedient, *, ears=None, learned=None, **settings) -> Service:
    settings.setdefault("precision", "fp32")
    return Service(
        LetterEncoder(),
        lambda number, ended: ChildWorker(opener, f"worker {number}", on_end=ended),
        Settings(**settings),
        listener=ears,
        learned=learned,
    )


def run(main, made: Service):
    async def guarded():
        async with asyncio.timeout(GUARD_S), made:
            return await main(made)

    return asyncio.run(guarded())


def texts(seed: int, count: int = 5) -> list:
    return [(f"query {seed}", f"document {seed} {i} " + "x" * (7 * i % 40)) for i in range(count)]


def test_answers_are_the_scorers_own_whoever_else_asks():
    ears = Ears()

    async def main(made):
        answers = await asyncio.gather(*(made.submit(texts(seed)) for seed in range(40)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed))
            assert answer.truncated_tokens.tolist() == [0] * 5
            assert answer.tokens == sum(len(q) + len(d) + 3 for q, d in texts(seed))
            assert answer.timings.total_s >= answer.timings.queue_s >= 0
            assert len(answer.batch_sizes) >= 1
        assert max(size for answer in answers for size in answer.batch_sizes) > 5
        snapshot = made.snapshot()
        assert (snapshot.requests, snapshot.load.tokens, snapshot.workers) == (0, 0, 1)

    run(main, service(ears=ears))
    steps = ears.of("StepFinished")
    assert sum(step.pairs for step in steps) == 200
    assert all(step.predicted_s > 0 for step in steps)
    assert [event.outcome for event in ears.of("RequestEnded")] == ["answered"] * 40
    states = ears.states()
    assert states == ["starting", "up", "stopped"]


def test_nothing_asked_is_nothing_done():
    async def main(made):
        answer = await made.submit([])
        assert answer.logits.shape == answer.truncated_tokens.shape == (0,)

    run(main, service())


def test_identical_pairs_in_flight_are_scored_once():
    ears = Ears()

    async def main(made):
        answers = await asyncio.gather(*(made.submit(texts(1)) for _ in range(10)))
        assert all(answer.logits.tolist() == scores(texts(1)) for answer in answers)

    run(main, service(ears=ears))
    assert sum(step.pairs for step in ears.of("StepFinished")) < 50


def test_truncation_is_told():
    async def main(made):
        answer = await made.submit([("query", "d" * 100), ("query", "d")])
        assert answer.truncated_tokens.tolist() == [100 + 5 + 3 - 60, 0]
        wider = await made.submit([("query", "d" * 100)], max_length=512)
        assert wider.truncated_tokens.tolist() == [0]
        with pytest.raises(InvalidInput, match="beyond the model's 512"):
            await made.submit([("query", "d")], max_length=513)

    run(main, service(max_length=60))


def test_bad_input_names_the_document():
    async def main(made):
        with pytest.raises(InvalidInput, match=r"pairs\[1\]"):
            await made.submit([("q", "d"), None])
        pairs = texts(1, 100)
        pairs[70] = ("query", None)
        with pytest.raises(InvalidInput, match=r"pairs\[70\]\.document: is NoneType"):
            await made.submit(pairs)
        assert made.snapshot().requests == 0

    run(main, service())


# Overload and deadlines.


def test_a_full_house_refuses_whole_requests_and_keeps_its_word():
    ears = Ears()
    bounds = Bounds(max_requests=4)

    async def main(made):
        answers = await asyncio.gather(
            *(made.submit(texts(seed)) for seed in range(12)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        served = [answer for answer in answers if not isinstance(answer, Exception)]
        assert (len(served), len(refused)) == (4, 8)
        assert all(error.retry_after_s > 0 for error in refused)
        assert (await made.submit(texts(1))).logits.tolist() == scores(texts(1))
        with pytest.raises(TooLarge):
            await made.submit([("q", "d")] * 10_001)

    run(main, service(ears=ears, bounds=bounds))
    assert {event.reason for event in ears.of("Refused")} == {"requests_full", "too_many_documents"}


def test_a_deadline_that_cannot_be_met_burns_nothing():
    ears = Ears()

    async def main(made):
        with pytest.raises(DeadlinePassed, match="even on an idle server"):
            await made.submit(texts(1, 1000), deadline=made.clock() + 0.5)
        with pytest.raises(DeadlinePassed):
            await made.submit(texts(1), deadline=made.clock())

    run(main, service(partial(Obedient, pace_s=0.0001), ears=ears))
    assert ears.of("StepFinished") == []


def test_a_deadline_that_passes_in_the_queue_takes_the_request_out():
    ears = Ears()

    async def main(made):
        hanging = asyncio.create_task(made.submit(wish(scorers.HANG)))
        await until(lambda: made.snapshot().load.running_s)
        with pytest.raises(DeadlinePassed, match="while the request waited"):
            await made.submit(texts(1), deadline=made.clock() + 0.3)
        assert made.snapshot().load.tokens == 0
        hanging.cancel()
        await asyncio.wait([hanging])

    run(main, service(ears=ears))
    assert len(ears.of("StepFinished")) == 0
    assert [event.outcome for event in ears.of("RequestEnded")] == ["expired", "cancelled"]


def test_a_caller_who_goes_takes_his_work_along():
    ears = Ears()

    async def main(made):
        gone = [asyncio.create_task(made.submit(texts(seed, 50))) for seed in range(5)]
        await until(lambda: made.snapshot().load.requests == 5)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert made.snapshot().load.pairs == 0
        assert (await made.submit(texts(9))).logits.tolist() == scores(texts(9))

    run(main, service(partial(Obedient, pace_s=0.0002), ears=ears, token_budget=100))
    assert sum(step.pairs for step in ears.of("StepFinished")) < 60
    outcomes = [event.outcome for event in ears.of("RequestEnded")]
    assert sorted(outcomes) == ["answered"] + ["cancelled"] * 5


def test_one_document_overtakes_a_thousand():
    ears = Ears()

    async def main(made):
        long = asyncio.create_task(made.submit(texts(1, 1000)))
        await until(lambda: len(ears.of("StepFinished")) >= 3)
        before = len(ears.of("StepFinished"))
        await made.submit(texts(2, 1))
        assert len(ears.of("StepFinished")) - before <= 4
        assert not long.done()
        long.cancel()
        await asyncio.wait([long])

    run(main, service(partial(Obedient, pace_s=0.0001), ears=ears, token_budget=300))


# Memory trouble.


def test_memory_trouble_makes_steps_smaller_and_is_told():
    ears, learned = Ears(), []

    async def main(made):
        answer = await made.submit(texts(1, 60))
        assert answer.logits.tolist() == scores(texts(1, 60))
        assert [step.rung for step in answer.ladder][:2] == ["drop_caches", "halve_budget"]
        assert made.snapshot().load.budget <= 500
        assert (await made.submit(texts(2, 60))).ladder == ()

    run(main, service(partial(Obedient, 500), ears=ears, learned=learned.append))
    assert learned == sorted(learned, reverse=True)
    assert ears.of("LadderTaken")[-1].budget == learned[-1] <= 500


def test_a_pair_that_fits_nowhere_fails_alone():
    async def main(made):
        good, bad = await asyncio.gather(
            made.submit(texts(1, 3)), made.submit([("q", "d" * 300)]), return_exceptions=True
        )
        assert good.logits.tolist() == scores(texts(1, 3))
        assert isinstance(bad, OutOfMemory)
        assert "304 tokens" in str(bad)

    run(main, service(partial(Obedient, 200)))


def test_what_is_allowed_may_be_given_up():
    async def main(made):
        answer = await made.submit([("q", "d" * 300)])
        assert answer.ladder[-1].rung == "shorten"
        assert answer.truncated_tokens.tolist() == [152]

    run(main, service(partial(Obedient, 200), allow=("max_length",)))

    async def halved(made):
        answer = await made.submit([("q", "d" * 300)])
        assert answer.ladder[-1].rung == "lower_precision"
        assert made.facts.precision == "bf16"

    run(halved, service(partial(Obedient, 200), allow=("precision",)))


# Workers that die.


def test_a_killed_worker_under_load_loses_nothing():
    ears = Ears()

    async def main(made):
        async def kill():
            for goal, ups in ((3, 2), (10, 3)):
                await until(lambda goal=goal: len(ears.of("StepFinished")) >= goal)
                os.kill(made._keepers[0]._worker.pid, signal.SIGKILL)
                await until(lambda ups=ups: ears.states().count("up") == ups)

        killing = asyncio.create_task(kill())
        answers = await asyncio.gather(*(made.submit(texts(seed, 20)) for seed in range(60)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed, 20))
        await killing

    run(main, service(partial(Obedient, pace_s=0.00002), ears=ears, token_budget=1500))
    assert ears.states().count("died") == 2
    assert any(step.again for step in ears.of("StepFinished"))


def test_a_worker_that_dies_in_a_step_is_given_it_once_more(tmp_path):
    ears = Ears()

    async def main(made):
        first, other = await asyncio.gather(made.submit(wish(scorers.MARK)), made.submit(texts(1)))
        assert first.logits.tolist() == scores(wish(scorers.MARK))
        assert other.logits.tolist() == scores(texts(1))

    run(main, service(partial(Obedient, marks=str(tmp_path)), ears=ears))
    assert ears.states() == [
        "starting", "up", "died", "starting", "up", "stopped",
    ]  # fmt: skip


def test_a_pair_that_kills_workers_takes_no_stranger_with_it():
    async def main(made):
        answers = await asyncio.gather(
            *(made.submit(texts(seed)) for seed in range(5)),
            made.submit(wish(scorers.KILL)),
            return_exceptions=True,
        )
        for seed, answer in enumerate(answers[:5]):
            assert answer.logits.tolist() == scores(texts(seed))
        assert isinstance(answers[5], WorkerLost)
        assert str(answers[5]).startswith("pairs[0]: ")

    run(main, service())


def test_a_wedged_worker_is_replaced():
    ears = Ears()

    async def main(made):
        answers = await asyncio.gather(
            made.submit(wish(scorers.STOP)), made.submit(texts(1)), return_exceptions=True
        )
        assert isinstance(answers[0], WorkerLost)
        assert answers[1].logits.tolist() == scores(texts(1))

    run(main, service(ears=ears, wedge_floor_s=0.5))
    assert ears.states().count("wedged") == 2


def test_an_idle_worker_that_dies_is_replaced_at_once():
    ears = Ears()

    async def main(made):
        os.kill(made._keepers[0]._worker.pid, signal.SIGKILL)
        await until(lambda: ears.states().count("up") == 2)
        assert (await made.submit(texts(1))).logits.tolist() == scores(texts(1))

    run(main, service(ears=ears))


def test_a_worker_that_grows_is_replaced_between_steps():
    ears = Ears()
    limit = 250 * scorers.MEBIBYTE  # a new worker holds less than 100, and each wish adds 128

    async def main(made):
        for _ in range(4):
            assert len((await made.submit(wish(scorers.GROW, 1))).logits) == 1

    run(main, service(ears=ears, memory_limit_bytes=limit))
    states = ears.states()
    assert "recycled" in states
    assert "died" not in states


def test_a_memory_limit_that_nothing_fits_is_not_applied(caplog):
    async def main(made):
        assert len((await made.submit(texts(1))).logits) == 5

    run(main, service(memory_limit_bytes=1000))
    assert "set it to twice as much" in caplog.text


def test_errors_of_the_scorer_are_of_that_request_only():
    async def main(made):
        for deed, kind in ((scorers.RAISE, ScoringFailed), (scorers.NAN, NonFiniteScore)):
            *good, bad = await asyncio.gather(
                *(made.submit(texts(seed)) for seed in range(3)),
                made.submit(wish(deed)),
                return_exceptions=True,
            )
            assert isinstance(bad, kind)
            for seed, answer in enumerate(good):
                assert answer.logits.tolist() == scores(texts(seed))

    run(main, service())


def test_several_workers_share_one_queue():
    ears = Ears()

    async def main(made):
        answers = await asyncio.gather(*(made.submit(texts(seed, 20)) for seed in range(30)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed, 20))

    run(main, service(partial(Obedient, pace_s=0.00003), ears=ears, workers=2, token_budget=300))
    assert {step.worker for step in ears.of("StepFinished")} == {0, 1}


def test_where_no_worker_can_be_brought_up_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("echelon.serve.service.Orders", partial(Orders, delays_s=(0.0,)))
    ears = Ears()

    async def main(made):
        os.kill(made._keepers[0]._worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="it was deleted"):
            await made.submit(wish(scorers.HANG))
        with pytest.raises(WorkerLost, match="No scoring process can be started"):
            await made.submit(texts(1))
        assert "it was deleted" in (await made.ready()).reason

    run(main, service(partial(scorers.opens_once, str(tmp_path)), ears=ears))
    assert ears.states().count("failed") >= 4


# Its life.


def test_a_model_that_cannot_be_opened_says_so():
    async def main():
        made = service(scorers.missing)
        with pytest.raises(ModelNotFound, match="no such folder"):
            await made.start()
        with pytest.raises(WorkerLost, match="ended with exit code 3"):
            await service(scorers.dying, workers=2).start()

    asyncio.run(main())


def test_draining_answers_what_is_inside_and_takes_nothing_more():
    async def main(made):
        inside = [asyncio.create_task(made.submit(texts(seed, 20))) for seed in range(10)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(made.drain(GUARD_S))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await made.submit(texts(1))
        assert not (await made.ready()).ready
        assert await draining
        answers = [task.result() for task in inside]
        assert all(len(answer.logits) == 20 for answer in answers)

    run(main, service(partial(Obedient, pace_s=0.00002)))


def test_stopping_tells_whoever_still_waits():
    async def main(made):
        inside = asyncio.create_task(made.submit(wish(scorers.HANG)))
        await until(lambda: made.snapshot().load.running_s)
        assert not await made.drain(0.01)
        await made.stop()
        with pytest.raises(ShuttingDown, match="stopped before the request was done"):
            await inside
        with pytest.raises(ShuttingDown):
            await made.submit(texts(1))
        await made.stop()

    before = threading.active_count()
    run(main, service())
    guard = time.monotonic() + GUARD_S
    while threading.active_count() > before:  # those that only have to notice
        assert time.monotonic() < guard, threading.enumerate()
        time.sleep(0.01)


def test_readiness_is_a_score_and_not_a_port():
    ears = Ears()

    async def main(made):
        assert (await made.ready()).ready
        assert ears.of("StepFinished") == []  # the warm-up is fresh enough
        made._dispatch.last_scored = None
        probes = await asyncio.gather(*(made.ready() for _ in range(5)))
        assert all(probe.ready for probe in probes)
        assert len(ears.of("StepFinished")) == 1
        made._keepers[0].up = False
        assert "no worker is up" in (await made.ready()).reason

    run(main, service(ears=ears))
    assert not asyncio.run(service().ready()).ready


def test_a_listener_that_raises_harms_nobody(caplog):
    class Deaf(Silence):
        def step_finished(self, event):
            raise RuntimeError("no metrics today")

        def request_ended(self, event: RequestEnded):
            raise RuntimeError("none at all")

    async def main(made):
        assert len((await made.submit(texts(1))).logits) == 5

    run(main, service(ears=Deaf()))
    assert "This is a bug in it" in caplog.text


@pytest.mark.parametrize("field", ["workers", "token_budget", "max_pairs", "max_length"])
def test_settings_that_make_no_sense(field):
    with pytest.raises(InvalidInput) as caught:
        Settings(**{field: 0})
    assert caught.value.field == field
