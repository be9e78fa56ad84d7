"""Language models end to end: transformers' scores on the recipe's ids, through every way in."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import SENTENCES
from language_models import make_language_model

from echelon import Reranker
from echelon.cli import cli
from echelon.engine.precision_check import PrecisionCheck
from echelon.errors import InvalidInput, UnsupportedModel
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.families import native_model
from echelon.models.prompts import QWEN3_RERANKER
from echelon.models.registry import model_prompt, open_scorer
from echelon.options import Options
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.calls import TimedCalls
from echelon.tuning.sweep import SweepPoint
from echelon.tuning.tuner import find_model
from echelon.types import monotonic

if TYPE_CHECKING:
    from pathlib import Path

QUERY = "When does the ferry leave?"
MODELS = {
    "toy-Qwen3-Reranker": ("qwen3", {}),
    "Qwen3-Reranker-untied": ("qwen3", {"tie_word_embeddings": False}),
    "Qwen3-Reranker-seq-cls": (
        "qwen3",
        {"architecture": "Qwen3ForSequenceClassification", "num_labels": 1, "pad_token_id": 0},
    ),
    "mxbai-rerank-toy": ("qwen2", {}),
    "toy-zerank-1-small": ("qwen3", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("language_models")
    return {
        name: make_language_model(home / name, kind, **settings)
        for name, (kind, settings) in MODELS.items()
    }


def reference(folder: Path, query: str, documents: Any, instruction: str | None = None) -> Any:
    """Logits of the answers by transformers in fp32, a pair at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    prompt = model_prompt(folder)
    assert prompt is not None
    encoder = PairEncoder(folder, prompt)
    pairs = [(query, document) for document in documents]
    batch = encoder.encode(pairs, 400, "only_second", instruction=instruction).batch(
        range(len(pairs))
    )
    classifies = "seq-cls" in folder.name
    kind: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    yes, *no = (vocabulary[answer] for answer in prompt.answers)
    found = []
    for start, end in zip(batch.offsets, batch.offsets[1:], strict=False):
        with torch.inference_mode():
            logits = model(torch.from_numpy(batch.ids[start:end]).long()[None]).logits[0]
        found.append(float(logits[0] if classifies else logits[-1, yes] - logits[-1, no].sum()))
    return np.array(found) / prompt.temperature


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers(folders, name):
    expected = reference(folders[name], QUERY, SENTENCES)
    assert expected.std() > 0.01
    with Reranker(folders[name], device="cpu", precision="fp32") as reranker:
        pairs = [(QUERY, text) for text in SENTENCES]
        np.testing.assert_allclose(reranker.score(pairs), expected, atol=1e-3 * expected.std())
        alone = [reranker.score([pair])[0] for pair in pairs]
        np.testing.assert_allclose(alone, expected, atol=1e-3 * expected.std())
        small = reranker.score_pairs(pairs, batch_size=3).logits
        np.testing.assert_allclose(small, expected, atol=1e-3 * expected.std())


def test_an_instruction_of_the_model_or_of_a_call_changes_what_is_judged(folders):
    folder = folders["toy-Qwen3-Reranker"]
    expected = reference(folder, QUERY, SENTENCES, "Judge the weather.")
    pairs = [(QUERY, text) for text in SENTENCES]
    with Reranker(folder, device="cpu", precision="fp32") as reranker:
        plain = reranker.score(pairs)
        found = reranker.score_pairs(pairs, instruction="Judge the weather.").logits
    with Reranker(folder, device="cpu", precision="fp32", instruction="Judge the weather.") as own:
        np.testing.assert_allclose(own.score(pairs), found, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())
    assert np.abs(found - plain).max() > 1e-3


def test_the_default_precision_is_bf16_where_that_is_fast(folders):
    from echelon.models.device import multiplies_half

    scorer = open_scorer(folders["toy-Qwen3-Reranker"], device="cpu")
    assert scorer.info.precision == ("bf16" if multiplies_half("bf16") else "fp32")
    scorer.close()


def test_a_query_that_is_too_long_is_refused(folders):
    folder, expected = folders["toy-Qwen3-Reranker"], "leave no room for the document"
    with Reranker(folder, device="cpu") as reranker, pytest.raises(InvalidInput, match=expected):
        reranker.rank(SENTENCES[0] * 30, ["a"])


def test_a_language_model_without_a_known_name_is_refused(tmp_path):
    folder = make_language_model(tmp_path / "chat", "qwen3")
    with pytest.raises(UnsupportedModel, match="its name does not say"):
        Reranker(folder)


