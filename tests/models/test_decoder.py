"""Decoders against transformers in fp32 on the same ids, with and without shared beginnings."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import random_batch, split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from echelon.errors import BadCheckpoint
from echelon.models import causal_attention, qwen
from echelon.models.architecture import LayerPlan, read_config
from echelon.models.base import DeviceOutOfMemory
from echelon.models.decoder import open_native
from echelon.models.device import multiplies_half, multiplies_int8, set_threads
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
LIMIT, VOCABULARY = 400, 150
ANSWERS = (11, 7)  # ids of yes and no
ODD = {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LIMIT,
}
"""Six heads of ten are not the 40 of the hidden width."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3ForCausalLM", {"head_dim": 10, "tie_word_embeddings": True}),
    "untied": ("Qwen3ForCausalLM", {"head_dim": 10, "attention_bias": True, "rope_theta": 1e6}),
    "classifier": (
        "Qwen3ForSequenceClassification",
        {"head_dim": 10, "num_labels": 3, "pad_token_id": 0},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"hidden_size": 48, "tie_word_embeddings": True}),
    "deep": (
        "Qwen3ForCausalLM",
        {"head_dim": 128, "num_hidden_layers": 12, "hidden_size": 96, "intermediate_size": 128},
    ),
    "one layer": ("Qwen3ForCausalLM", {"head_dim": 10, "num_hidden_layers": 1}),
}
LABEL = 1


def make_decoder(folder: Path, name: str, max_shard: str = "1GB", **changes: Any) -> Path:
    """Save a decoder with random weights, wide enough that pairs differ."""
    import transformers

    kind, own = MODELS[name]
    shape = {**ODD, **own, **changes}
    config = transformers.AutoConfig.for_model(kind[:5].lower(), **shape)
    torch.manual_seed(5)
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.08
    model.save_pretrained(folder, max_shard_size=max_shard)
    return folder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("decoders")
    return {name: make_decoder(home / name, name) for name in MODELS}


def shape_of(folder: Path) -> Any:
    return qwen.read(folder, read_config(folder))


def open_decoder(folder: Path, precision: str = "fp32", **plan: Any) -> Any:
    shape = shape_of(folder)
    return open_native(
        folder=folder,
        architecture=shape,
        device=CPU,
        plan=LayerPlan(precision, **plan),
        threads=set_threads(1, CPU),  # more lose time where cores are busy
        label=LABEL if shape.classifies else 0,
        answers=None if shape.classifies else ANSWERS,
    )


@lru_cache(maxsize=16)
def scorer_of(folder: Path, precision: str = "fp32") -> Any:
    return open_decoder(folder, precision)


@lru_cache(maxsize=8)
def reference_model(folder: Path) -> Any:
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def reference(folder: Path, batch: TokenBatch) -> np.ndarray:
    """Scores by transformers, every pair alone."""
    found = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        with torch.inference_mode():
            logits = reference_model(folder)(input_ids=ids).logits[0].double()
        yes, no = ANSWERS
        found.append(logits[LABEL] if logits.ndim == 1 else logits[-1, yes] - logits[-1, no])
    return np.array(found, dtype=np.float64)


def batch_of(texts: list[np.ndarray]) -> TokenBatch:
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int32)
    return TokenBatch(np.concatenate(texts).astype(np.int32), None, offsets)


def random_ids(chance: np.random.Generator, count: int) -> np.ndarray:
    return chance.integers(1, VOCABULARY, count)


def query_batch(seed: int, queries: int, lengths: list[int], query: int = 60) -> TokenBatch:
    """Documents of some queries in turn; all queries begin with the same 30 tokens."""
    chance = np.random.default_rng(seed)
    start = random_ids(chance, 30)
    asked = [np.concatenate((start, random_ids(chance, query))) for _ in range(queries)]
    return batch_of(
        [
            np.concatenate((asked[at % queries], random_ids(chance, length)))
            for at, length in enumerate(lengths)
        ]
    )


def deviation(folder: Path, seed: int = 1) -> float:
    """Standard deviation of a model's scores."""
    return float(scorer_of(folder).score(query_batch(seed, 1, [20] * 40)).std())


def assert_parity(folder: Path, batch: TokenBatch, bound: float = 1e-4) -> None:
    scorer = scorer_of(folder)
    scorer.release()
    expected, tolerance = reference(folder, batch), bound * deviation(folder)
    scorer.release()
    for _ in range(2):  # with new and with cached prefixes
        found = scorer.score(batch)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


