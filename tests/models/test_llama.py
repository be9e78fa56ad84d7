"""Bidirectional Llamas against transformers' Llama under a mask that hides nothing."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from decoders import batch_of
from helpers import SENTENCES, vocabulary_of
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import save_qwen_tokenizer
from tokenizers import AddedToken, Tokenizer

from echelon import Reranker
from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.models import llama
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.device import candidate_precisions
from echelon.models.families import native_model
from echelon.models.prompts import NEMOTRON_RERANK
from echelon.models.registry import open_scorer
from echelon.models.rotary import Rotary
from echelon.tokenization.tokenizer import PairEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import TokenBatch

pytestmark = pytest.mark.device

BEGIN = "<|begin_of_text|>"
STRETCH = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 72,
    "max_position_embeddings": 400,
    "rope_theta": 500_000.0,
    "rope_scaling": STRETCH,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "nemotron": {},
    "short": {"rope_scaling": None, "num_hidden_layers": 1, "pooling": "cls"},
    "tempered": {"temperature": 2.5, "num_labels": 3, "tie_word_embeddings": True},
}
LABEL = 1


def save(folder: Path, **changes: Any) -> Path:
    """A toy as its authors save theirs: Llama's tensors, and a ``config.json`` of their own."""
    import transformers

    save_qwen_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(BEGIN, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {name: changes.pop(name) for name in ("pooling", "temperature") if name in changes}
    shape = {**SHAPE, "vocab_size": vocabulary_of(folder), "num_labels": 1, **changes}
    torch.manual_seed(4)
    model: Any = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.08
    model.save_pretrained(folder)
    return reconfigure(
        folder,
        model_type="llama_bidirec",
        architectures=["LlamaBidirectionalForSequenceClassification"],
        auto_map={"AutoModelForSequenceClassification": "llama_bidirectional_model.Code"},
        **own,
    )


def reconfigure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def reference_model(folder: Path) -> tuple[Any, torch.Tensor]:
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "attn_implementation": "eager"}
    tensors = load_file(folder / "model.safetensors")
    model: Any = transformers.LlamaModel(transformers.LlamaConfig(**config)).eval()
    parts = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(parts)
    return model, tensors["score.weight"]


def reference(folder: Path, batch: TokenBatch) -> np.ndarray:
    """Scores of transformers' layers, every pair alone, all tokens seeing all; then pooling."""
    config = json.loads((folder / "config.json").read_text())
    model, head = reference_model(folder)
    found = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        with torch.inference_mode():
            rows = model(input_ids=ids, attention_mask=nothing_hidden).last_hidden_state[0]
        pooled = rows[0] if config.get("pooling") == "cls" else rows.mean(0)
        logits = pooled @ head.T / config.get("temperature", 1.0)
        found.append(float(logits[LABEL if len(head) > 1 else 0]))
    return np.array(found)


@pytest.fixture(scope="module", params=VARIANTS)
def toy(request, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp(request.param) / "toy-rerank", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("one") / "llama-nemotron-rerank-toy")


@cache
def scorer_of(folder: Path, precision: str = "fp32") -> Any:
    many = len(json.loads((folder / "config.json").read_text()).get("id2label", {})) > 1
    return open_scorer(folder, device="cpu", precision=precision, label=LABEL if many else None)


def texts_of(folder: Path, lengths: list[int], seed: int = 0) -> TokenBatch:
    chance = np.random.default_rng(seed)
    vocabulary = vocabulary_of(folder)
    return batch_of([chance.integers(4, vocabulary, length) for length in lengths])


@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_scores_are_those_of_transformers(toy, lengths, seed):
    batch = texts_of(toy, lengths, seed)
    expected = reference(toy, batch)
    np.testing.assert_allclose(scorer_of(toy).score(batch), expected, rtol=0, atol=1e-4)


