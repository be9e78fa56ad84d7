"""The CUDA encoder without a card: staging, buckets, graphs, and what the kernels are called with.

The forward pass runs on CPU with a plain loop for the kernels, and on fake CUDA tensors with the
real ones: those refuse wrong arguments, and every value that the host would have to wait for.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from helpers import LIMITS, NATIVE, random_batch, reference_logits, vocabulary_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from echelon.errors import BadCheckpoint
from echelon.models import cuda_graphs as graphs_module
from echelon.models import encoder_cuda
from echelon.models.architecture import native_architecture, read_config
from echelon.models.cuda_graphs import (
    BACKOFF,
    FIRST_PATIENCE,
    LARGEST,
    MAX_PAIRS,
    MAX_TOKENS,
    CaptureShape,
    CudaGraphs,
    Recording,
    bucket_of,
    fill,
    read,
)
from echelon.models.encoder import Embeddings, Head, Layer, Weights
from echelon.models.encoder_cuda import CudaScorer, Spans, attention_with, choose_kernel
from echelon.models.layers import DenseLinear, FeedForward, Norm
from echelon.models.registry import open_scorer

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
KERNELS = (encoder_cuda.flash, encoder_cuda.efficient, encoder_cuda.efficient_in_fp32)
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)
MIXES = ([3], [23] * 17, [3, 41, 7, 5, 90, 12, 60, 4, 33, 21], [64], [60, 60, 3, 5])


def looped(query, key, value, spans, scale):
    """What the kernels do, pair by pair; rows of no pair stay NaN, as if never written."""
    mixed = torch.full_like(query, torch.nan)
    queries, keys = spans.query_offsets.tolist(), spans.key_offsets.tolist()
    assert max(np.diff(queries)) <= spans.max_queries
    assert max(np.diff(keys)) <= spans.max_keys
    for i in range(len(queries) - 1):
        rows, seen = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        parts = (part.transpose(0, 1) for part in (query[rows], key[seen], value[seen]))
        if keys[i] < keys[i + 1]:
            found = functional.scaled_dot_product_attention(*parts, scale=scale)
            mixed[rows] = found.transpose(0, 1)
    return mixed


def taped(log=None):
    """Captures by keeping the work, and replays by doing it again into the same place."""

    def record(work):
        output = work().clone()
        drop = (lambda: log.append("dropped")) if log is not None else (lambda: None)
        return Recording(lambda: output.copy_(work()), output, drop)

    return record


def scorer_of(folder, *, record=None, **options):
    """The CUDA scorer, on CPU, over a native model's fp32 weights."""
    weights = open_scorer(folder, device="cpu", precision="fp32", threads=1, **options)._weights
    shape = native_architecture(folder, read_config(folder))
    attention = attention_with(looped)
    return CudaScorer(shape, weights, CPU, "fp32", attention=attention, record=record or taped())


# Shapes and blocks


@given(LENGTHS)
def test_a_bucket_holds_the_step_and_wastes_little(lengths):
    exact = CaptureShape.of(random_batch(lengths, 100, 0))
    bucket = bucket_of(exact)
    assert bucket.tokens - exact.tokens < max(64, exact.tokens / 8)
    assert bucket.pairs >= exact.pairs
    assert bucket.longest >= exact.longest
    assert bucket_of(bucket) == bucket
    assert bucket.size(segments=True) <= LARGEST.size(segments=True)


def test_buckets_are_few_and_end_where_the_host_is_no_bottleneck():
    shapes = [CaptureShape(n, 1, 1) for n in range(1, MAX_TOKENS + 1)]
    assert len({bucket_of(shape) for shape in shapes}) == 24
    assert len({bucket_of(CaptureShape(MAX_TOKENS, 1, n)).longest for n in range(1, 2049)}) == 3
    assert len({bucket_of(CaptureShape(MAX_TOKENS, n, 8)).pairs for n in range(1, 257)}) == 3
    assert bucket_of(CaptureShape(MAX_TOKENS + 1, 1, 1)) is None
    assert bucket_of(CaptureShape(MAX_TOKENS, MAX_PAIRS + 1, 1)) is None