COMPOSITIONS = {
    "one token": [1],
    "longest": [LIMIT],
    "just over a block": [127, 128, 129, 257],
    "many equal": [23] * 17,
    "mixed": [3, 41, 7, 5, 290, 12, 60, 4, 33, 21, 1, 1],
    "longest among shortest": [3, LIMIT, 3, LIMIT - 1, 4],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_pairs_without_anything_in_common(decoders, name, composition):
    lengths = COMPOSITIONS[composition]
    assert_parity(decoders[name], random_batch(lengths, VOCABULARY, len(lengths), lowest=1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_documents_of_queries(decoders, name, queries):
    lengths = [5, 40, 40, 1, 17, 40, 130, 200, 2]
    assert_parity(decoders[name], query_batch(queries, queries, lengths))


def test_a_query_longer_than_a_block(decoders):
    assert_parity(decoders["tied"], query_batch(3, 2, [1, 9, 9, 70, 129, 60], query=230))


@pytest.mark.parametrize("name", ["tied", "qwen2"])
def test_equal_pairs_and_pairs_that_begin_others(decoders, name):
    chance = np.random.default_rng(8)
    text, other = random_ids(chance, 90), random_ids(chance, 33)
    texts = [text, text, text[:40], other, text[:89], other, text, text[:1], other[:32]]
    assert_parity(decoders[name], batch_of(texts))


@st.composite
def steps(draw):
    """Pairs that begin with parts of one text, so that any division into groups comes up."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    begin = [random_ids(chance, 120), random_ids(chance, 150)]
    parts = draw(
        st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 120), st.integers(1, 140)),
            min_size=1,
            max_size=8,
        )
    )
    texts = [np.concatenate((begin[a][:b], random_ids(chance, c))) for a, b, c in parts]
    return batch_of(texts)


@settings(max_examples=30)
@given(batches=st.lists(steps(), min_size=1, max_size=3))
def test_any_steps_one_after_another(decoders, batches):
    """Prefixes cached by one step change no score of the next."""
    folder = decoders["untied"]
    scorer, tolerance = scorer_of(folder), 1e-4 * deviation(folder)
    for batch in batches:
        expected = reference(folder, batch)
        np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param(
            "bf16", marks=pytest.mark.skipif(not multiplies_half("bf16"), reason="needs bf16")
        ),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_sharing_changes_no_score(decoders, name, precision):
    """Together, alone and from the cache: within a thousandth of the scores' spread."""
    folder = decoders[name]
    scorer = scorer_of(folder, precision)
    batch = query_batch(4, 2, [5, 40, 40, 1, 17, 40, 130, 200])
    scorer.release()
    together, again = scorer.score(batch), scorer.score(batch)
    pairs = [split(batch, at) for at in range(len(batch))]
    from_cache = [scorer.score(pair)[0] for pair in pairs]
    alone = []
    for pair in pairs:
        scorer.release()
        alone.extend(scorer.score(pair))
    tolerance = 1e-3 * deviation(folder)
    for found in (together, again, from_cache):
        np.testing.assert_allclose(found, alone, rtol=0, atol=tolerance)


def test_a_query_is_kept_until_memory_is_freed(decoders):
    scorer = open_decoder(decoders["tied"])
    batch = query_batch(6, 2, [20, 20, 9, 9])
    scorer.score(batch)
    assert [scorer._prefixes.known(split(batch, at).ids) for at in range(4)] == [90] * 4
    held = 2 * 3 * 90 * 2 * 2 * 10 * 4  # prefixes, layers, tokens, keys and values, heads, size
    assert scorer._prefixes.nbytes == held
    scorer.release()
    assert scorer._prefixes.nbytes == 0


def test_a_query_too_large_to_keep_is_not_kept(decoders):
    folder = decoders["tied"]
    scorer = open_decoder(folder)
    scorer._prefixes.max_bytes = 10_000
    batch = query_batch(6, 1, [20, 20, 9, 9])
    found = scorer.score(batch)
    np.testing.assert_allclose(found, reference(folder, batch), rtol=0, atol=1e-5)
    assert scorer._prefixes.nbytes == 0


def test_kept_prefixes_hold_no_memory_of_their_step(decoders):
    scorer = open_decoder(decoders["tied"])
    scorer.score(query_batch(6, 1, [300, 200]))
    (kept,) = scorer._prefixes._prefixes.values()
    for layer in kept.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes


def test_a_step_without_memory_leaves_the_scorer_usable(decoders, monkeypatch):
    scorer = open_decoder(decoders["tied"])
    batch = query_batch(7, 1, [20, 30])
    expected = scorer.score(query_batch(8, 1, [12, 12]))

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as broken:
        broken.setattr(causal_attention.CausalAttention, "attend_last", fail)
        with pytest.raises(DeviceOutOfMemory):
            scorer.score(batch)
    assert scorer._prefixes.known(batch.ids) == 0
    assert (scorer.score(query_batch(8, 1, [12, 12])) == expected).all()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed scorer"):
        scorer.score(batch)


def test_a_classifier_reads_no_padding_at_the_end(decoders):
    chance = np.random.default_rng(3)
    text = random_ids(chance, 30)
    texts = [np.pad(text, (0, 4)), text, np.zeros(5, int), np.r_[text[:9], 0, 0, text[9:], 0]]
    assert_parity(decoders["classifier"], batch_of(texts))


def test_shards(tmp_path, decoders):
    folder = make_decoder(tmp_path, "untied", max_shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    batch = query_batch(2, 2, [8, 30, 31])
    found = open_decoder(folder).score(batch)
    np.testing.assert_array_equal(found, open_decoder(decoders["untied"]).score(batch))


@pytest.mark.parametrize("name", ["tied", "classifier", "qwen2"])
def test_bf16_ranks_alike(decoders, name):
    folder = decoders[name]
    batch = query_batch(9, 1, [30] * 40)
    exact, half = scorer_of(folder).score(batch), open_decoder(folder, "bf16").score(batch)
    np.testing.assert_allclose(half, exact, rtol=0, atol=0.15 * exact.std())
    assert kendalltau(exact, half).statistic > 0.95
    assert np.abs(half - exact).max() > 0


@pytest.mark.skipif(not multiplies_int8(), reason="needs AVX-512 VNNI or AMX")
def test_int8_is_near_and_its_layers_can_be_kept(decoders):
    folder = decoders["tied"]
    batch = query_batch(9, 1, [30] * 40)
    exact = scorer_of(folder).score(batch)
    errors: dict[str, float] = {}
    open_decoder(folder, "bf16", errors=errors).score(batch)
    parts = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = {f"layers.{layer}.{part}" for layer in range(3) for part in parts}
    assert set(errors) == names | {"layers.2.self_attn.q_proj"}
    assert 0 < max(errors.values()) < 0.1
    int8 = open_decoder(folder, "int8")
    found = int8.score(batch)
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.6 * exact.std())
    kept = open_decoder(folder, "int8", keep_bf16=frozenset(errors))
    np.testing.assert_array_equal(kept.score(batch), open_decoder(folder, "bf16").score(batch))
    assert int8.info.weights_bytes < kept.info.weights_bytes


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_that_are_told_are_those_that_are_loaded(decoders, name):
    """The word table stays mapped; of the head one vector is loaded."""
    shape = shape_of(decoders[name])
    tables = shape.vocabulary * shape.hidden
    assert scorer_of(decoders[name]).info.weights_bytes == 4 * (shape.weights - tables)


def test_ids_beyond_the_vocabulary_are_refused(decoders):
    with pytest.raises(BadCheckpoint, match="embeddings for 150 tokens"):
        scorer_of(decoders["tied"]).score(batch_of([np.array([3, VOCABULARY])]))


def changed(folder: Path, out: Path, **values: Any) -> Path:
    """The folder with another configuration; None removes a field."""
    shutil.copytree(folder, out)
    config = {**json.loads((out / "config.json").read_text()), **values}
    config = {name: value for name, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_both_spellings_of_rotary_positions(decoders, tmp_path):
    folder = decoders["untied"]
    assert shape_of(folder).theta == 1e6
    old = changed(folder, tmp_path / "old", rope_parameters=None, rope_theta=1e6)
    new = {"rope_type": "default", "rope_theta": 1e6}
    new = changed(folder, tmp_path / "new", rope_theta=None, rope_parameters=new)
    assert shape_of(old) == shape_of(new) == shape_of(folder)
    none = changed(folder, tmp_path / "none", rope_theta=None, rope_parameters=None)
    assert shape_of(none).theta == 10_000


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"is_causal": False},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": ["Qwen3Model"]},
    ],
)
def test_what_is_not_native(decoders, tmp_path, values):
    assert shape_of(changed(decoders["tied"], tmp_path / "other", **values)) is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
        ({"head_dim": 9}, "head_dim: 9 is odd"),
        ({"num_hidden_layers": None}, "num_hidden_layers: it is missing"),
        ({"head_dim": "10"}, "head_dim: '10' is not a whole number"),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta: 'high' is not"),
        ({"rope_parameters": [1]}, "rope_parameters: .* is not an object"),
    ],
)
def test_damaged_configurations_name_the_field(decoders, tmp_path, values, problem):
    folder = changed(decoders["tied"], tmp_path / "bad", **values)
    with pytest.raises(BadCheckpoint, match=problem):
        shape_of(folder)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_hidden_layers": 2}, r"model\.layers\.2\.\*, beyond"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3"),
        ({"head_dim": 20}, r"self_attn\.\w_proj\.weight of shape"),
        ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
        ({"vocab_size": 151}, r"embed_tokens\.weight of shape \[151"),
    ],
)
def test_configurations_of_other_weights_are_refused(decoders, tmp_path, values, problem):
    folder = changed(decoders["tied"], tmp_path / "bad", layer_types=None, **values)
    with pytest.raises(BadCheckpoint, match=problem):
        open_decoder(folder)


def test_an_answer_beyond_the_vocabulary_is_refused(decoders):
    folder = decoders["tied"]
    with pytest.raises(BadCheckpoint, match="embeddings for 150 tokens"):
        open_native(
            folder=folder,
            architecture=shape_of(folder),
            device=CPU,
            plan=LayerPlan("fp32"),
            threads=1,
            label=0,
            answers=(3, 9693),
        )
