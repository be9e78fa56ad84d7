"""The CUDA encoder without a card: graphs, and what the kernels are called with.

The forward pass runs on CPU with a plain loop for the kernels, and on fake CUDA tensors with the
real ones: those refuse wrong arguments, and every value that the host would have to wait for.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from graphs import looped, scorer_of, taped
from helpers import LIMITS, NATIVE, ROOT, random_batch, reference_logits, vocabulary_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "benchmarks"))

from card_costs import FakeCheckpoint
from echelon.errors import BadCheckpoint, InvalidInput
from echelon.models import attention_cuda, encoder
from echelon.models.architecture import LayerPlan, native_architecture, read_config
from echelon.models.attention_cuda import (
    Spans,
    attention_with,
    choose_kernel,
    takes_packed_rows,
)
from echelon.models.cuda_graphs import (
    BACKOFF,
    FIRST_PAUSE,
    GRAPHS_SWITCH,
    LONGEST_PAUSE,
    CudaGraphs,
    Recording,
)
from echelon.models.cuda_steps import CaptureShape, Ladder, read
from echelon.models.encoder import load_weights
from echelon.models.encoder_cuda import EncoderPass

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
KERNELS = (
    attention_cuda.flash,
    attention_cuda.flash_by_public_name,
    attention_cuda.efficient,
    attention_cuda.efficient_in_fp32,
)
PRECISION_OF = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MIXES = ([3], [23] * 17, [3, 41, 7, 5, 90, 12, 60, 4, 33, 21], [64], [60, 60, 3, 5])


class Calls(TorchDispatchMode):
    """Operators that were called."""

    def __enter__(self):
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# Kernels


@pytest.mark.parametrize(
    ("major", "dtype", "size", "expected"),
    [
        (9, torch.float16, 64, attention_cuda.flash),
        (8, torch.bfloat16, 64, attention_cuda.flash),
        (9, torch.float32, 64, attention_cuda.efficient),
        (9, torch.float16, 320, attention_cuda.efficient),
        (7, torch.float16, 64, attention_cuda.efficient),
        (7, torch.bfloat16, 64, attention_cuda.efficient_in_fp32),
        (7, torch.float32, 64, attention_cuda.efficient),
        (0, torch.float16, 64, attention_cuda.efficient),
    ],
)
def test_the_kernel_fits_the_card_and_the_type(major, dtype, size, expected):
    assert choose_kernel(major, dtype, size) is expected


def test_flash_attention_is_one_call_where_torch_takes_its_arguments(monkeypatch):
    """``varlen_attn`` fills a tensor that nobody reads, in every layer."""
    called = {}
    for kernel in (attention_cuda.flash, attention_cuda.flash_by_public_name):
        with FakeTensorMode(), torch.inference_mode(), Calls() as calls:
            query = torch.empty(20, 4, 64, dtype=torch.float16, device=CUDA)
            offsets = torch.empty(3, dtype=torch.int32, device=CUDA)
            calls.clear()
            kernel(query, query, query, Spans(offsets, offsets, 12, 12), 0.125)
        called[kernel] = len(calls)
    assert called[attention_cuda.flash] == 1
    monkeypatch.setattr(attention_cuda, "FLASH_ARGUMENTS", ("query", "others"))
    chosen = choose_kernel(9, torch.float16, 64)
    assert chosen is attention_cuda.flash_by_public_name


def test_operators_with_other_arguments_are_not_taken_for_flash_attention():
    assert takes_packed_rows(torch.ops.aten._flash_attention_forward.default)
    assert not takes_packed_rows(torch.ops.aten._efficient_attention_forward.default)


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
    for _ in range(2):
        scores = scorer.score(batch)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert scorer.info.max_tokens == LIMITS[family]


def test_all_captures_come_before_the_first_step_and_the_largest_is_the_first(toy):
    folder, captured = toy("roberta"), []

    def record(work):
        recording = taped()(work)
        captured.append(len(recording.output))
        return recording

    scorer = scorer_of(folder, record=record)
    at_start = len(captured)
    assert at_start == len(scorer._graphs) > 5
    assert captured[0] == max(captured)
    for lengths in (*MIXES, [60] * 40):
        scorer.score(random_batch(lengths, vocabulary_of(folder), 0))
    assert len(captured) == at_start


def test_small_steps_are_replayed_and_others_are_not(toy):
    folder, replays = toy("roberta"), []

    def record(work):
        one = taped()(work)
        return Recording(lambda: (replays.append(1), one.replay()), one.output, one.drop)

    scorer = scorer_of(folder, record=record)
    for lengths, expected in (([60, 3], 1), ([60] * 40, 1), ([20] * 10, 2)):
        scorer.score(random_batch(lengths, vocabulary_of(folder), 0))
        assert len(replays) == expected


def test_a_graph_reads_each_step_anew(toy):
    """One shape, other texts and other pairs: nothing of the step before may be left."""
    folder = toy("bert")
    scorer = scorer_of(folder)
    for seed in range(6):
        lengths = [[3] * 16, [64], [20, 44], [60, 1], [5, 6, 7], [9]][seed]
        batch = random_batch(lengths, vocabulary_of(folder), seed, types=seed % 2 == 0)
        np.testing.assert_allclose(
            scorer.score(batch), reference_logits(folder, batch), rtol=0, atol=1e-4
        )


def test_graphs_can_be_switched_off(toy, monkeypatch):
    monkeypatch.setenv(GRAPHS_SWITCH, "off")
    record = Failing(None)
    folder = toy("bert")
    scorer = scorer_of(folder, record=record)
    batch = random_batch([5, 9], vocabulary_of(folder), 0)
    expected = reference_logits(folder, batch)
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-4)
    assert record.tries == 0
    monkeypatch.setenv(GRAPHS_SWITCH, "no")
    with pytest.raises(InvalidInput, match="'no' is unknown"):
        scorer_of(folder)


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
        plan = LayerPlan(PRECISION_OF[dtype])
        with patch.object(encoder, "encoder_checkpoint", lambda _: FakeCheckpoint()):
            weights = load_weights(Path(), architecture, CUDA, plan, 0)
        kernel = choose_kernel(major, dtype, architecture.head_shape[1])
        run = EncoderPass(weights, attention_with(kernel), plan.precision)
        shape = CaptureShape(320, 16, 128)
        segments = architecture.reads_segments
        block = torch.zeros(shape.size(segments=segments), dtype=torch.int32, device=CUDA)
        logits = run(read(block, shape, segments=segments))
        assert logits.shape == (16,)
        assert logits.dtype == torch.float32
        assert logits.device == CUDA


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


SHAPES = [CaptureShape(tokens, 16, 64) for tokens in (256, 192, 128, 64)]


class Steps(Ladder):
    """A ladder of four shapes."""

    def shapes(self):
        return SHAPES

    def find(self, exact):
        return exact if exact in SHAPES else None


def graphs_with(record):
    graphs = CudaGraphs(counted()[0], record, Steps(256, 64))
    graphs.prepare()
    return graphs


def test_what_is_replayed_is_the_shapes_own_pass():
    forward, runs = counted()
    graphs = CudaGraphs(forward, taped(), Steps(256, 64))
    graphs.prepare()
    assert runs == SHAPES
    assert graphs.shape_for(SHAPES[2]) == SHAPES[2]
    assert graphs.run(SHAPES[2]).tolist() == [5.0] * 16
    assert runs[-1] == SHAPES[2]
    assert graphs.shape_for(CaptureShape(300, 16, 64)) is None
    dropped = []
    graphs = graphs_with(taped(dropped))
    graphs.clear()
    assert (len(graphs), len(dropped)) == (0, 4)


def test_a_failed_capture_is_said_once_and_ends_all_captures(caplog):
    record = Failing(RuntimeError("operation not permitted when stream is capturing\nstack"))
    with caplog.at_level(logging.WARNING):
        graphs = graphs_with(record)
        assert graphs.failed == "operation not permitted when stream is capturing"
        record.error = None
        assert all(graphs.shape_for(shape) is None for shape in SHAPES * 5000)
    assert record.tries == 1
    assert len(graphs) == 0
    assert len(caplog.records) == 1
    assert "cannot be captured here" in caplog.text


def memory_trouble(*, ended):
    """Out of memory while capturing; ending the capture may then fail over it."""
    short = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    if not ended:
        return short
    outer = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    outer.__context__ = short
    return outer


def pause(graphs):
    """Steps that run without a graph from now on."""
    waited = 0
    while graphs.shape_for(SHAPES[0]) is None:
        waited += 1
    return waited


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_capture_ran_out_of_memory_graphs_come_back_later(caplog, ended):
    record = Failing(memory_trouble(ended=ended))
    graphs = graphs_with(record)
    assert (record.tries, len(graphs), graphs.failed) == (1, 0, None)
    assert "No memory for a CUDA graph" in caplog.text
    record.error = None
    assert pause(graphs) == FIRST_PAUSE
    assert (record.tries, len(graphs)) == (2, 1)


def test_one_event_counts_once_and_pauses_have_an_end():
    graphs = graphs_with(taped())
    pauses = []
    for _ in range(5):
        for _ in range(3):  # a child, its parent and the engine may all say it
            graphs.memory_ran_out()
        assert len(graphs) == 0
        pauses.append(pause(graphs))
    expected = [FIRST_PAUSE, FIRST_PAUSE * BACKOFF, *[LONGEST_PAUSE] * 3]
    assert pauses == expected


def test_lack_of_memory_lets_go_of_graphs(toy):
    folder, dropped = toy("roberta"), []
    scorer = scorer_of(folder, record=taped(dropped))
    graphs = len(scorer._graphs)
    scorer.memory_ran_out()
    assert len(scorer._graphs) == 0
    assert len(dropped) == graphs
    assert scorer.score(random_batch([9, 5], vocabulary_of(folder), 0)).shape == (2,)
    assert len(scorer._graphs) == 0
