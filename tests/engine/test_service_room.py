"""A lone pair that finds no room: a fresh process is tried, once, before anybody is refused."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
from scorers import worn
from services import Ears, run, scores, service, texts, until

from echelon.engine.child import PRIMITIVES
from echelon.engine.supervisor import WorkerConfig
from echelon.errors import OutOfMemory
from echelon.models.fake import FakeScorer
from echelon.scheduling.oom_policy import OomPolicy
from echelon.scheduling.queue import PlannedStep

FACTS = FakeScorer().info
LONG = [("q", "d" * 300)]
USUAL = [("q", "d" * 60)]
"""Pairs that do not fit anywhere, and that do not fit in a process that has met one of those."""


def tired(folder, ears, broken=(), **settings):
    opener = partial(worn, str(folder), broken)
    return service(opener, ears=ears, token_budget=200, **settings)


def rungs(answer) -> list:
    return [step.rung for step in answer.ladder]


async def refused(made, words) -> None:
    with pytest.raises(OutOfMemory, match=words):
        await made.submit(LONG)


def test_a_neighbour_of_what_cannot_fit_is_answered_by_a_fresh_process(tmp_path):
    ears = Ears()

    async def main(made):
        await refused(made, r"304 tokens does not fit in the memory of cpu even alone \(")
        assert "renewed" not in ears.states()  # that was a fresh process already
        answer = await made.submit(USUAL)
        assert answer.logits.tolist() == scores(USUAL)
        assert rungs(answer) == ["drop_caches", "fresh_worker"]
        assert rungs(await made.submit(texts(1, 1))) == []

    run(main, tired(tmp_path, ears))
    assert ears.states() == ["starting", "up", "renewed", "up", "stopped"]
    assert [event.step.rung for event in ears.of("LadderTaken")] == [
        "drop_caches", "give_up", "drop_caches", "fresh_worker",
    ]  # fmt: skip


def test_what_a_fresh_process_had_no_room_for_restarts_no_other(tmp_path):
    ears = Ears()

    async def main(made):
        await made.submit(texts(1, 1))
        for _ in range(3):
            await refused(made, "304 tokens")
        assert ears.states().count("renewed") == 1
        answer = await made.submit(USUAL)  # a shorter one may have its try
        assert rungs(answer) == ["drop_caches", "fresh_worker"]

    run(main, tired(tmp_path, ears))
    assert ears.states().count("renewed") == 2


def test_a_refusal_tells_that_a_fresh_process_had_no_room(tmp_path):
    async def main(made):
        await made.submit(texts(1, 1))
        await refused(made, r"even alone in a fresh process \(304 tokens over 200\)")

    run(main, tired(tmp_path, Ears()))


@pytest.mark.parametrize("workers", [1, 2])
def test_all_others_wait_and_none_is_lost(tmp_path, workers):
    ears = Ears()

    async def main(made):
        asked = [texts(seed, 6) for seed in range(12)]
        waiting = [asyncio.ensure_future(made.submit(pairs)) for pairs in asked[:6]]
        waiting.append(asyncio.ensure_future(made.submit(LONG)))
        waiting += [asyncio.ensure_future(made.submit(pairs)) for pairs in asked[6:]]
        *good, bad = await asyncio.gather(
            *waiting[:6], *waiting[7:], waiting[6], return_exceptions=True
        )
        assert isinstance(bad, OutOfMemory)
        for answer, pairs in zip(good, asked, strict=True):
            assert answer.logits.tolist() == scores(pairs)

    run(main, tired(tmp_path, ears, workers=workers))
    assert "renewed" in ears.states()
    assert not {"died", "wedged", "failed"} & set(ears.states())


def test_a_pair_survives_a_fresh_process_that_does_not_come_up(tmp_path, monkeypatch):
    impatient = partial(WorkerConfig, delays_s=(0.0,))
    monkeypatch.setattr("echelon.engine.service.WorkerConfig", impatient)
    ears = Ears()

    async def main(made):
        await refused(made, "304 tokens")
        answer = await made.submit(USUAL)
        assert answer.logits.tolist() == scores(USUAL)

    run(main, tired(tmp_path, ears, broken=(1, 2)))
    assert ears.states() == [
        "starting", "up", "renewed", "failed", "starting", "failed", "starting", "up", "stopped",
    ]  # fmt: skip


def test_a_process_that_begins_after_memory_ran_out_keeps_little(tmp_path, monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    ears = Ears()

    async def main(made):
        await refused(made, "304 tokens")
        os.kill(made._keepers[0]._worker.pid, signal.SIGKILL)
        await until(lambda: ears.states().count("up") == 2)
        await made.submit(texts(1, 1))
        await refused(made, "304 tokens")
        await made.submit(USUAL)

    run(main, tired(tmp_path, ears))
    told = [(tmp_path / str(number)).read_text() for number in range(3)]
    assert told == ["", str(PRIMITIVES), str(PRIMITIVES)]


# What is remembered, asked directly.


def step(*lengths: int) -> PlannedStep:
    places = tuple((number, 0) for number in range(len(lengths)))
    numbers = tuple(range(len(lengths)))
    return PlannedStep(1, places, lengths, numbers, sum(lengths), sum(lengths), 0.1, again=False)


def lacked(room, failed, *taken, fresh=False, renewable=True):
    done = {"drop_caches", *taken}
    return room.lacked(failed, done, FACTS, fresh=fresh, renewable=renewable).rung


def test_a_request_has_one_fresh_process_and_only_where_there_can_be_one():
    room = OomPolicy(())
    assert lacked(room, step(50)) == "fresh_worker"
    assert lacked(room, step(50), "fresh_worker") == "give_up"
    assert lacked(room, step(50), renewable=False) == "give_up"
    assert lacked(room, step(50, 50)) == "one_pair"


def test_no_pair_as_long_as_one_that_a_fresh_process_refused_is_tried_until_one_fits():
    room = OomPolicy(())
    assert lacked(room, step(50), fresh=True) == "give_up"
    assert lacked(room, step(60)) == lacked(room, step(50)) == "give_up"
    assert lacked(room, step(49)) == "fresh_worker"
    room.fitted(step(49, 1))
    assert lacked(room, step(50)) == "give_up"
    room.fitted(step(1, 50))
    assert lacked(room, step(60)) == "fresh_worker"


def test_a_step_of_several_pairs_says_nothing_of_one_alone():
    room = OomPolicy(())
    assert lacked(room, step(50, 50), fresh=True) == "one_pair"
    assert lacked(room, step(50)) == "fresh_worker"
