"""The scorer of cards on CPU: plain loops in place of its kernels and its captures."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from echelon.models.architecture import native_architecture, read_config
from echelon.models.attention_cuda import attention_with
from echelon.models.cuda_graphs import Recording
from echelon.models.cuda_scorer import CardParts, CudaScorer
from echelon.models.cuda_steps import Card
from echelon.models.encoder_cuda import EncoderPass
from echelon.models.registry import open_scorer

CPU = torch.device("cpu")
SLOW = Card(7, 1)  # so slow that few sizes are captured


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
    parts = CardParts(attention_with(looped), record or taped(), SLOW)
    return CudaScorer(shape, EncoderPass(weights, parts.attend, "fp32"), CPU, "fp32", parts, 0)
