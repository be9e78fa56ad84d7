"""The desk between callers and workers, asked directly: no thread, no process."""

from __future__ import annotations

from services import coded, encoded

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import Listener
from echelon.engine.inflight import InflightRequest
from echelon.engine.worker import StepResult
from echelon.models.fake import FakeScorer
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel

FACTS = FakeScorer().info


def desk(answers):
    dispatch = Dispatcher(Batcher(CostModel(), 1), Listener(), lambda: 0.0)
    dispatch.set_up(FACTS, 40, None, None)

    def submit(number, pairs):
        dispatch.submit(
            InflightRequest(
                number, encoded(pairs), lambda told: answers.setdefault(number, told), 0.0
            )
        )

    return dispatch, submit


def scored(dispatch, prepared):
    logits = FakeScorer().score(prepared.batch)
    dispatch.finish(prepared.step, StepResult(logits, 0.01, 0), 0)


def test_a_pair_that_never_fits_ends_though_other_steps_go_well_in_between():
    """A step sent ahead ends well after each failure: that must not begin the ladder anew."""
    answers: dict = {}
    dispatch, submit = desk(answers)
    submit(1, coded(*range(3, 60)))
    rungs = []
    for number in range(2, 12):
        submit(number, coded(number))
        large, ahead = dispatch.take(), dispatch.take()
        while large.step.requests != (1,):  # it has its turn among the others
            scored(dispatch, large)
            large, ahead = ahead, dispatch.take()
        action, _ = dispatch.out_of_memory(large.step, "no room", FACTS)
        rungs.append(action.rung)
        if ahead is not None:
            scored(dispatch, ahead)
        if 1 in answers:
            break
    assert rungs == ["drop_caches", "give_up"]
    assert type(answers[1]).__name__ == "OutOfMemory"


def test_no_answer_waits_for_the_prices_and_each_step_teaches_once():
    answers: dict = {}
    dispatch, submit = desk(answers)
    submit(1, coded(*range(3, 30)))
    before = dispatch.cost.predict([30])
    scored(dispatch, dispatch.take())
    assert 1 in answers
    assert dispatch.cost.predict([30]) == before
    dispatch.learn()
    learned = dispatch.cost.predict([30])
    assert learned != before
    dispatch.learn()
    assert dispatch.cost.predict([30]) == learned
