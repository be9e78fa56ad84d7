"""The CUDA path against transformers' fp32: on the card that is here, or on one made of shims."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import LIMITS, NATIVE, SENTENCES, random_batch, reference_logits, vocabulary_of
from torch.profiler import ProfilerActivity, profile

from echelon import Reranker
from echelon.models.attention_cuda import Spans, attention_with, efficient, efficient_in_fp32, flash
from echelon.models.cuda_graphs import GRAPHS_SWITCH

pytestmark = pytest.mark.usefixtures("card")

PRECISIONS = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.3}
"""And how far a logit of a toy model may be from transformers' in fp32."""

PAIRS = [(SENTENCES[i % 10], SENTENCES[(i * 3 + 1) % 10] * (i % 3 + 1)) for i in range(40)]

VOCABULARY = 300

MIXES = {
    "shortest": [3],
    "one token": [1],
    "longest": [-1],
    "many equal": [23] * 17,
    "all different": [3, 41, 7, 5, 90, 12, 60, 4, 33, 21],
    "longest among shortest": [3, -1, 3, -1, -1, 4],
    "a full bucket": [60, 60, 8],
    "many short": [*range(3, 20)] * 4,
    "large": [90] * 30,
}


def older_than_ampere():
    return torch.cuda.get_device_capability()[0] < 8


def batch_of(folder, family, lengths, seed=0):
    lengths = [n if n > 0 else LIMITS[family] + 1 + n for n in lengths]
    return random_batch(lengths, vocabulary_of(folder), seed, types=family == "bert")


# Scores


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_change_nothing(bert, opened, precision):
    scorer = opened(bert, precision)
    scorer.use_graphs = False
    batches = [
        random_batch(n, VOCABULARY, 1, types=True) for n in ([20] * 10, [120, 31], [5], [90] * 9)
    ]
    expected = [scorer.score(batch) for batch in batches]
    scorer.use_graphs = True
    for _ in range(2):
        for batch, wanted in zip(batches, expected, strict=True):
            np.testing.assert_allclose(
                scorer.score(batch), wanted, rtol=0, atol=PRECISIONS[precision]
            )


# Kernels


@pytest.mark.parametrize("size", [8, 12, 64])
@pytest.mark.parametrize("firsts", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (flash, torch.float16),
        (flash, torch.bfloat16),
        (efficient, torch.float16),
        (efficient, torch.float32),
        (efficient_in_fp32, torch.bfloat16),
    ],
)
def test_kernels_agree_with_the_loop(kernel, dtype, firsts, size):
    if kernel is flash and older_than_ampere():
        pytest.skip("FlashAttention wants compute capability 8.0")
    torch.manual_seed(0)
    lengths = [1, 300, 64, 128, 129, 7]
    ends = [0, *np.cumsum(lengths).tolist()]
    packed = torch.randn(ends[-1] + 50, 3, 4, size, device="cuda").to(dtype)
    packed[ends[-1] :] = torch.nan  # rows of no pair
    query, key, value = packed.unbind(1)
    # Three empty pairs at the end, as in a bucket with room to spare.
    offsets = torch.tensor([*ends, *[ends[-1]] * 3], dtype=torch.int32, device="cuda")
    spans = Spans(offsets, offsets, 512, 512)
    kept = ends[-1]
    if firsts:
        query, kept = query[offsets[:-1].long()], len(lengths)
        singles = torch.arange(len(offsets), dtype=torch.int32, device="cuda")
        spans = Spans(singles, offsets, 1, 512)
    found = attention_with(kernel)(query, key, value, spans)[:kept].float().cpu()
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            *(part.float().cpu().transpose(0, 1) for part in (asked, key[a:b], value[a:b]))
        ).transpose(0, 1)
        for i, (a, b) in enumerate(pairwise(ends))
        for asked in [query[i : i + 1] if firsts else query[a:b]]
    ]
    wanted = torch.cat(expected).reshape(kept, -1)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_older_cards_attention_scores_alike(toy, opened, family, precision):
    folder = toy(family)
    scorer = opened(folder, precision)
    scorer.use_graphs = False
    scorer._forward._attend = attention_with(
        efficient_in_fp32 if precision == "bf16" else efficient
    )
    batch = batch_of(folder, family, MIXES["all different"])
    expected = reference_logits(folder, batch)
    for _ in range(2):
        np.testing.assert_allclose(
            scorer.score(batch), expected, rtol=0, atol=PRECISIONS[precision]
        )