@pytest.mark.parametrize("segments", [False, True])
@given(lengths=LENGTHS)
@settings(max_examples=30)
def test_what_is_read_is_what_was_filled_in(lengths, segments):
    batch = random_batch(lengths, 100, 1, types=True)
    positions = np.arange(len(batch.ids), dtype=np.int32)
    shape = bucket_of(CaptureShape.of(batch))
    assume(shape is not None)  # a step of many long pairs has no bucket
    block = torch.full((shape.size(segments=segments),), -1, dtype=torch.int32)
    fill(block.numpy(), shape, batch, positions, segments=segments)
    inputs = read(block, shape, segments=segments)
    tokens, pairs = len(batch.ids), len(batch)
    assert inputs.ids.tolist() == [*batch.ids, *[0] * (shape.tokens - tokens)]
    assert inputs.positions.tolist() == [*positions, *[0] * (shape.tokens - tokens)]
    assert inputs.offsets.tolist() == [*batch.offsets, *[tokens] * (shape.pairs - pairs)]
    assert inputs.firsts.tolist() == [*batch.offsets[:-1], *[0] * (shape.pairs - pairs)]
    assert inputs.singles.tolist() == list(range(shape.pairs + 1))
    assert (inputs.segments is None) != segments
    if segments:
        assert inputs.segments[:tokens].tolist() == batch.type_ids.tolist()
        assert inputs.segments[tokens:].eq(0).all()
    assert all(part.is_contiguous() for part in (inputs.offsets, inputs.singles))


# Kernels


@pytest.mark.parametrize(
    ("major", "dtype", "size", "expected"),
    [
        (9, torch.float16, 64, encoder_cuda.flash),
        (8, torch.bfloat16, 64, encoder_cuda.flash),
        (9, torch.float32, 64, encoder_cuda.efficient),
        (9, torch.float16, 320, encoder_cuda.efficient),
        (7, torch.float16, 64, encoder_cuda.efficient),
        (7, torch.bfloat16, 64, encoder_cuda.efficient_in_fp32),
        (7, torch.float32, 64, encoder_cuda.efficient),
        (0, torch.float16, 64, encoder_cuda.efficient),
    ],
)
def test_the_kernel_fits_the_card_and_the_type(major, dtype, size, expected):
    assert choose_kernel(major, dtype, size) is expected


