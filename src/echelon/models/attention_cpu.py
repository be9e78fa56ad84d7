"""Attention over packed pairs on CPU: each row attends to the rows of its own pair.

There are three methods. The compiled kernel takes all pairs at once. The others take runs of pairs
of one length, which are dense blocks of the packed rows, as views without padding or masks:
``scaled_dot_product_attention``, or two products around a softmax. The fastest differs between
processors by factors, in both directions (docs/LOG.md), so it is measured once for each kind of
rows. :mod:`echelon.models.encoder_cuda` is for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional

from echelon.models.device import has_amx
from echelon.models.kernels import HEAD_SIZES, kernels
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from echelon.types import IntArray

Method = Literal["kernel", "fused", "products"]

PROBES = {48: 32, 192: 128, 1024: 512, 2**31: 1024}
"""Pairs up to this length → length of the pairs with which their method is chosen. It depends on a
pair's own length only: methods round differently, and other pairs must not change a score."""

NO_LIMIT = -1
"""Reach of rows that see all of their pair."""

PROBE_TOKENS = 512

LONGEST_PRODUCTS = 512
"""Probe up to which products may be chosen: the memory of their matrices grows with the square of a
length, to 3 GB for a pair of 8,192 tokens in twelve heads."""

PROBE_RUNS = 7

MIN_ADVANTAGE = 1.3
"""How many times faster a method must be to replace the likely best: a choice that noise could
change would make scores differ in their last digits between processes."""


@dataclass(frozen=True, slots=True)
class AttentionRun:
    """Consecutive pairs of one length."""

    pair: int  # index of the first pair
    row: int  # first packed row
    count: int  # pairs in the run
    length: int  # tokens of each

    @property
    def probe(self) -> int:
        """Length of the pairs with which its method is chosen."""
        return next(length for limit, length in PROBES.items() if self.length <= limit)


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How packed rows divide into pairs."""

    runs: tuple[AttentionRun, ...]  # the pairs as runs of one length
    probes: frozenset[int]  # the probe lengths of all runs
    offsets: Tensor  # int32 [pairs + 1]
    firsts: Tensor  # int64 [pairs], each pair's first row

    @classmethod
    def of(cls, offsets: IntArray) -> AttentionLayout:
        """The layout of a batch with these offsets."""
        runs = _runs(np.diff(offsets))
        rows = torch.from_numpy(offsets)
        return cls(runs, frozenset(run.probe for run in runs), rows, rows[:-1].long())


def _runs(lengths: IntArray) -> tuple[AttentionRun, ...]:
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    counts = np.diff(starts, append=len(lengths))
    runs, row = [], 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        length = int(lengths[start])
        runs.append(AttentionRun(start, row, count, length))
        row += count * length
    return tuple(runs)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """Attention of each row over its pair: [tokens, heads, size] → [tokens, heads × size]."""
    if _all_by_kernel(query, layout):
        return attend_by_kernel(query, key, value, layout)
    blocks = [(run.row, run.count * run.length, run) for run in layout.runs]
    return _by_runs(query, key, value, blocks)


def attend_first(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """Attention of each pair's first row only, for the last layer.

    ``query`` is [pairs, heads, size], ``key`` and ``value`` [tokens, heads, size]; the result is
    [pairs, heads × size].
    """
    if _all_by_kernel(query, layout):
        one_each = torch.arange(len(query) + 1, dtype=torch.int32)
        return _kernel(query, key, value, one_each, layout.offsets)
    return _by_runs(query, key, value, [(run.pair, run.count, run) for run in layout.runs])


def attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, reach: int = NO_LIMIT
) -> Tensor:
    """As :func:`attend`, of rows that see at most ``reach`` rows before and behind them."""
    return _kernel(query, key, value, layout.offsets, layout.offsets, reach)


def _all_by_kernel(query: Tensor, layout: AttentionLayout) -> bool:
    """Whether the compiled kernel is the method for all pairs of rows like these."""
    return all(method_for(query, probe) == "kernel" for probe in layout.probes)


def method_for(query: Tensor, probe: int) -> Method:
    """The fastest method for rows like these, [rows, heads, size], in pairs of a probe's length."""
    return fastest_method(query.dtype, query.shape[1], query.shape[2], probe)