def test_a_language_model_with_parts_that_do_not_run_here_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["toy-Qwen3-Reranker"], tmp_path / "Qwen3-Reranker-yarn")
    path = folder / "config.json"
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": scaled}))
    with pytest.raises(UnsupportedModel, match="parts that do not run here"):
        Reranker(folder)


def test_the_description_counts_the_weights_of_scoring(folders):
    from safetensors.torch import load_file

    folder = folders["toy-Qwen3-Reranker"]
    found = describe(folder)
    held = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    shape = native_model(folder, read_config(folder)).shape
    assert found.weights == held + shape.hidden  # the vector of the answers
    assert found.instruction.startswith("Given a web search query")


def test_commands_take_an_instruction(folders):
    folder = str(folders["toy-Qwen3-Reranker"])
    asked = ["rank", QUERY, *SENTENCES[:3], "--model", folder, "--precision", "fp32", "--json"]
    runner = CliRunner()
    plain = json.loads(runner.invoke(cli, asked).stdout)
    told = json.loads(runner.invoke(cli, [*asked, "--instruction", "Judge the weather."]).stdout)
    assert plain["results"][0]["logit"] != told["results"][0]["logit"]


ROLE = "{{ messages | selectattr('role', 'eq', 'ROLE') | map(attribute='content') | first }}"
CHAT = (
    "{{ prefix }}<Instruct>: " + (QWEN3_RERANKER.instruction or "") + "\n"
    "<Query>: " + ROLE.replace("ROLE", "query") + "\n"
    "<Document>: " + ROLE.replace("ROLE", "document") + "{{ suffix }}"
)


def test_scores_are_those_of_sentence_transformers_with_the_chat_template(folders):
    import torch
    from sentence_transformers.cross_encoder import CrossEncoder

    folder = folders["toy-Qwen3-Reranker"]
    parts = {"prefix": QWEN3_RERANKER.prefix, "suffix": QWEN3_RERANKER.suffix[0]}
    values = "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in parts.items())
    original = CrossEncoder(
        str(folder), device="cpu", processor_kwargs={"chat_template": values + CHAT}
    )
    pairs = [(QUERY, text) for text in SENTENCES]
    expected = original.predict(pairs, activation_fn=torch.nn.Identity())
    with Reranker(folder, device="cpu", precision="fp32") as reranker:
        found = reranker.score(pairs)
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())


def test_a_pair_has_at_most_the_tokens_that_the_authors_allow(tmp_path):
    folder = make_language_model(tmp_path / "Qwen3-Reranker", "qwen3", max_position_embeddings=9000)
    assert describe(folder).max_tokens == QWEN3_RERANKER.max_tokens == 8192
    scorer = open_scorer(folder, device="cpu", precision="fp32")
    assert scorer.info.max_tokens == 8192
    scorer.close()


def test_a_step_costs_its_query_once(folders):
    pairs = [(QUERY, text) for text in SENTENCES]
    with Reranker(folders["toy-Qwen3-Reranker"], device="cpu", precision="fp32") as reranker:
        report = reranker.score_pairs(pairs).report
        alone = reranker.score_pairs(pairs[:1]).report
    assert alone.cost_tokens == alone.tokens
    assert report.cost_tokens < 0.6 * report.tokens


@pytest.mark.parametrize("run_again", [True, False])
def test_the_tuner_measures_what_a_new_query_costs(folders, tmp_path, monkeypatch, run_again):
    """A run finds what the runs before it kept of the instruction, and nothing of the queries."""
    options = Options(device="cpu", precision="fp32", threads=1)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"query": SENTENCES[0], "documents": SENTENCES}), "utf-8")
    check, texts = find_model(str(folders["toy-Qwen3-Reranker"]), options, data)
    if run_again:  # what would be found if the queries were the same
        monkeypatch.setattr(PrecisionCheck, "asked", lambda _, query, __: query)
    scorer: Any = check.open("fp32")
    real, found = scorer.score, []

    def score(batch):
        parts = np.split(batch.ids, batch.offsets[1:-1])
        found.append(max(scorer._prefixes.known(ids) for ids in parts))
        return real(batch)

    monkeypatch.setattr(scorer, "score", score)
    calls = TimedCalls(check, scorer, texts, [6], monotonic)
    runs = [calls(SweepPoint(6, batch_size=6)) for _ in range(3)]
    scorer.close()
    encoded = check.encoder.encode([("", "")], 380, "only_second")
    known = len(encoded.template.before) + len(encoded.queries[0])
    assert found[0] == 0
    if run_again:
        assert min(found[1:]) > known
    else:
        assert max(found) <= known
        assert all(run.cost_tokens < run.tokens for run in runs)
