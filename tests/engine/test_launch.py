"""A service for a real model: the scores of the library, out of another process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SENTENCES
from scorers import placed
from services import submit

from echelon import InvalidInput, ModelNotFound, Reranker
from echelon.engine.launch import _worker, launch, prepare, threads_of
from echelon.options import Options

PAIRS = [("rain at the kitchen window", sentence) for sentence in SENTENCES]


def test_the_same_scores_as_the_library(bert):
    with Reranker(bert, device="cpu", threads=1) as reranker:
        expected = reranker.score_pairs(PAIRS)

    async def main():
        service = await launch(bert, device="cpu", threads=1, token_budget=200, wedge_after_s=45.0)
        try:
            answers = await asyncio.gather(*(submit(service, PAIRS) for _ in range(3)))
            assert service.info.family == "bert"
            assert service.longest() == 130
            assert service.settings.wedge_after_s == 45.0
        finally:
            await service.stop()
        for answer in answers:
            assert answer.logits.tolist() == pytest.approx(expected.logits.tolist(), abs=1e-4)
            assert answer.truncated_tokens.tolist() == expected.truncated_tokens.tolist()
            assert answer.tokens == expected.report.tokens

    asyncio.run(main())


def test_what_cannot_be_launched_says_why(tmp_path):
    with pytest.raises(InvalidInput, match="unknown option"):
        asyncio.run(launch("demo", bach_size=3))
    with pytest.raises(ModelNotFound):
        asyncio.run(launch(tmp_path))
    with pytest.raises(InvalidInput, match="workers: 0 is not positive"):
        asyncio.run(launch("demo", workers=0))


def test_workers_open_the_model_where_they_are_told(bert):
    options = Options(device="cpu", threads=2)
    opener = prepare(bert, options, None).opener
    assert (
        opener("cuda:1", 3).keywords | {"device": "cuda:1", "threads": 3}
        == opener("cuda:1", 3).keywords
    )
    assert (opener().keywords["device"], opener().keywords["threads"]) == ("cpu", 2)


def test_workers_share_the_machine(monkeypatch):
    monkeypatch.setattr("echelon.engine.launch.usable_cpus", lambda: 8)
    assert [threads_of(None, workers) for workers in (1, 2, 3, 16)] == [None, 4, 2, 1]
    assert threads_of(5, 2) == 5


def test_each_worker_process_sees_its_card_alone(bert, monkeypatch):
    """Real processes, and torch as it is with two cards."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    prepared = prepare(bert, Options(device="cpu"), None)
    prepared = replace(prepared, options=replace(prepared.options, device="auto"))
    monkeypatch.setattr("echelon.engine.launch.scorer_factory", factory)
    found = []
    for number in range(3):
        worker = _worker(prepared, 3, number, lambda: None)
        found.append(worker.start("fp32").device_name)
        worker.stop()
    assert found == ["auto of 5", "auto of 3", "auto of 5"]


def factory(folder, options, keep_bf16):
    return partial(placed, device=options.device)
