"""Commands on cards made of shims; each worker of ``serve`` is a child with cards of its own."""

from __future__ import annotations

import json

import httpx
import pytest
import shim_card
from helpers import SENTENCES, run_command
from served import KEY, QUERY, Live

from echelon import Reranker


@pytest.fixture(scope="module")
def folder(native):
    return native("bert").folder


@pytest.fixture(scope="module")
def expected(folder):
    """Scores by document, in fp32 on CPU."""
    with Reranker(folder, device="cpu", precision="fp32", threads=1) as exact:
        return {r.index: r.score for r in exact.rank(QUERY, SENTENCES).results}


def test_serve_answers_from_two_cards(folder, expected, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n", "utf-8")
    given = ("--device", "cuda", "--workers", 2, "--precision", "fp32", "--api-keys", keys)
    asked = {"query": QUERY, "documents": list(SENTENCES)}
    headers = {"Authorization": f"Bearer {KEY}"}
    with Live(folder, *given, **shim_card.environment(count=2)) as server:
        for _ in range(4):
            url = f"{server.url}/v1/rerank"
            answer = httpx.post(url, json=asked, headers=headers, timeout=60).json()
            found = {r["index"]: r["relevance_score"] for r in answer["results"]}
            assert found == pytest.approx(expected, abs=1e-4)


def test_batch_scores_on_a_card(folder, expected, tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {"query": QUERY, "documents": list(SENTENCES)}
    source.write_text(json.dumps(row) + "\n", "utf-8")
    for name, value in shim_card.environment().items():
        monkeypatch.setenv(name, value)
    given = ("--model", folder, "--device", "cuda", "--precision", "fp32")
    with shim_card.cards() as machine:
        code, _, error = run_command(capsys, monkeypatch, "batch", source, "-o", out, *given)
        assert code == 0, error
        assert machine.counts("copy out")
    (ranked,) = map(json.loads, out.read_text("utf-8").splitlines())
    found = {r["index"]: r["score"] for r in ranked["results"]}
    assert found == pytest.approx(expected, abs=1e-4)