@pytest.mark.parametrize("size", [5, 8, 12, 64])
@pytest.mark.parametrize("firsts", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_kernels_accept_what_they_are_called_with(kernel, firsts, size):
    with FakeTensorMode(), torch.inference_mode():
        packed = torch.empty(100, 3, 4, size, dtype=torch.float16, device=CUDA)
        query, key, value = packed.unbind(1)
        offsets = torch.empty(11, dtype=torch.int32, device=CUDA)
        spans = Spans(offsets, offsets, 1 if firsts else 50, 50)
        if firsts:
            query = torch.empty(10, 4, size, dtype=torch.float16, device=CUDA)
        mixed = attention_with(kernel)(query, key, value, spans)
        assert mixed.shape == (len(query), 4 * size)
        assert mixed.dtype == torch.float16
        assert mixed.device == CUDA
        assert mixed.is_contiguous()


@pytest.mark.parametrize("size", [5, 12])
def test_heads_are_widened_without_a_trace(size):
    seen = []

    def spy(query, key, value, spans, scale):
        seen.append(query.shape[-1])
        return looped(query, key, value, spans, scale)

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 30, 4, size).unbind()
    offsets = torch.tensor([0, 7, 8, 30], dtype=torch.int32)
    spans = Spans(offsets, offsets, 22, 22)
    expected = looped(query, key, value, spans, size**-0.5).reshape(30, -1)
    found = attention_with(spy)(query, key, value, spans)
    assert seen == [-(-size // 8) * 8]
    torch.testing.assert_close(found, expected)


# The forward pass


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("lengths", MIXES, ids=lambda x: f"{len(x)} pairs")
def test_scores_are_the_references(toy, family, lengths, use_graphs):
    folder = toy(family)
    batch = random_batch(lengths, vocabulary_of(folder), len(lengths), types=family == "bert")
    scorer = scorer_of(folder)
    scorer.use_graphs = use_graphs
    expected = reference_logits(folder, batch)
    for _ in range(FIRST_PATIENCE + 1):
        scores = scorer.score(batch)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert len(scorer._graphs) == use_graphs
    assert scorer.info.max_tokens == LIMITS[family]


def test_a_graph_reads_each_step_anew(toy):
    """One bucket, other texts and other pairs: nothing of the step before may be left."""
    folder = toy("bert")
    scorer = scorer_of(folder)
    for seed in range(6):
        lengths = [[3] * 16, [64], [20, 44], [60, 1], [5, 6, 7], [9]][seed]
        batch = random_batch(lengths, vocabulary_of(folder), seed, types=seed % 2 == 0)
        np.testing.assert_allclose(
            scorer.score(batch), reference_logits(folder, batch), rtol=0, atol=1e-4
        )
    assert len(scorer._graphs) == 1


def test_large_steps_run_without_a_graph(toy):
    folder = toy("roberta")
    scorer = scorer_of(folder)
    batch = random_batch([100] * 21, vocabulary_of(folder), 0)
    for _ in range(3):
        scores = scorer.score(batch)
    np.testing.assert_allclose(scores, reference_logits(folder, batch), rtol=0, atol=1e-4)
    assert len(scorer._graphs) == 0


def test_foreign_ids_are_refused_and_closing_is_final(toy):
    scorer = scorer_of(toy("roberta"))
    batch = random_batch([5], 10, 0)
    batch.ids[0] = 1_000_000
    with pytest.raises(BadCheckpoint, match="1000000"):
        scorer.score(batch)
    scorer.close()
    with pytest.raises(RuntimeError, match="bug"):
        scorer.score(random_batch([5], 10, 0))


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("major", [7, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_pass_never_waits_for_the_device(toy, family, major, dtype):
    """A fake tensor has no values: reading one raises an error."""
    architecture = native_architecture(toy(family), read_config(toy(family)))
    with FakeTensorMode(), torch.inference_mode():
        weights = fake_weights(architecture, dtype)
        scorer = CudaScorer.__new__(CudaScorer)
        scorer._architecture, scorer._weights, scorer._dtype = architecture, weights, dtype
        scorer._attend = attention_with(choose_kernel(major, dtype, architecture.head_shape[1]))
        shape = CaptureShape(320, 16, 128)
        segments = architecture.reads_segments
        block = torch.zeros(shape.size(segments=segments), dtype=torch.int32, device=CUDA)
        logits = scorer._forward(read(block, shape, segments=segments))
        assert logits.shape == (16,)
        assert logits.dtype == torch.float32
        assert logits.device == CUDA


def fake_weights(shape, dtype):
    hidden, wide = shape.hidden, shape.intermediate

    def linear(into, out, dtype=dtype):
        weight = torch.empty(out, into, dtype=dtype, device=CUDA)
        return DenseLinear(weight, torch.empty(out, dtype=dtype, device=CUDA))

    def norm(dtype=dtype):
        ones = torch.empty(hidden, dtype=dtype, device=CUDA)
        return Norm(ones, ones, shape.epsilon)

    def table(rows):
        return torch.empty(rows, hidden, device=CUDA)

    def layer(*, last):
        queries = linear(hidden, hidden) if last else None
        qkv = linear(hidden, (2 if last else 3) * hidden)
        feed = FeedForward(linear(hidden, wide), linear(wide, hidden), shape.activation)
        return Layer(queries, qkv, linear(hidden, hidden), norm(), feed, norm())

    embeddings = Embeddings(
        table(shape.vocabulary),
        table(shape.table_positions),
        table(shape.segments),
        norm(torch.float32),
    )
    head = Head(linear(hidden, hidden, torch.float32), linear(hidden, 1, torch.float32))
    layers = (layer(last=False), layer(last=True))
    return Weights(embeddings, layers, head, shape.head_shape, 0)


# When to capture, and what happens where it fails


class Failing:
    """Captures fail with an error, until it is taken away."""

    def __init__(self, error):
        self.error, self.tries = error, 0

    def __call__(self, work):
        self.tries += 1
        if self.error is not None:
            raise self.error
        return taped()(work)


def counted():
    """A pass that says how often it ran."""
    runs = []

    def forward(shape):
        runs.append(shape)
        return torch.full((shape.pairs,), float(len(runs)))

    return forward, runs


SHAPES = [CaptureShape(64 * n, 16, 128) for n in range(1, 121)]


def test_a_shape_is_captured_when_it_occurs_again():
    forward, runs = counted()
    graphs = CudaGraphs(forward, taped())
    for _ in range(FIRST_PATIENCE - 1):
        graphs.run(SHAPES[0])
    assert len(graphs) == 0
    assert graphs.run(SHAPES[0]).tolist() == [float(len(runs))] * 16
    assert len(graphs) == 1
    graphs.run(SHAPES[1])
    assert len(graphs) == 1


def test_graphs_are_bounded_and_the_one_unused_for_longest_goes():
    dropped = []
    graphs = CudaGraphs(counted()[0], taped(dropped))
    for shape in SHAPES:
        for _ in range(FIRST_PATIENCE):
            graphs.run(shape)
    assert len(graphs) == graphs_module.MAX_GRAPHS
    assert len(dropped) == len(SHAPES) - graphs_module.MAX_GRAPHS
    graphs.run(SHAPES[0])
    assert len(dropped) == len(SHAPES) - graphs_module.MAX_GRAPHS
    graphs.clear()
    assert len(graphs) == 0
    assert len(dropped) == len(SHAPES)


def test_without_capture_steps_run_as_before_and_one_warning_says_so(caplog):
    record = Failing(RuntimeError("operation not permitted when stream is capturing"))
    graphs = CudaGraphs(counted()[0], record)
    with caplog.at_level(logging.WARNING):
        for shape in SHAPES:
            for _ in range(5):
                assert graphs.run(shape).shape == (16,)
    assert record.tries == 1
    assert [r.message for r in caplog.records if "cannot be captured here" in r.message]
    assert len(caplog.records) == 1


def memory_trouble(*, ended):
    """Out of memory while capturing; ending the capture may then fail over it."""
    short = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    if not ended:
        return short
    outer = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    outer.__context__ = short
    return outer


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_memory_error_a_shape_is_captured_later(caplog, ended):
    record = Failing(memory_trouble(ended=ended))
    graphs = CudaGraphs(counted()[0], record)
    for _ in range(FIRST_PATIENCE):
        graphs.run(SHAPES[0])
    assert record.tries == 1
    assert "No memory for a CUDA graph" in caplog.text
    record.error = None
    for _ in range(FIRST_PATIENCE * BACKOFF - 1):
        graphs.run(SHAPES[0])
    assert (record.tries, len(graphs)) == (1, 0)
    graphs.run(SHAPES[0])
    assert (record.tries, len(graphs)) == (2, 1)


def test_release_lets_go_of_graphs(toy):
    folder, dropped = toy("roberta"), []
    scorer = scorer_of(folder, record=taped(dropped))
    batch = random_batch([9, 5], vocabulary_of(folder), 0)
    for _ in range(FIRST_PATIENCE):
        scorer.score(batch)
    assert len(scorer._graphs) == 1
    scorer.release()
    assert len(scorer._graphs) == 0
    assert dropped == ["dropped"]
    assert scorer.score(batch).shape == (2,)
    assert len(scorer._graphs) == 0