# Copies and waiting


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
@pytest.mark.parametrize("use_graphs", [False, True])
def test_a_step_is_one_copy_each_way(card, bert, opened, use_graphs):
    scorer = opened(bert, "fp16")
    scorer.use_graphs = use_graphs
    batch = random_batch([20] * 10, VOCABULARY, 0, types=True)
    for _ in range(2):
        scorer.score(batch)
    torch.cuda.synchronize()
    if card is not None:
        card.happenings.clear()
        scorer.score(batch)
        assert card.counts("copy in").total() == card.counts("copy out").total() == 1
        assert card.counts("replay").total() == use_graphs
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        scorer.score(batch)
    names = [event.name for event in seen.events()]
    copies = [name for name in names if name.startswith("Memcpy")]
    if not copies:
        pytest.skip("the profiler sees no device activity here")
    assert len([name for name in copies if "DtoH" in name]) == 1
    assert len([name for name in copies if "HtoD" in name]) == 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("count", [10, 200])
def test_nothing_waits_before_the_logits_are_copied(bert, opened, use_graphs, count):
    scorer = opened(bert, "fp16")
    scorer.use_graphs = use_graphs
    batch = random_batch([20] * count, VOCABULARY, 0, types=True)
    for _ in range(2):
        scorer.score(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            scorer._step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Memory


@pytest.fixture
def room():
    """Leaves the process so many bytes of the card beyond what it holds now."""

    def leave(extra):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_oom_ladder_works_on_a_full_card(card, bert, room, monkeypatch, precision):
    monkeypatch.setenv(GRAPHS_SWITCH, "off")  # what graphs hold would be room after the first rung
    count, spare = (400, 128 << 20) if card is None else (60, 2 << 20)
    pairs = [("how do I open a jar", f"{i} " + "turn the lid " * 150) for i in range(count)]
    with Reranker(bert, device="cuda", precision=precision) as reranker:
        expected = reranker.score_pairs(pairs).logits
        room(spare)
        scored = reranker.score_pairs(pairs, token_budget=200_000)
        again = reranker.score_pairs(pairs)
    assert np.abs(scored.logits - expected).max() <= PRECISIONS[precision]
    assert {step.rung for step in scored.report.ladder} >= {"drop_caches", "halve_budget"}
    assert np.abs(again.logits - expected).max() <= PRECISIONS[precision]


def test_graphs_give_their_memory_back(bert, opened, monkeypatch):
    monkeypatch.setenv(GRAPHS_SWITCH, "off")
    opened(bert, "fp16")
    others = private_segments()
    monkeypatch.delenv(GRAPHS_SWITCH)
    scorer = opened(bert, "fp16")
    assert len(scorer._graphs) > 2
    assert scorer.capture_failed is None
    assert private_segments() > others
    scorer.memory_ran_out()
    assert private_segments() == others
    scorer.score(random_batch([60] * 2, VOCABULARY, 0, types=True))
    assert len(scorer._graphs) == 0


def private_segments():
    """Pieces of the card's memory that belong to graphs' own pools."""
    return sum(segment["segment_pool_id"] != (0, 0) for segment in torch.cuda.memory_snapshot())


def test_no_memory_for_graphs_is_no_error(bert, opened, room, caplog):
    """A step that fits, and a capture that does not: its pool cannot use what is cached."""
    scorer = opened(bert, "fp16")
    batch = random_batch([100] * 20, VOCABULARY, 0, types=True)
    scorer.use_graphs = False
    expected = scorer.score(batch)
    scorer.use_graphs = True
    scorer._graphs.clear()
    scorer._graphs._record = _short(scorer._graphs._record, room)
    scorer._graphs.prepare()
    assert "No memory for a CUDA graph" in caplog.text
    assert len(scorer._graphs) == 0
    assert scorer.capture_failed is None
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=PRECISIONS["fp16"])


def _short(record, room):
    """Capture with a megabyte to spare, then give the memory back."""

    def capture(work):
        room(1 << 20)
        try:
            return record(work)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    return capture
