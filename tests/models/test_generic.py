"""The padded scorer for architectures without a packed encoder."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from helpers import (
    GENERIC,
    LIMITS,
    make_checkpoint,
    make_toy,
    random_batch,
    reference_logits,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon import Reranker
from echelon.errors import BadCheckpoint, EchelonWarning, UnsupportedModel
from echelon.models.registry import open_scorer

EXACT = 1e-4


def open_quietly(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EchelonWarning)
        return open_scorer(folder, device="cpu", threads=1, **options)


@pytest.fixture(scope="module")
def generic(toy):
    """Folder and scorer of a family."""
    opened = {family: (toy(family), open_quietly(toy(family))) for family in GENERIC}
    yield opened
    for _, scorer in opened.values():
        scorer.close()


@pytest.mark.parametrize("family", GENERIC)
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(3, 100), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1)
)
def test_any_composition(generic, family, lengths, seed):
    folder, scorer = generic[family]
    batch = random_batch(lengths, 300, seed, types=family == "electra", lowest=5)
    found = scorer.score(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_logits(folder, batch), rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", GENERIC)
def test_the_longest_and_the_shortest(generic, family):
    folder, scorer = generic[family]
    assert scorer.info.max_tokens == LIMITS[family]
    for lengths in ([LIMITS[family]], [3], [3, LIMITS[family], 4]):
        batch = random_batch(lengths, 300, 1, lowest=5)
        found = scorer.score(batch)
        np.testing.assert_allclose(found, reference_logits(folder, batch), rtol=0, atol=EXACT)
    with pytest.raises((IndexError, RuntimeError)):
        reference_logits(folder, random_batch([LIMITS[family] + 1], 300, 1, lowest=5))


def test_it_says_once_that_it_pads(toy):
    with pytest.warns(EchelonWarning, match="distilbert has no packed encoder") as caught:
        scorer = open_scorer(toy("distilbert"), device="cpu")
    assert len(caught) == 1
    scorer.score(random_batch([9, 12], 300, 0))
    scorer.score(random_batch([9, 12], 300, 0))
    assert scorer.info.padding == "rectangular"
    assert scorer.info.family == "distilbert"
    assert scorer.info.weights_bytes > 0


def test_the_chosen_label_is_the_references_column(tmp_path):
    folder = make_toy(tmp_path, "distilbert", None, vocab_size=150, labels=3)
    batch = random_batch([20, 9, 64], 150, seed=1, lowest=5)
    for label in range(3):
        found = open_quietly(folder, label=label).score(batch)
        expected = reference_logits(folder, batch, label)
        np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


def test_bf16(generic):
    folder, scorer = generic["electra"]
    batch = random_batch([20, 9, 64], 300, seed=1, lowest=5)
    half = open_quietly(folder, precision="bf16")
    assert half.info.precision == "bf16"
    assert half.info.weights_bytes * 2 == scorer.info.weights_bytes
    np.testing.assert_allclose(half.score(batch), scorer.score(batch), rtol=0, atol=0.1)


@pytest.mark.parametrize("family", GENERIC)
def test_ranking_counts_padding_and_scores_the_same(toy, family):
    documents = [words(n, seed=n) for n in (3, 30, 8, 20, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EchelonWarning)
        reranker = Reranker(toy(family), device="cpu", threads=1, token_budget=400)
    with reranker:
        together = reranker.score_pairs([("rain at the window", d) for d in documents])
        alone = [reranker.score_pairs([("rain at the window", d)]).logits[0] for d in documents]
    np.testing.assert_allclose(together.logits, alone, rtol=0, atol=EXACT)
    assert together.report.padding_share > 0


def test_relative_positions_need_padding_masked(tmp_path):
    """A model of another kind altogether: disentangled attention, no position table."""
    shape = {
        "model_type": "deberta-v2",
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    folder = make_checkpoint(tmp_path, shape)
    batch = random_batch([20, 9, 60, 3], 200, seed=1, lowest=5)
    scorer = open_quietly(folder)
    assert scorer.info.max_tokens == 64
    expected = reference_logits(folder, batch)
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=EXACT)


def test_a_classifier_that_was_never_trained_is_refused(toy, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_toy(tmp_path, "distilbert", None, vocab_size=150)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"the weights lack classifier\.weight"):
        open_quietly(folder)


def test_weights_of_another_shape_are_refused(toy, tmp_path):
    folder = make_toy(tmp_path, "distilbert", None, vocab_size=150)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dim": 96}))
    words = r"implies distilbert\.\S+ of shape \[96(, 48)?\], the weights hold \["
    with pytest.raises(BadCheckpoint, match=words):
        open_quietly(folder)


@pytest.mark.parametrize("kind", ["made-up", "vit"])
def test_what_transformers_cannot_make_a_text_classifier_of(toy, tmp_path, kind):
    folder = make_toy(tmp_path, "distilbert", None, vocab_size=150)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(UnsupportedModel, match="cannot load it as a sequence classifier"):
        open_quietly(folder)
