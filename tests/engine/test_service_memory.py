"""A single pair that does not fit in memory: a fresh process is tried once, then it fails."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
from scorers import worn
from services import RecordingListener, run, scores, service, submit, texts, until

from echelon.engine.child import PRIMITIVES
from echelon.engine.supervisor import WorkerConfig
from echelon.errors import OutOfMemory

LONG = [("q", "d" * 300)]
USUAL = [("q", "d" * 60)]
"""Pairs that do not fit anywhere, and that do not fit in a process that has met one of those."""


def tired(folder, listener, broken=(), **settings):
    opener = partial(worn, str(folder), broken)
    return service(opener, listener=listener, token_budget=200, **settings)


def rungs(answer) -> list:
    return [step.rung for step in answer.ladder]


async def refused(made, words) -> None:
    with pytest.raises(OutOfMemory, match=words):
        await submit(made, LONG)


def test_a_usual_pair_after_one_that_cannot_fit_is_scored_by_a_fresh_process(tmp_path):
    listener = RecordingListener()

    async def main(made):
        await refused(made, r"304 tokens does not fit in the memory of cpu even alone \(")
        assert "renewed" not in listener.states()  # that was a fresh process already
        answer = await submit(made, USUAL)
        assert answer.logits.tolist() == scores(USUAL)
        assert rungs(answer) == ["fresh_worker"]  # caches have just been dropped
        assert rungs(await submit(made, texts(1, 1))) == []

    run(main, tired(tmp_path, listener))
    assert listener.states() == ["starting", "up", "renewed", "up", "stopped"]
    assert [event.step.rung for event in listener.of("LadderTaken")] == [
        "drop_caches", "give_up", "fresh_worker",
    ]  # fmt: skip


def test_a_pair_too_large_for_a_fresh_process_restarts_no_other(tmp_path):
    listener = RecordingListener()

    async def main(made):
        await submit(made, texts(1, 1))
        for _ in range(3):
            await refused(made, "304 tokens")
        assert listener.states().count("renewed") == 1
        answer = await submit(made, USUAL)  # a shorter one may have its try
        assert rungs(answer) == ["fresh_worker"]  # caches have just been dropped

    run(main, tired(tmp_path, listener))
    assert listener.states().count("renewed") == 2


def test_the_error_says_that_a_fresh_process_was_tried(tmp_path):
    async def main(made):
        await submit(made, texts(1, 1))
        await refused(made, r"even alone in a fresh process \(304 tokens over 200\)")

    run(main, tired(tmp_path, RecordingListener()))


@pytest.mark.parametrize("workers", [1, 2])
def test_all_others_wait_and_none_is_lost(tmp_path, workers):
    listener = RecordingListener()

    async def main(made):
        asked = [texts(seed, 6) for seed in range(12)]
        waiting = [asyncio.ensure_future(submit(made, pairs)) for pairs in asked[:6]]
        waiting.append(asyncio.ensure_future(submit(made, LONG)))
        waiting += [asyncio.ensure_future(submit(made, pairs)) for pairs in asked[6:]]
        *good, bad = await asyncio.gather(
            *waiting[:6], *waiting[7:], waiting[6], return_exceptions=True
        )
        assert isinstance(bad, OutOfMemory)
        for answer, pairs in zip(good, asked, strict=True):
            assert answer.logits.tolist() == scores(pairs)

    run(main, tired(tmp_path, listener, workers=workers))
    assert "renewed" in listener.states()
    assert not {"died", "wedged", "failed"} & set(listener.states())


def test_a_pair_survives_a_fresh_process_that_does_not_come_up(tmp_path, monkeypatch):
    impatient = partial(WorkerConfig, delays_s=(0.0,))
    monkeypatch.setattr("echelon.engine.service.WorkerConfig", impatient)
    listener = RecordingListener()

    async def main(made):
        await refused(made, "304 tokens")
        answer = await submit(made, USUAL)
        assert answer.logits.tolist() == scores(USUAL)

    run(main, tired(tmp_path, listener, broken=(1, 2)))
    assert listener.states() == [
        "starting", "up", "renewed", "failed", "starting", "failed", "starting", "up", "stopped",
    ]  # fmt: skip


def test_a_process_started_after_out_of_memory_caches_little(tmp_path, monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    listener = RecordingListener()

    async def main(made):
        await refused(made, "304 tokens")
        os.kill(made._supervisors[0]._worker.pid, signal.SIGKILL)
        await until(lambda: listener.states().count("up") == 2)
        await submit(made, texts(1, 1))
        await refused(made, "304 tokens")
        await submit(made, USUAL)

    run(main, tired(tmp_path, listener))
    found = [(tmp_path / str(number)).read_text() for number in range(3)]
    assert found == ["", str(PRIMITIVES), str(PRIMITIVES)]
