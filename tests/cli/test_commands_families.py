"""All commands on models of the newer families: a ModernBERT, and a language model."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
from helpers import SENTENCES, run_command, save_tokenizer, vocabulary_of
from language_models import make_language_model
from served import Live

from echelon import Reranker

if TYPE_CHECKING:
    from pathlib import Path

QUERY = "does it rain?"
INSTRUCTION = "Judge the weather."
NAMES = ("modernbert", "Qwen3-Reranker")
SHORT = ("--max-length", 380, "--precision", "fp32", "--threads", 1, "--device", "cpu")
QUICK = ("--pairs", "4,8", "--batch-sizes", "1,4", "--token-budgets", "256", "--time-limit", 2)
CALM = {"OMP_NUM_THREADS": "1"}


def make_modernbert(folder: Path) -> Path:
    """A tiny ModernBERT whose window is shorter than the pairs."""
    import transformers

    save_tokenizer(folder, "bert")
    config = transformers.ModernBertConfig(
        vocab_size=vocabulary_of(folder),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=400,
        local_attention=16,
        num_labels=1,
        classifier_pooling="mean",
        pad_token_id=0,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
    )
    torch.manual_seed(2)
    model = transformers.ModernBertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    made = (
        make_modernbert(home / NAMES[0]),
        make_language_model(home / NAMES[1], "qwen3", max_position_embeddings=400),
    )
    return dict(zip(NAMES, made, strict=True))


@pytest.fixture
def call(capsys, monkeypatch):
    def run(*arguments: object) -> tuple[int, str, str]:
        return run_command(capsys, monkeypatch, *arguments)

    return run


def asked_of(name: str) -> tuple[object, ...]:
    """The instruction, of the model that reads one."""
    return () if name == "modernbert" else ("--instruction", INSTRUCTION)


def logits(folder: Path, name: str, documents: list[str]) -> np.ndarray:
    """What the library says, whose scores are compared with the originals elsewhere."""
    own: Any = {"instruction": INSTRUCTION} if asked_of(name) else {}
    with Reranker(folder, device="cpu", precision="fp32", max_length=380, **own) as reranker:
        return reranker.score([(QUERY, document) for document in documents])


@pytest.mark.parametrize("name", NAMES)
def test_tune_then_rank_and_plan_with_its_profile(folders, name, call, tmp_path):
    folder, profile = folders[name], tmp_path / "p.json"
    data = tmp_path / "data.jsonl"
    rows = [{"query": f"{QUERY} {i}", "documents": SENTENCES[i : i + 4]} for i in range(3)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    paths = ("--data", data, "--profile", profile, "--report", tmp_path / "r.html")
    code, out, err = call("tune", folder, *QUICK, *SHORT, *asked_of(name), *paths, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["key"]["precision"] == "fp32"
    assert any(point["status"] == "ok" for point in found["points"])
    assert found["cost"]["coefficients"]
    goal = ("--slo-p99-ms", 5000, "--rate", 0.5, "--documents", 3)
    code, out, err = call("plan", *goal, "--profile", profile, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["kind"] == "plan"
    texts = SENTENCES[:5]
    options = ("--model", folder, *SHORT, *asked_of(name), "--profile", profile)
    code, out, err = call("rank", QUERY, *texts, *options, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    expected = logits(folder, name, texts)
    ranked = {row["index"]: row["logit"] for row in results}
    np.testing.assert_allclose([ranked[i] for i in range(5)], expected, rtol=0, atol=1e-4)
    assert [row["index"] for row in results] == np.argsort(-expected).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_batch(folders, name, call, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": "a", "query": QUERY, "documents": SENTENCES[:4]}]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    options = ("--model", folders[name], *SHORT, *asked_of(name), "--quiet")
    code, _, err = call("batch", source, "-o", output, *options)
    assert code == 0, err
    (line,) = [json.loads(text) for text in output.read_text("utf-8").splitlines()]
    found = {row["index"]: row["logit"] for row in line["results"]}
    expected = logits(folders[name], name, SENTENCES[:4])
    np.testing.assert_allclose([found[i] for i in range(4)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_serve(folders, name):
    body = {"query": QUERY, "documents": SENTENCES[:4], "raw_scores": True}
    told = {**body, "instruction": INSTRUCTION}
    expected = logits(folders[name], name, SENTENCES[:4])
    with Live(folders[name], *SHORT, **CALM) as live:
        if name == "modernbert":
            answer = httpx.post(f"{live.url}/v1/rerank", json=told, timeout=60)
            assert answer.status_code == 422
            assert "classifier and reads none" in answer.text
            told = body
        answer = httpx.post(f"{live.url}/v1/rerank", json=told, timeout=60)
        assert answer.status_code == 200, answer.text
        assert live.end(signal.SIGTERM) == 0
    found = {row["index"]: row["relevance_score"] for row in answer.json()["results"]}
    shown = [found[i] for i in range(4)]
    assert np.argsort(shown).tolist() == np.argsort(expected).tolist()
    np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("command", ["rank", "tune", "batch", "serve"])
def test_an_instruction_for_a_modernbert_is_refused_at_once(folders, command, call, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"query": QUERY, "documents": ["a"]}) + "\n", "utf-8")
    folder = folders["modernbert"]
    arguments = {
        "rank": ("rank", QUERY, "a", "--model", folder),
        "tune": ("tune", folder, *QUICK, "--profile", tmp_path / "p", "--report", tmp_path / "r"),
        "batch": ("batch", source, "-o", tmp_path / "out.jsonl", "--model", folder),
        "serve": ("serve", folder, "--port", 0),
    }[command]
    code, out, err = call(*arguments, "--instruction", INSTRUCTION)
    assert (code, out) == (2, "")
    assert "instruction: this model is a classifier and reads none" in err
    assert "language model such as" in err
    assert "Traceback" not in err