@cache
def fastest_method(dtype: torch.dtype, heads: int, size: int, length: int) -> Method:
    """Measure the methods on pairs of one length; takes some milliseconds, once for each kind."""
    count = max(1, PROBE_TOKENS // length)
    block = torch.randn(3, count, length, heads, size).to(dtype).transpose(2, 3)
    likely, *others = methods(dtype, size)
    if length > LONGEST_PRODUCTS:
        others = [way for way in others if way != "products"]
    if not others:
        return likely
    seconds = _probe([likely, *others], block)
    best = min(others, key=lambda way: seconds[way])
    return best if seconds[best] * MIN_ADVANTAGE < seconds[likely] else likely


def methods(dtype: torch.dtype, size: int) -> list[Method]:
    """Methods for heads of this size, the likely best first.

    With AMX torch's own attention runs on matrix units, which the kernel does not use.
    """
    found = kernels()
    built = found is not None and "attention" in found.operations
    if dtype != torch.bfloat16 or size not in HEAD_SIZES or not built:
        return ["fused", "products"]
    return ["fused", "kernel", "products"] if has_amx() else ["kernel", "fused", "products"]


def _probe(candidates: list[Method], block: Tensor) -> dict[Method, float]:
    """Seconds of each method's fastest run; ``block`` is [3, count, heads, length, size]."""
    seconds = dict.fromkeys(candidates, float("inf"))
    for _ in range(PROBE_RUNS):
        for way in candidates:
            started = monotonic()
            METHODS[way](*block)
            seconds[way] = min(seconds[way], monotonic() - started)
    return seconds


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    offsets: Tensor,
    reach: int = NO_LIMIT,
) -> Tensor:
    """All pairs in one call, whatever their lengths; rows as in :func:`attend`."""
    found = kernels()
    if found is None:
        raise RuntimeError("This is a bug: the kernel was chosen and is not there.")
    if key.stride(0) != value.stride(0):  # the kernel walks both alike
        key, value = key.contiguous(), value.contiguous()
    _, heads, size = query.shape
    out = torch.empty(len(query), heads * size, dtype=query.dtype)
    found.call(
        "attention",
        *(query.data_ptr(), query.stride(0), query_offsets.data_ptr()),
        *(key.data_ptr(), value.data_ptr(), key.stride(0), offsets.data_ptr()),
        *(len(offsets) - 1, heads, size, reach, out.data_ptr(), torch.get_num_threads()),
    )
    return out


def _by_runs(
    query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int, AttentionRun]]
) -> Tensor:
    """One dense block a run; ``runs`` holds each run's first query row and number of query rows."""
    mixed = []
    for first, count, run in runs:
        rows = slice(run.row, run.row + run.count * run.length)
        block = (
            part.view(run.count, -1, *part.shape[1:]).transpose(1, 2)
            for part in (query[first : first + count], key[rows], value[rows])
        )
        attend_run = METHODS[method_for(query, run.probe)]
        mixed.append(attend_run(*block).transpose(1, 2).reshape(count, -1))
    return torch.cat(mixed)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[count, heads, rows, size] through the compiled kernel."""
    count, heads, length, size = query.shape
    queries, keys, values = (
        part.transpose(1, 2).reshape(-1, heads, size) for part in (query, key, value)
    )
    starts = torch.arange(count + 1, dtype=torch.int32)
    mixed = _kernel(queries, keys, values, starts * length, starts * key.shape[2])
    return mixed.view(count, length, heads, size).transpose(1, 2)


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[count, heads, rows, size] through two batched products around a softmax."""
    count, heads, _, size = query.shape
    queries, keys, values = (part.flatten(0, 1) for part in (query, key, value))
    weights = torch.bmm(queries, keys.transpose(1, 2)).mul_(size**-0.5).softmax(-1)
    return torch.bmm(weights, values).view(count, heads, -1, size)


METHODS: dict[Method, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kernel": _by_kernel,
    "fused": functional.scaled_dot_product_attention,
    "products": _products,
}
"""Each for one dense block: query, key and value [count, heads, rows, size]."""
