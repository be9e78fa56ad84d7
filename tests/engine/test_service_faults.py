"""The service in trouble, with real child processes: no fault loses what was accepted."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
import scorers
from scorers import Obedient
from services import RecordingListener, coded, run, scores, service, submit, texts, until

from echelon.engine.supervisor import WorkerConfig
from echelon.errors import NonFiniteScore, OutOfMemory, ScoringFailed, WorkerLost

# Memory trouble.


def test_out_of_memory_makes_steps_smaller_and_is_reported():
    listener, learned = RecordingListener(), []

    async def main(made):
        answer = await submit(made, texts(1, 60))
        assert answer.logits.tolist() == scores(texts(1, 60))
        assert [step.rung for step in answer.ladder][:2] == ["drop_caches", "halve_budget"]
        assert made.snapshot().load.budget <= 500
        assert (await submit(made, texts(2, 60))).ladder == ()

    run(main, service(partial(Obedient, 500), listener=listener, learned=learned.append))
    assert learned == sorted(learned, reverse=True)
    assert listener.of("LadderTaken")[-1].budget == learned[-1] <= 500


def test_a_pair_that_fits_nowhere_fails_alone():
    async def main(made):
        good, bad = await asyncio.gather(
            submit(made, texts(1, 3)), submit(made, [("q", "d" * 300)]), return_exceptions=True
        )
        assert good.logits.tolist() == scores(texts(1, 3))
        assert isinstance(bad, OutOfMemory)
        assert "304 tokens" in str(bad)

    run(main, service(partial(Obedient, 200)))


def test_what_is_allowed_may_be_given_up():
    async def main(made):
        answer = await submit(made, [("q", "d" * 300)])
        assert answer.ladder[-1].rung == "shorten"
        assert answer.truncated_tokens.tolist() == [152]

    run(main, service(partial(Obedient, 200), allow=("max_length",)))

    async def halved(made):
        answer = await submit(made, [("q", "d" * 300)])
        assert answer.ladder[-1].rung == "lower_precision"
        assert made.info.precision == "bf16"

    run(halved, service(partial(Obedient, 200), allow=("precision",)))


# Workers that die.


def test_a_killed_worker_under_load_loses_nothing():
    listener = RecordingListener()

    async def main(made):
        async def kill():
            for goal, ups in ((3, 2), (10, 3)):
                await until(lambda goal=goal: len(listener.of("StepFinished")) >= goal)
                os.kill(made._supervisors[0]._worker.pid, signal.SIGKILL)
                await until(lambda ups=ups: listener.states().count("up") == ups)

        killing = asyncio.create_task(kill())
        answers = await asyncio.gather(*(submit(made, texts(seed, 20)) for seed in range(60)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed, 20))
        await killing

    run(main, service(partial(Obedient, pace_s=0.00002), listener=listener, token_budget=1500))
    assert listener.states().count("died") == 2
    assert any(step.again for step in listener.of("StepFinished"))


def test_a_worker_that_dies_in_a_step_is_given_it_once_more(tmp_path):
    listener = RecordingListener()

    async def main(made):
        first, other = await asyncio.gather(
            submit(made, coded(scorers.MARK)), submit(made, texts(1))
        )
        assert first.logits.tolist() == scores(coded(scorers.MARK))
        assert other.logits.tolist() == scores(texts(1))

    run(main, service(partial(Obedient, marks=str(tmp_path)), listener=listener))
    assert listener.states() == [
        "starting", "up", "died", "starting", "up", "stopped",
    ]  # fmt: skip


def test_a_pair_that_kills_workers_fails_no_other_request():
    async def main(made):
        answers = await asyncio.gather(
            *(submit(made, texts(seed)) for seed in range(5)),
            submit(made, coded(scorers.KILL)),
            return_exceptions=True,
        )
        for seed, answer in enumerate(answers[:5]):
            assert answer.logits.tolist() == scores(texts(seed))
        assert isinstance(answers[5], WorkerLost)
        assert str(answers[5]).startswith("pairs[0]: ")

    run(main, service())


def test_a_wedged_worker_is_replaced():
    listener = RecordingListener()

    async def main(made):
        answers = await asyncio.gather(
            submit(made, coded(scorers.STOP)), submit(made, texts(1)), return_exceptions=True
        )
        assert isinstance(answers[0], WorkerLost)
        assert answers[1].logits.tolist() == scores(texts(1))

    run(main, service(listener=listener, wedge_after_s=0.5))
    assert listener.states().count("wedged") == 2


def test_an_idle_worker_that_dies_is_replaced_at_once():
    listener = RecordingListener()

    async def main(made):
        os.kill(made._supervisors[0]._worker.pid, signal.SIGKILL)
        await until(lambda: listener.states().count("up") == 2)
        assert (await submit(made, texts(1))).logits.tolist() == scores(texts(1))

    run(main, service(listener=listener))


def test_a_worker_that_grows_is_replaced_between_steps():
    listener = RecordingListener()
    limit = 250 * scorers.MEBIBYTE  # a new worker holds less than 100, and each request adds 128

    async def main(made):
        for _ in range(4):
            assert len((await submit(made, coded(scorers.GROW, 1))).logits) == 1

    run(main, service(listener=listener, memory_limit_bytes=limit))
    states = listener.states()
    assert "recycled" in states
    assert "died" not in states


def test_a_memory_limit_below_every_worker_is_not_applied(caplog):
    async def main(made):
        assert len((await submit(made, texts(1))).logits) == 5

    run(main, service(memory_limit_bytes=1000))
    assert "set it to twice as much" in caplog.text


def test_errors_of_the_scorer_are_of_that_request_only():
    async def main(made):
        for deed, kind in ((scorers.RAISE, ScoringFailed), (scorers.NAN, NonFiniteScore)):
            *good, bad = await asyncio.gather(
                *(submit(made, texts(seed)) for seed in range(3)),
                submit(made, coded(deed)),
                return_exceptions=True,
            )
            assert isinstance(bad, kind)
            for seed, answer in enumerate(good):
                assert answer.logits.tolist() == scores(texts(seed))

    run(main, service())


def test_requests_fail_at_once_where_no_worker_can_be_started(tmp_path, monkeypatch):
    impatient = partial(WorkerConfig, delays_s=(0.0,))
    monkeypatch.setattr("echelon.engine.service.WorkerConfig", impatient)
    listener = RecordingListener()

    async def main(made):
        os.kill(made._supervisors[0]._worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="it was deleted"):
            await submit(made, coded(scorers.HANG))
        with pytest.raises(WorkerLost, match="No scoring process can be started"):
            await submit(made, texts(1))
        assert "it was deleted" in (await made.ready()).reason

    run(main, service(partial(scorers.opens_once, str(tmp_path)), listener=listener))
    assert listener.states().count("failed") >= 4
