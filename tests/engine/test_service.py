"""The service with real child processes and a scorer without weights: nothing accepted is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
import scorers
from scorers import Obedient, Paced
from services import GUARD_S, RecordingListener, coded, run, scores, service, submit, texts, until

from echelon.engine.events import Listener, RequestEnded, ServiceSettings
from echelon.errors import (
    DeadlinePassed,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    ShuttingDown,
    TooLarge,
    WorkerLost,
)
from echelon.scheduling.admission import AdmissionLimits


def test_answers_are_the_scorers_own_under_concurrency():
    listener = RecordingListener()

    async def main(made):
        answers = await asyncio.gather(*(submit(made, texts(seed)) for seed in range(40)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed))
            assert answer.truncated_tokens.tolist() == [0] * 5
            assert answer.tokens == sum(len(q) + len(d) + 3 for q, d in texts(seed))
            assert answer.timings.total_s >= answer.timings.queue_s >= 0
            assert len(answer.batch_sizes) >= 1
        assert max(size for answer in answers for size in answer.batch_sizes) > 5
        snapshot = made.snapshot()
        assert (snapshot.requests, snapshot.load.tokens, snapshot.workers_up) == (0, 0, 1)

    run(main, service(listener=listener))
    steps = listener.of("StepFinished")
    assert sum(step.pairs for step in steps) == 200
    assert all(step.predicted_s > 0 for step in steps)
    assert [event.outcome for event in listener.of("RequestEnded")] == ["answered"] * 40
    states = listener.states()
    assert states == ["starting", "up", "stopped"]


def test_no_pairs_give_an_empty_answer():
    async def main(made):
        answer = await submit(made, [])
        assert answer.logits.shape == answer.truncated_tokens.shape == (0,)

    run(main, service())


def test_identical_pairs_in_flight_are_scored_once():
    listener = RecordingListener()

    async def main(made):
        answers = await asyncio.gather(*(submit(made, texts(1)) for _ in range(10)))
        assert all(answer.logits.tolist() == scores(texts(1)) for answer in answers)

    run(main, service(listener=listener))
    assert sum(step.pairs for step in listener.of("StepFinished")) < 50


def test_truncation_is_reported():
    async def main(made):
        answer = await submit(made, [("query", "d" * 100), ("query", "d")])
        assert answer.truncated_tokens.tolist() == [100 + 5 + 3 - 60, 0]
        wider = await submit(made, [("query", "d" * 100)], max_length=512)
        assert wider.truncated_tokens.tolist() == [0]
        with pytest.raises(InvalidInput, match="beyond the model's 512"):
            await submit(made, [("query", "d")], max_length=513)

    run(main, service(max_length=60))


def test_bad_input_names_the_document():
    async def main(made):
        with pytest.raises(InvalidInput, match=r"pairs\[1\]"):
            await submit(made, [("q", "d"), None])
        pairs = texts(1, 100)
        pairs[70] = ("query", None)
        with pytest.raises(InvalidInput, match=r"pairs\[70\]\.document: is NoneType"):
            await submit(made, pairs)
        assert made.snapshot().requests == 0

    run(main, service())


def test_several_workers_share_one_queue():
    listener = RecordingListener()

    async def main(made):
        answers = await asyncio.gather(*(submit(made, texts(seed, 20)) for seed in range(30)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed, 20))

    run(
        main,
        service(partial(Obedient, pace_s=0.00003), listener=listener, workers=2, token_budget=300),
    )
    assert {step.worker for step in listener.of("StepFinished")} == {0, 1}


# Overload and deadlines.


def test_a_full_service_refuses_whole_requests_and_serves_the_others():
    listener = RecordingListener()
    bounds = AdmissionLimits(max_requests=4)

    async def main(made):
        answers = await asyncio.gather(
            *(submit(made, texts(seed)) for seed in range(12)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        served = [answer for answer in answers if not isinstance(answer, Exception)]
        assert (len(served), len(refused)) == (4, 8)
        assert all(error.retry_after_s > 0 for error in refused)
        assert (await submit(made, texts(1))).logits.tolist() == scores(texts(1))
        with pytest.raises(TooLarge):
            await submit(made, [("q", "d")] * 10_001)

    run(main, service(listener=listener, bounds=bounds))
    assert {event.reason for event in listener.of("RequestRefused")} == {
        "requests_full",
        "too_many_documents",
    }


def test_a_deadline_that_cannot_be_met_costs_no_step():
    listener = RecordingListener()

    async def main(made):
        with pytest.raises(DeadlinePassed, match="even on an idle server"):
            await submit(made, texts(1, 1000), deadline=made.clock() + 0.5)
        with pytest.raises(DeadlinePassed):
            await submit(made, texts(1), deadline=made.clock())

    run(main, service(partial(Obedient, pace_s=0.0001), listener=listener))
    assert listener.of("StepFinished") == []


def test_a_deadline_that_passes_in_the_queue_takes_the_request_out():
    listener = RecordingListener()

    async def main(made):
        hanging = asyncio.create_task(submit(made, coded(scorers.HANG)))
        await until(lambda: made.snapshot().load.running_s)
        with pytest.raises(DeadlinePassed, match="while the request waited"):
            await submit(made, texts(1), deadline=made.clock() + 0.3)
        assert made.snapshot().load.tokens == 0
        hanging.cancel()
        await asyncio.wait([hanging])

    run(main, service(listener=listener))
    assert len(listener.of("StepFinished")) == 0
    assert [event.outcome for event in listener.of("RequestEnded")] == ["expired", "cancelled"]


def test_a_cancelled_request_leaves_the_queue():
    listener = RecordingListener()

    async def main(made):
        gone = [asyncio.create_task(submit(made, texts(seed, 50))) for seed in range(5)]
        await until(lambda: made.snapshot().load.requests == 5)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert made.snapshot().load.pairs == 0
        assert (await submit(made, texts(9))).logits.tolist() == scores(texts(9))

    run(main, service(partial(Obedient, pace_s=0.0002), listener=listener, token_budget=100))
    assert sum(step.pairs for step in listener.of("StepFinished")) < 60
    outcomes = [event.outcome for event in listener.of("RequestEnded")]
    assert sorted(outcomes) == ["answered"] + ["cancelled"] * 5


def test_one_document_overtakes_a_thousand():
    listener = RecordingListener()

    async def main(made):
        long = asyncio.create_task(submit(made, texts(1, 1000)))
        await until(lambda: len(listener.of("StepFinished")) >= 3)
        before = len(listener.of("StepFinished"))
        await submit(made, texts(2, 1))
        assert len(listener.of("StepFinished")) - before <= 4
        assert not long.done()
        long.cancel()
        await asyncio.wait([long])

    run(main, service(partial(Obedient, pace_s=0.0001), listener=listener, token_budget=300))


# Start and stop.


def test_a_model_that_cannot_be_opened_says_so():
    async def main():
        made = service(scorers.missing)
        with pytest.raises(ModelNotFound, match="no such folder"):
            await made.start()
        with pytest.raises(WorkerLost, match="ended with exit code 3"):
            await service(scorers.dying, workers=2).start()

    asyncio.run(main())


def test_draining_answers_admitted_requests_and_admits_no_more():
    async def main(made):
        inside = [asyncio.create_task(submit(made, texts(seed, 20))) for seed in range(10)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(made.drain(GUARD_S))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await submit(made, texts(1))
        assert not (await made.ready()).ready
        assert await draining
        answers = [task.result() for task in inside]
        assert all(len(answer.logits) == 20 for answer in answers)

    run(main, service(partial(Obedient, pace_s=0.00002)))


def test_stopping_fails_requests_that_still_wait():
    async def main(made):
        inside = asyncio.create_task(submit(made, coded(scorers.HANG)))
        await until(lambda: made.snapshot().load.running_s)
        assert not await made.drain(0.01)
        await made.stop()
        with pytest.raises(ShuttingDown, match="stopped before the request was done"):
            await inside
        with pytest.raises(ShuttingDown):
            await submit(made, texts(1))
        await made.stop()

    before = threading.active_count()
    run(main, service())
    guard = time.monotonic() + GUARD_S
    while threading.active_count() > before:  # those that only have to notice
        assert time.monotonic() < guard, threading.enumerate()
        time.sleep(0.01)


def test_ready_means_that_a_pair_was_scored():
    listener = RecordingListener()

    async def main(made):
        assert (await made.ready()).ready
        assert listener.of("StepFinished") == []  # the warm-up is fresh enough
        made._dispatcher.last_scored = None
        probes = await asyncio.gather(*(made.ready() for _ in range(5)))
        assert all(probe.ready for probe in probes)
        assert len(listener.of("StepFinished")) == 1
        made._supervisors[0].up = False
        assert "no worker is up" in (await made.ready()).reason

    run(main, service(listener=listener))
    assert not asyncio.run(service().ready()).ready


def test_a_listener_that_raises_fails_no_request(caplog):
    class Deaf(Listener):
        def step_finished(self, event):
            raise RuntimeError("no metrics today")

        def request_ended(self, event: RequestEnded):
            raise RuntimeError("none at all")

    async def main(made):
        assert len((await submit(made, texts(1))).logits) == 5

    run(main, service(listener=Deaf()))
    assert "This is a bug in it" in caplog.text


@pytest.mark.parametrize(
    "field", ["workers", "token_budget", "max_pairs", "max_length", "wedge_after_s"]
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(InvalidInput) as caught:
        ServiceSettings(**{field: 0})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("device", "settings", "share"),
    [
        ("cuda:0", {}, 8),  # far slower than 50 ms for a full step: the least
        ("cpu", {}, 1),
        ("cuda:0", {"token_budget": 16384}, 1),
    ],
)
def test_an_untuned_card_that_is_slow_begins_with_small_steps(device, settings, share):
    async def main(made):
        return made.snapshot().load.budget

    found = run(main, service(partial(Paced, device, 5e-5), **settings))
    assert found == (16384 if settings or device != "cpu" else 2048) // share
