"""The dispatcher, called directly: no thread, no process."""

from __future__ import annotations

from services import coded, encoded

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import Listener
from echelon.engine.inflight import InflightRequest
from echelon.engine.worker import StepResult
from echelon.models.base import DeviceOutOfMemory, FakeScorer
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel

INFO = FakeScorer().info


def dispatcher_of(answers):
    dispatcher = Dispatcher(Batcher(CostModel(), 1), Listener(), lambda: 0.0)
    dispatcher.set_up(INFO, 40, None, None)

    def submit(number, pairs):
        dispatcher.submit(
            InflightRequest(
                number, encoded(pairs), lambda answer: answers.setdefault(number, answer), 0.0
            )
        )

    return dispatcher, submit


def scored(dispatcher, prepared):
    logits = FakeScorer().score(prepared.batch)
    dispatcher.finish(prepared.step, StepResult(logits, 0.01, 0), 0, "fp32")


def test_a_pair_that_never_fits_ends_though_other_steps_fit_in_between():
    """A step sent ahead fits after each failure: that must not restart the OOM ladder."""
    answers: dict = {}
    dispatcher, submit = dispatcher_of(answers)
    submit(1, coded(*range(3, 60)))
    rungs = []
    for number in range(2, 12):
        submit(number, coded(number))
        large, ahead = dispatcher.take(), dispatcher.take()
        while large.step.requests != (1,):  # it has its turn among the others
            scored(dispatcher, large)
            large, ahead = ahead, dispatcher.take()
        action, _ = dispatcher.out_of_memory(large.step, DeviceOutOfMemory("no room"), INFO)
        rungs.append(action.rung)
        if ahead is not None:
            scored(dispatcher, ahead)
        if 1 in answers:
            break
    assert rungs == ["drop_caches", "give_up"]
    assert type(answers[1]).__name__ == "OutOfMemory"


def test_no_answer_waits_for_the_cost_model_and_each_step_is_learned_once():
    answers: dict = {}
    dispatcher, submit = dispatcher_of(answers)
    submit(1, coded(*range(3, 30)))
    before = dispatcher.cost.predict([30])
    scored(dispatcher, dispatcher.take())
    assert 1 in answers
    assert dispatcher.cost.predict([30]) == before
    dispatcher.learn()
    learned = dispatcher.cost.predict([30])
    assert learned != before
    dispatcher.learn()
    assert dispatcher.cost.predict([30]) == learned


def test_a_lost_step_goes_to_another_worker_while_one_is_up():
    answers: dict = {}
    dispatcher, submit = dispatcher_of(answers)
    for worker in (0, 1):
        dispatcher.report_health(worker, None)
    submit(1, coded(5))
    dispatcher.lost([dispatcher.take(worker=0).step], 0)
    assert dispatcher.take(worker=0) is None
    dispatcher.report_down(1)  # nobody else can take it
    again = dispatcher.take(worker=0)
    dispatcher.put_back([again.step])
    dispatcher.report_health(1, None)
    assert dispatcher.take(worker=0) is None
    dispatcher.set_workers({0})  # the other one was drained
    dispatcher.put_back([dispatcher.take(worker=0).step])
    dispatcher.report_health(1, None)
    scored(dispatcher, dispatcher.take(worker=1))
    assert type(answers[1]).__name__ == "Answer"
