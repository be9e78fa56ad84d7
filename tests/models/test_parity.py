"""Scores against transformers in fp32 on the same ids: one and the same, whatever the batch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LIMITS, NATIVE, make_toy, random_batch, reference_logits, reference_model, split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from echelon import Reranker
from echelon.models.base import with_filler
from echelon.models.layers import ACTIVATIONS, Rows, make_linear
from echelon.models.registry import open_scorer
from echelon.tokenization.tokenizer import PairEncoder
from echelon.types import TokenBatch

EXACT = 1e-4
HALF_WIDTH = 0.12
ENGLISH = [
    row
    for row in map(
        json.loads,
        (Path(__file__).parents[2] / "src/echelon/data/texts.jsonl")
        .read_text(encoding="utf-8")
        .splitlines(),
    )
    if row["lang"] == "en"
]


@lru_cache(maxsize=16)
def scorer_of(folder: Path, precision: str = "fp32", label: int | None = None):
    # One thread: tiny models gain nothing from more, and lose much where cores are busy.
    return open_scorer(folder, device="cpu", precision=precision, label=label, threads=1)


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def batch_for(
    folder: Path, family: str, lengths: list[int], seed: int, lowest: int = 0
) -> TokenBatch:
    """Random ids, the padding and special ones among them unless ``lowest`` bars them."""
    return random_batch(lengths, vocabulary(folder), seed, types=family == "bert", lowest=lowest)


def assert_parity(folder: Path, batch: TokenBatch, label: int | None = None) -> None:
    ours = scorer_of(folder, label=label).score(batch)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(
        ours, reference_logits(folder, batch, label or 0), rtol=0, atol=EXACT
    )


COMPOSITIONS = {
    "shortest": [3],
    "one token": [1],
    "longest": [-1],
    "just under": [-2],
    "many equal": [23] * 17,
    "all different": [3, 41, 7, 5, 90, 12, 60, 4, 33, 21],
    "descending": [90, 60, 41, 33, 21, 12, 7, 5, 4, 3],
    "runs": [40, 40, 40, 9, 9, 40, 40, 3, 3, 3, 9],
    "longest among shortest": [3, -1, 3, -1, -1, 4],
    "many short": [*range(3, 20)] * 4,
}


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions(toy, family, composition):
    limit = LIMITS[family]
    lengths = [n if n > 0 else limit + 1 + n for n in COMPOSITIONS[composition]]
    folder = toy(family)
    assert_parity(folder, batch_for(folder, family, lengths, seed=len(lengths)))


@pytest.mark.parametrize("family", NATIVE)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1)
)
def test_any_composition(toy, family, lengths, seed):
    folder = toy(family)
    assert_parity(folder, batch_for(folder, family, lengths, seed))


@pytest.mark.parametrize("family", NATIVE)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
def test_other_pairs_do_not_change_a_score(toy, family, lengths, seed):
    folder = toy(family)
    batch = batch_for(folder, family, lengths, seed)
    together = scorer_of(folder).score(batch)
    alone = [scorer_of(folder).score(split(batch, i))[0] for i in range(len(batch))]
    np.testing.assert_allclose(together, alone, rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", NATIVE)
def test_the_limit_is_the_models(toy, family):
    folder = toy(family)
    assert scorer_of(folder).info.max_tokens == LIMITS[family]
    too_long = batch_for(folder, family, [LIMITS[family] + 1], seed=0, lowest=5)
    with pytest.raises((IndexError, RuntimeError)):
        reference_logits(folder, too_long)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 1, 1], [0, 7, 1, 1, 8, 2, 2, 1, 9, 2], [0, 9, 1]])
def test_literal_padding_tokens_take_the_references_positions(toy, family, ids):
    arrays = [np.array(part, dtype=np.int32) for part in (ids, ids[::-1], [0, 5, 6, 2])]
    offsets = np.concatenate(([0], np.cumsum([len(a) for a in arrays]))).astype(np.int32)
    assert_parity(toy(family), TokenBatch(np.concatenate(arrays), None, offsets))


VARIANTS = {
    "one layer": ("bert", {"num_hidden_layers": 1}),
    "relu": ("bert", {"hidden_act": "relu"}),
    "silu": ("bert", {"hidden_act": "silu"}),
    "tanh gelu": ("bert", {"hidden_act": "gelu_pytorch_tanh"}),
    "one segment": ("bert", {"type_vocab_size": 1}),
    "large epsilon": ("roberta", {"layer_norm_eps": 0.1}),
    "unread segments": ("roberta", {"type_vocab_size": 2}),
    "padding id 5": ("roberta", {"pad_token_id": 5}),
    "one head": ("roberta", {"num_attention_heads": 1}),
    "camembert": ("roberta", {"model_type": "camembert"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_configuration(tmp_path, variant):
    family, changes = VARIANTS[variant]
    folder = make_toy(tmp_path, family, None, vocab_size=150, **changes)
    types = family == "bert" and changes.get("type_vocab_size") != 1
    assert_parity(folder, random_batch([30, 30, 3, 77, 12], 150, seed=3, types=types))
    assert scorer_of(folder).info.padding == "none"


@pytest.mark.parametrize("family", NATIVE)
def test_the_chosen_label_is_the_references_column(tmp_path, family):
    folder = make_toy(tmp_path, family, None, vocab_size=150, labels=3)
    batch = random_batch([20, 20, 9, 64], 150, seed=1)
    for label in range(3):
        assert_parity(folder, batch, label)
    assert len({tuple(reference_logits(folder, batch, label)) for label in range(3)}) == 3


def test_the_reference_says_the_same_with_padding(toy):
    """The references above are scored without padding; with padding they agree."""
    folder = toy("bert")
    batch = random_batch([5, 40, 90, 17], vocabulary(folder), seed=5, types=True, lowest=5)
    real = np.arange(90) < batch.lengths[:, None]
    inputs = {"input_ids": batch.ids, "token_type_ids": batch.type_ids}
    padded = {}
    for name, flat in inputs.items():
        padded[name] = np.zeros(real.shape, dtype=np.int64)
        padded[name][real] = flat
    padded["attention_mask"] = real.astype(np.int64)
    with torch.inference_mode():
        logits = reference_model(folder)(**{k: torch.from_numpy(v) for k, v in padded.items()})
    ours = scorer_of(folder).score(batch)
    np.testing.assert_allclose(ours, logits.logits[:, 0].numpy(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("lengths", [[512], [3, 4, 5], [511, 512, 3], [60] * 6, [9, 100, 230, 31]])
def test_demo_on_random_ids(demo_folder, lengths):
    assert_parity(demo_folder, random_batch(lengths, 30522, seed=len(lengths), types=True))


def test_demo_on_text(demo_folder):
    row = ENGLISH[0]
    pairs = [(row["query"], document["text"]) for document in row["documents"]]
    encoded = PairEncoder(demo_folder).encode(pairs, 512, "longest_first")
    assert_parity(demo_folder, encoded.batch(range(len(pairs))))


def test_demo_in_bf16_ranks_alike(demo_folder):
    """At most 0.12 from fp32 on logits that span about ±11, and the same order in each query.

    Among 12 documents one swap alone is a τ of 0.97, and documents 0.01 apart do swap: so the
    bound of 0.99 holds for the mean, and in no query may documents change places that fp32 holds
    further apart than the error allows.
    """
    taus = []
    bounds = np.cumsum([len(row["documents"]) for row in ENGLISH])[:-1]
    pairs = [(row["query"], document["text"]) for row in ENGLISH for document in row["documents"]]
    with Reranker(demo_folder, device="cpu", precision="fp32", threads=1) as exact:
        of_fp32 = np.split(exact.score(pairs), bounds)
    with Reranker(demo_folder, device="cpu", precision="bf16", threads=1) as half:
        assert half.facts.precision == "bf16"
        of_bf16 = np.split(half.score(pairs), bounds)
    for row, wanted, found in zip(ENGLISH, of_fp32, of_bf16, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=HALF_WIDTH)
        taus.append(kendalltau(wanted, found).statistic)
        apart = np.subtract.outer(wanted, wanted) > HALF_WIDTH
        assert np.all(np.subtract.outer(found, found)[apart] > 0), row["id"]
        assert wanted.max() - wanted.min() > 5
    assert np.mean(taus) >= 0.99


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", NATIVE)
def test_half_width_stays_near(toy, family, precision):
    folder = toy(family)
    batch = batch_for(folder, family, [3, 50, 50, 90, 12], seed=2)
    half, exact = scorer_of(folder, precision).score(batch), scorer_of(folder).score(batch)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, rtol=0, atol=0.05)
    assert np.abs(half - exact).max() > 0


@given(st.integers(1, 20_000))
@settings(max_examples=60)
def test_steps_are_filled_to_few_sizes_with_little_waste(rows):
    batch = TokenBatch(np.ones(rows, np.int32), None, np.array([0, rows], np.int32))
    filled = with_filler(batch)
    extra = len(filled.ids) - rows
    assert len(filled.ids) % 16 == 0
    assert extra < 16 or extra <= rows / 31
    assert filled.offsets[0] == 0
    assert filled.offsets[1] == rows
    assert filled.offsets[-1] == len(filled.ids)
    assert (np.diff(filled.offsets[1:]) == 1).all()
    sizes = {
        len(with_filler(TokenBatch(np.ones(n, np.int32), None, batch.offsets)).ids)
        for n in range(max(1, rows - 300), rows + 1)
    }
    assert len(sizes) <= 300 // 16 + 2


def test_filler_never_scores_and_never_changes_a_score(demo_folder):
    scorer = open_scorer(demo_folder, precision="fp32")
    ids = np.arange(1000, 1045, dtype=np.int32)
    whole = TokenBatch(ids, None, np.array([0, 20, 45], np.int32))
    scores = scorer.score(whole)
    apart = [
        scorer.score(TokenBatch(part, None, np.array([0, len(part)], np.int32)))[0]
        for part in (ids[:20], ids[20:])
    ]
    assert scores.shape == (2,)
    assert np.abs(scores - apart).max() <= 1e-4
    scorer.close()


@pytest.mark.parametrize(
    ("activation", "residual"), [*((name, False) for name in ACTIVATIONS), ("none", True)]
)
def test_prepacked_products_equal_plain_ones(activation, residual):
    torch.manual_seed(3)
    weight, bias, rows = torch.randn(48, 32), torch.randn(48), torch.randn(17, 32)
    added = torch.randn(17, 48) if residual else None
    linear = make_linear(weight, bias, torch.device("cpu"), torch.float32, activation)
    with torch.inference_mode():
        expected = ACTIVATIONS[activation].function(torch.nn.functional.linear(rows, weight, bias))
        expected = expected if added is None else expected + added
        assert (linear(Rows(rows), added).values - expected).abs().max() <= 1e-4
