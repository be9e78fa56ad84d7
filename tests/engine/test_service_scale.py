"""Workers are added and removed while the service runs; no request notices."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

from scorers import Obedient, opens_once
from services import LetterEncoder, RecordingListener, run, scores, service, submit, texts, until

from echelon.engine.events import ServiceSettings
from echelon.engine.service import Service
from echelon.engine.worker import ChildWorker
from echelon.errors import ModelNotFound
from echelon.models.base import WorkerDied, WorkerGone
from echelon.scheduling.autoscaling import AutoscalingLimits

slow = partial(Obedient, pace_s=0.00002)


async def answered(made, seeds) -> None:
    answers = await asyncio.gather(*(submit(made, texts(seed, 20)) for seed in seeds))
    for seed, answer in zip(seeds, answers, strict=True):
        assert answer.logits.tolist() == scores(texts(seed, 20))


def test_workers_come_and_go_under_load():
    listener = RecordingListener()

    async def main(made):
        load = asyncio.create_task(answered(made, range(60)))
        await until(lambda: listener.of("StepFinished"))
        made.resize(3)
        await until(lambda: made.snapshot().workers_up == 3)
        made.resize(1)
        await load
        await until(lambda: len(made._supervisors) == 1 or not made._supervisors[-1].is_alive())
        assert made.snapshot().workers == made.snapshot().workers_up == 1
        await answered(made, range(60, 63))

    run(main, service(slow, listener=listener, token_budget=1500))
    assert "died" not in listener.states()
    assert listener.states().count("stopped") == 3


def test_a_drained_worker_finishes_its_steps():
    listener = RecordingListener()

    async def main(made):
        load = asyncio.create_task(answered(made, range(40)))
        await until(lambda: {step.worker for step in listener.of("StepFinished")} == {0, 1})
        made.resize(1)
        await load

    run(main, service(slow, listener=listener, workers=2, token_budget=1500))
    assert not any(step.again for step in listener.of("StepFinished"))


def test_the_steps_of_a_worker_that_dies_while_draining_are_scored_by_others():
    listener = RecordingListener()

    async def main(made):
        load = asyncio.create_task(answered(made, range(40)))
        await until(lambda: {step.worker for step in listener.of("StepFinished")} == {0, 1})
        supervisor = made._supervisors[1]
        os.kill(supervisor._worker.pid, signal.SIGSTOP)
        await until(lambda: supervisor._sent)
        made.resize(1)
        os.kill(supervisor._worker.pid, signal.SIGKILL)
        await load
        assert made.snapshot().workers == 1

    run(main, service(slow, listener=listener, workers=2, token_budget=1500))


def test_a_worker_that_cannot_be_added_leaves_the_others_alone(tmp_path):
    async def main(made):
        (started,) = made.resize(2)
        assert isinstance(await started, ModelNotFound)
        await until(lambda: made.snapshot().workers == 1)
        await answered(made, range(3))

    run(main, service(partial(opens_once, str(tmp_path))))


def test_a_delay_adds_workers_and_idle_time_removes_them():
    listener = RecordingListener()
    scaling = AutoscalingLimits(1, 2, delay_s=0.01, up_s=0.01, down_s=0.5)

    async def main(made):
        async def load():
            while made.snapshot().workers_up < 2:
                await answered(made, range(30))

        await load()
        await until(lambda: made.snapshot().workers == 1)
        await answered(made, range(3))

    run(main, service(slow, listener=listener, scaling=scaling, token_budget=1500))


class Gone(ChildWorker):
    """Its machine goes in the middle of certain steps, warm-up steps counted."""

    steps, goes = 0, (4, 8)  # three warm-up steps come before each

    def receive(self, timeout_s):
        Gone.steps += 1
        if Gone.steps in self.goes:
            self.kill()
            raise WorkerGone("the machine has gone")
        return super().receive(timeout_s)


def test_a_lost_machine_is_not_blamed_on_the_pairs():
    """One pair may lose more machines than workers: its step is taken back, not tried again."""
    assert issubclass(WorkerGone, WorkerDied)
    listener = RecordingListener()
    made = Service(
        LetterEncoder(),
        lambda number, ended: Gone(Obedient, on_end=ended),
        ServiceSettings(precision="fp32"),
        listener=listener,
    )

    async def main(made):
        answer = await submit(made, texts(1, 3))
        assert answer.logits.tolist() == scores(texts(1, 3))

    run(main, made)
    assert listener.states().count("died") == 2
