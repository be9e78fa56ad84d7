"""Every native family on a card, or one made of shims: transformers' scores in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import shim_card
import torch
from helpers import SENTENCES
from native_models import ENCODERS, FAMILIES

from echelon import Reranker
from echelon.models import card_kernels

PRECISIONS = {"fp32": 1e-4, "fp16": 0.03, "bf16": 0.3}
"""And how far a logit of a toy model may be from transformers' in fp32."""

MIXES = ([3], [1], [-1], [23] * 17, [3, 41, 7, 5, 90, 12, 60, 4, 33, 21], [60, 60, 8])
OLD, NEW = (7, 5), ((8, 0), (9, 0), (12, 0))
CASES = [
    *((family, OLD, precision) for family in (*ENCODERS, "jina-v2") for precision in PRECISIONS),
    *((family, capability, precision) for family in FAMILIES
      for capability, precision in zip(NEW, PRECISIONS, strict=True)),
]  # fmt: skip
HALVES = ["fp16", "bf16"] * len(FAMILIES)
PAIRS = [(SENTENCES[i % 10], SENTENCES[(i * 3 + 1) % 10]) for i in range(12)]


@pytest.mark.parametrize(("family", "capability", "precision"), CASES)
def test_scores_are_the_references(native, opened, family, capability, precision):
    toy = native(family)
    batches = [toy.batch(lengths, len(lengths)) for lengths in MIXES]
    references = [toy.reference(batch) for batch in batches]
    with shim_card.real_or_shim(capability=capability) as machine:
        scorer = opened(toy.folder, precision)
        for batch, expected in zip(batches, references, strict=True):
            for _ in range(2):
                np.testing.assert_allclose(
                    scorer.score(batch), expected, rtol=0, atol=PRECISIONS[precision]
                )
        assert scorer.info.device == "cuda:0"
        assert getattr(scorer, "capture_failed", None) is None
        if machine is not None:
            half_on_new = capability >= (8, 0) and precision != "fp32"
            flash = "aten._flash_attention_forward.default" in machine.counts("launch")
            assert flash == (half_on_new and family in (*ENCODERS, "jina-v2", "modernbert"))


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_of_ours_are_used_where_triton_compiles_and_score_alike(
    native, opened, monkeypatch, family
):
    """On a card made of shims they run as their forms on CPU."""
    monkeypatch.setattr(card_kernels, "missing", lambda device: None)
    toy = native(family)
    batches = [toy.batch(lengths, 1) for lengths in MIXES]
    with shim_card.cards() as machine:
        scorer = opened(toy.folder, "fp16")
        found = [scorer.score(batch) for batch in batches]
        used = {name for name in machine.counts("launch") if name.startswith("echelon")}
    norm = "add_norm" if family in (*ENCODERS, "jina-v2") else "accumulate_norm"
    others = set() if norm == "add_norm" else {"gate", "turn"}
    assert used == {f"echelon.{name}.default" for name in {norm, *others}}
    for batch, scores in zip(batches, found, strict=True):
        np.testing.assert_allclose(scores, toy.reference(batch), rtol=0, atol=PRECISIONS["fp16"])


def test_a_decoders_layer_is_eighteen_launches_where_pairs_are_alike(native, opened, monkeypatch):
    """56 without our operators."""
    monkeypatch.setattr(card_kernels, "missing", lambda device: None)
    toy = native("qwen3")
    with shim_card.cards() as machine:
        scorer = opened(toy.folder, "fp16")
        batch = toy.batch([40] * 4, 1)
        scorer.score(batch)
        scorer.release()
        machine.happenings.clear()
        scorer.score(batch)
        assert machine.counts("launch").total() <= 3 * 18 + 35


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_score_as_on_cpu_on_the_second_of_two_cards(native, family):
    folder = native(family).folder
    with Reranker(folder, device="cpu", precision="fp32", threads=1) as exact:
        expected = exact.score_pairs(PAIRS).logits
    with (
        shim_card.cards(count=2) as machine,
        Reranker(folder, device="cuda:1", precision="fp32") as reranker,
    ):
        found = reranker.score_pairs(PAIRS).logits
        ranking = reranker.rank(PAIRS[0][0], SENTENCES)
        assert reranker.facts.device == "cuda:1"
        assert machine.cards[0].peak == 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=PRECISIONS["fp32"])
    assert len(ranking.results) == len(SENTENCES)


@pytest.mark.parametrize(("family", "precision"), list(zip(FAMILIES, HALVES, strict=False)))
def test_no_host_memory_is_rewritten_before_the_card_has_read_it(native, opened, family, precision):
    """Work runs only when somebody waits for it, so a race shows as wrong scores."""
    toy = native(family)
    batches = [toy.batch([n, 5, 60], n) for n in range(4, 9)]
    with shim_card.real_or_shim(deferred=True):
        scorer = opened(toy.folder, precision)
        for _ in range(2):
            found = [scorer.score(batch) for batch in batches]
    for batch, scores in zip(batches, found, strict=True):
        expected = toy.reference(batch)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=PRECISIONS[precision])


def test_auto_is_the_card(native):
    with shim_card.cards(), Reranker(native("bert").folder, precision="fp16") as reranker:
        assert reranker.facts.device == "cuda:0"
        assert reranker.facts.device_name == "NVIDIA H200"
    assert not torch.cuda.is_available()
