"""The CUDA path against the CPU's fp32; skipped where there is no card."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echelon import Reranker
from helpers import NATIVE, SENTENCES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

PAIRS = [(SENTENCES[i % 10], SENTENCES[(i * 3 + 1) % 10] * (i % 3 + 1)) for i in range(40)]


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.05), ("bf16", 0.3)]
)
def test_scores_are_the_cpus(toy, family, precision, tolerance):
    with Reranker(toy(family), device="cpu", precision="fp32") as exact:
        expected = exact.score_pairs(PAIRS).logits
    with Reranker(toy(family), device="cuda", precision=precision) as reranker:
        got = reranker.score_pairs(PAIRS).logits
        alone = reranker.score_pairs(PAIRS[:1]).logits
    assert np.abs(got - expected).max() <= tolerance
    assert abs(alone[0] - got[0]) <= tolerance


def test_auto_means_fp16_on_cuda(bert):
    with Reranker(bert) as reranker:
        assert reranker.facts.device.startswith("cuda")
        assert reranker.facts.precision == "fp16"


def test_the_ladder_goes_on_when_the_card_is_full(demo_folder):
    pairs = [("how do I open a jar", f"{i} " + "turn the lid " * 150) for i in range(400)]
    with Reranker(demo_folder, device="cuda") as reranker:
        expected = reranker.score_pairs(pairs).logits
        torch.cuda.empty_cache()
        room = torch.cuda.memory_allocated() + (64 << 20)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(room / total)
        try:
            scored = reranker.score_pairs(pairs, token_budget=200_000)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.abs(scored.logits - expected).max() <= 0.05
    assert {step.rung for step in scored.report.ladder} >= {"drop_caches", "halve_budget"}
