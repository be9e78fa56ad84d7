"""Decoders against transformers in fp32 on the same ids, with and without shared beginnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from decoders import (
    LIMIT,
    MODELS,
    VOCABULARY,
    batch_of,
    make_decoder,
    open_decoder,
    query_batch,
    random_ids,
    reference,
    scorer_of,
)
from helpers import random_batch, split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from echelon.models import causal_attention
from echelon.models.base import DeviceOutOfMemory
from echelon.models.device import multiplies_half, multiplies_int8

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import TokenBatch


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("decoders")
    return {name: make_decoder(home / name, name) for name in MODELS}


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