def test_a_pair_scores_the_same_in_every_batch(nemotron):
    lengths = [400, 3, 77, 77, 12, 399]
    batch = texts_of(nemotron, lengths)
    together = scorer_of(nemotron).score(batch)
    for place, (start, end) in enumerate(pairwise(batch.offsets)):
        alone = scorer_of(nemotron).score(batch_of([batch.ids[start:end]]))
        np.testing.assert_allclose(alone, together[place], rtol=0, atol=2e-5)
    assert together.std() > 0.01


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precisions_rank_alike(nemotron, precision):
    from scipy.stats import kendalltau

    if precision not in candidate_precisions("cpu"):
        pytest.skip("this processor is not fast in it")
    batch = texts_of(nemotron, list(range(10, 60)))
    exact = scorer_of(nemotron).score(batch)
    found = scorer_of(nemotron, precision).score(batch)
    assert kendalltau(exact, found).statistic >= 0.8
    assert np.abs(found - exact).max() <= 0.35 * exact.std() * 3


@pytest.mark.parametrize("stretch", [None, STRETCH])
def test_positions_are_those_of_transformers(stretch):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SHAPE | {"rope_scaling": stretch})
    positions = torch.arange(400)
    expected, _ = LlamaRotaryEmbedding(config)(torch.zeros(1, 1, 1), positions[None])
    rule = None if stretch is None else llama.LlamaStretch(8.0, 1.0, 4.0, 64)
    found, _ = Rotary(500_000.0, 8, stretch=rule).tables(positions)
    torch.testing.assert_close(found[:, 0], expected[0], rtol=0, atol=1e-6)


def test_tokens_are_those_of_the_authors_recipe(nemotron):
    """They tokenize one text; what looks like a control token in ours stays text."""
    tokenizer = Tokenizer.from_file(str(nemotron / "tokenizer.json"))
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.encode_special_tokens = True
    queries = ("how tall is it?", "", "¿Qué?", "2024", "  spaced  ", BEGIN, "身高多少")
    documents = (*SENTENCES[:6], "", "(42) fish", "\nlines\n\n", "<|im_end|>", "多高", ":-)", " x")
    pairs = [(query, document) for query in queries for document in documents]
    found = PairEncoder(nemotron, NEMOTRON_RERANK).encode(pairs, 400, "only_second")
    for place, (query, document) in enumerate(pairs):
        text = f"question:{query} \n \n passage:{document}"
        expected = [begin, *tokenizer.encode(text, add_special_tokens=False).ids]
        assert found.batch([place]).ids.tolist() == expected, text


def test_an_instruction_is_refused(nemotron):
    """It would stand before the question, where the model never saw one."""
    with pytest.raises(InvalidInput, match="instruction: this model has a prompt without one"):
        PairEncoder(nemotron, NEMOTRON_RERANK, "Judge.")


def test_all_of_it_works_together(nemotron):
    with Reranker(nemotron, device="cpu", precision="fp32", threads=1) as reranker:
        ranked = reranker.rank("rain", list(SENTENCES[:6]))
    assert sorted(hit.index for hit in ranked.results) == list(range(6))
    assert "llama_bidirec" in json.dumps(describe(nemotron), default=str)


def test_what_a_query_costs_is_not_shared(nemotron):
    """Each token sees the document, so nothing of a query is computed once for all."""
    encoder = PairEncoder(nemotron, NEMOTRON_RERANK)
    pairs = encoder.encode(
        [("a long query " * 8, text) for text in SENTENCES[:4]], 400, "only_second"
    )
    np.testing.assert_array_equal(pairs.costs, pairs.lengths)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pooling": "last"}, "pooling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rope"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_foreign_parts_are_refused_by_name(tmp_path, changes, named):
    folder = reconfigure(save(tmp_path / "toy-rerank"), **changes)
    with pytest.raises(UnsupportedModel, match=named):
        native_model(folder, read_config(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0}, "temperature"),
        ({"pooling": 3}, "pooling"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rope_scaling": STRETCH | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ],
)
def test_wrong_fields_are_named(tmp_path, changes, named):
    folder = reconfigure(save(tmp_path / "toy-rerank"), rope_parameters=None, **changes)
    with pytest.raises(BadCheckpoint, match=named):
        native_model(folder, read_config(folder))


def test_it_is_not_opened_under_a_name_that_does_not_rerank(tmp_path):
    """Its prompt is known for rerankers alone."""
    folder = save(tmp_path / "llama-embed")
    with pytest.raises(UnsupportedModel, match="prompt"):
        native_model(folder, read_config(folder))
