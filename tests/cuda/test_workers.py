"""Workers on cards made of shims: a process ends with its card, and requests do not."""

from __future__ import annotations

import asyncio

import pytest
import shim_card
from helpers import SENTENCES
from services import RecordingListener, submit, until
from shim_card.faults import Fault

from echelon import Reranker
from echelon.engine.launch import launch
from echelon.errors import DeviceLost

PAIRS = [("rain at the kitchen window", sentence) for sentence in SENTENCES]
TOLERANCE = 1e-4


@pytest.fixture
def expected(bert):
    with Reranker(bert, device="cpu", precision="fp32", threads=1) as reranker:
        return pytest.approx(reranker.score_pairs(PAIRS).logits.tolist(), abs=TOLERANCE)


@pytest.fixture
def children(monkeypatch):
    """Give child processes, and this process, the cards of a machine."""

    def use(*, graphs=False, **settings):
        for name, value in shim_card.environment(**settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(str(shim_card.HERE / "site"))  # children get our path
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if not graphs:  # to capture them takes the shim many seconds
            monkeypatch.setenv("ECHELON_CUDA_GRAPHS", "off")
        return shim_card.cards(count=settings.get("count", 1))

    return use


def served(bert, main, **options):
    async def guarded():
        async with asyncio.timeout(300):
            service = await launch(bert, precision="fp32", token_budget=200, **options)
            try:
                return await main(service)
            finally:
                await service.stop()

    return asyncio.run(guarded())


@pytest.mark.parametrize("words", ["illegal access", "ecc"])
def test_a_lost_card_costs_a_process_and_no_request(bert, children, expected, tmp_path, words):
    flag, listener = tmp_path / "now", RecordingListener()

    async def main(service):
        assert service.info.device == "cuda:0"
        assert (await submit(service, PAIRS)).logits.tolist() == expected
        flag.touch()
        answers = await asyncio.gather(*(submit(service, PAIRS) for _ in range(4)))
        assert all(answer.logits.tolist() == expected for answer in answers)
        assert not flag.exists()

    fault = {"words": words, "at": "copy", "flag": str(flag)}
    with children(faults=[fault]):
        served(bert, main, listener=listener)
    assert listener.states().count("died") == 1


def test_a_card_of_two_that_is_lost_again_and_again_fails_no_request(
    bert, children, expected, tmp_path
):
    flag, listener = tmp_path / "now", RecordingListener()

    async def main(service):
        for turn in (1, 2):
            await until(lambda: service.snapshot().workers_up == 2)
            flag.touch()
            while flag.exists():
                answers = await asyncio.gather(*(submit(service, PAIRS) for _ in range(4)))
                assert all(answer.logits.tolist() == expected for answer in answers)
            await until(lambda turn=turn: listener.states().count("died") == turn)
        died = {e.worker for e in listener.of("WorkerChanged") if e.state == "died"}
        assert died == {0}

    fault = {"words": "illegal access", "at": "copy", "card": 0, "times": 99, "flag": str(flag)}
    with children(count=2, faults=[fault]):
        served(bert, main, listener=listener, workers=2, device="auto")


def test_a_capture_that_fails_at_the_start_costs_a_process_and_no_more(bert, children, expected):
    listener = RecordingListener()

    async def main(service):
        first = service._supervisors[0]._worker
        assert first._environment["ECHELON_CUDA_GRAPHS"] == "off"
        for _ in range(3):
            assert (await submit(service, PAIRS)).logits.tolist() == expected

    fault = {"words": "illegal access of a capture", "at": "capture end"}
    with children(graphs=True, faults=[fault]):
        served(bert, main, listener=listener)
    assert listener.states() == ["starting", "up", "stopped"]


def test_in_process_the_error_says_to_restart_the_process(bert, monkeypatch):
    monkeypatch.setenv("ECHELON_CUDA_GRAPHS", "off")
    with (
        shim_card.cards() as machine,
        Reranker(bert, device="cuda", precision="fp32") as reranker,
    ):
        reranker.score_pairs(PAIRS)
        machine.faults.append(Fault("ecc", "copy"))
        for _ in range(2):
            with pytest.raises(DeviceLost, match="Restart the process"):
                reranker.score_pairs(PAIRS)
