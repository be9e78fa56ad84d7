"""Devices that fail for good: their process is replaced, and no accepted request is lost."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from scorers import Poisoned
from services import RecordingListener, encoded, run, scores, service, submit, texts, until

from echelon.engine.child import LOST
from echelon.engine.engine import Engine, SharedEngine, StepLimits
from echelon.engine.supervisor import WorkerConfig
from echelon.engine.worker import ChildWorker
from echelon.errors import DeviceLost, WorkerLost
from echelon.models.base import WorkerLostDevice

ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be "
    "asynchronously reported at some other API call, so the stacktrace below might be incorrect."
)
WARM_UP = 3
"""Steps that a service scores before a worker is up."""


def test_a_child_whose_device_failed_ends_at_once():
    worker = ChildWorker(partial(Poisoned, ILLEGAL, 2))
    worker.start("fp32")
    batch = encoded(texts(1)).batch([0])
    assert worker.score(batch, 60.0).logits.tolist() == scores(texts(1))[:1]
    with pytest.raises(WorkerLostDevice, match=r"illegal memory access was encountered\)$"):
        worker.score(batch, 60.0)
    assert worker._process.wait(60.0) == LOST
    worker.stop()


def test_a_service_replaces_it_and_scores_its_step_again():
    listener = RecordingListener()

    async def main(made):
        for seed in range(4):  # the second step after the warm-up is the last of its process
            answer = await submit(made, texts(seed))
            assert answer.logits.tolist() == scores(texts(seed))
        died = [e.detail for e in listener.of("WorkerChanged") if e.state == "died"]
        assert len(died) == 3
        assert all("illegal memory access" in detail for detail in died)
        await until(lambda: made._supervisors[0].up)
        assert (await made.ready()).ready

    run(main, service(partial(Poisoned, ILLEGAL, WARM_UP + 2), listener=listener))


def test_a_bad_card_of_two_fails_no_request():
    listener = RecordingListener()

    async def main(made):
        answers = await asyncio.gather(*(submit(made, texts(seed, 9)) for seed in range(80)))
        for seed, answer in enumerate(answers):
            assert answer.logits.tolist() == scores(texts(seed, 9))
        assert (await made.ready()).ready

    bad = partial(Poisoned, ILLEGAL, WARM_UP + 1)  # it warms up, and no other step works
    good = partial(Poisoned, ILLEGAL, 10**9, pace_s=2e-5)
    made = service(bad, others=good, workers=2, listener=listener, token_budget=200)
    run(main, made)
    assert "died" in listener.states()


def test_a_step_that_fails_every_device_fails_alone():
    async def main(made):
        with pytest.raises(WorkerLost, match="ended twice"):
            await submit(made, texts(1))

    run(main, service(partial(Poisoned, ILLEGAL, WARM_UP + 1)))


def test_a_card_that_stays_away_makes_the_service_unready(monkeypatch):
    """Restarts fail in the warm-up: nothing is up, and requests are told so."""
    impatient = partial(WorkerConfig, delays_s=(0.0,))
    monkeypatch.setattr("echelon.engine.service.WorkerConfig", impatient)

    async def main(made):
        made._supervisors[0]._worker._opener = partial(Poisoned, ILLEGAL, 1)
        with pytest.raises(WorkerLost, match="illegal memory access"):
            await submit(made, texts(1))
        readiness = await made.ready()
        assert not readiness.ready
        assert "illegal memory access" in readiness.reason

    run(main, service(partial(Poisoned, ILLEGAL, WARM_UP + 1)))


def limits():
    return StepLimits(budget=1000)


def test_in_process_the_error_says_restart_the_process():
    engine = Engine(Poisoned(ILLEGAL, 2), limits())
    assert engine.run(encoded(texts(1))).logits.tolist() == scores(texts(1))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="Restart the process") as caught:
            engine.run(encoded(texts(1)))
        assert "illegal memory access was encountered)" in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
    engine.close()


def test_calls_that_share_steps_get_it_too():
    async def main():
        shared = SharedEngine(Engine(Poisoned(ILLEGAL, 1), limits()), limits())
        try:
            async with asyncio.timeout(60):
                with pytest.raises(DeviceLost, match="Restart the process"):
                    await shared.score(encoded(texts(1)))
        finally:
            shared.close()

    asyncio.run(main())
