"""Attention over packed pairs: every row sees the rows of its own pair and no others.

On CPU there are three ways. The compiled kernel takes all pairs at once. The other two take runs
of pairs of one length, which are dense blocks of the packed rows, as views without padding or
masks: ``scaled_dot_product_attention``, or two products around a softmax. Which is fastest differs
from one processor to the next by factors, in both directions (docs/LOG.md), so it is measured,
once for each kind of rows. On CUDA the variable-length kernel takes the packed rows as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch.nn import functional

from echelon.clock import monotonic
from echelon.score.kernels import HEAD_SIZES, kernels

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.types import IntArray

Way = Literal["kernel", "fused", "products"]

PROBES = {48: 32, 192: 128, 2**31: 512}
"""Longest pair of a step → length of the pairs that its way is chosen with."""

PROBE_TOKENS = 512
PROBE_RUNS = 3

CLEARLY = 1.15
"""How much faster a way must be to replace the one before it in the list: a choice that noise could
turn would make scores differ in their last digits from one process to the next."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pairs of one length.

    Attributes:
        pair: index of the first pair.
        row: first packed row.
        count: pairs in the run.
        length: tokens of each.
    """

    pair: int
    row: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How packed rows divide into pairs.

    Attributes:
        lengths: int32 [pairs].
        offsets: int32 [pairs + 1] on the device.
        firsts: int64 [pairs] on the device, each pair's first row.
        longest: tokens of the longest pair.
    """

    lengths: IntArray
    offsets: Tensor
    firsts: Tensor
    longest: int

    @classmethod
    def of(cls, offsets: IntArray, device: torch.device) -> Layout:
        """Describe a batch by its offsets."""
        lengths = np.diff(offsets)
        on_device = torch.from_numpy(offsets).to(device)
        return cls(lengths, on_device, on_device[:-1].long(), int(lengths.max()))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The pairs as runs of one length."""
        starts = np.flatnonzero(np.diff(self.lengths, prepend=-1))
        counts = np.diff(starts, append=len(self.lengths))
        runs, row = [], 0
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            length = int(self.lengths[start])
            runs.append(Run(start, row, count, length))
            row += count * length
        return tuple(runs)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attention of every row over its pair.

    Args:
        query: [tokens, heads, size].
        key: [tokens, heads, size].
        value: [tokens, heads, size].
        layout: the pairs.

    Returns:
        [tokens, heads × size].
    """
    if _has_varlen(query):
        return _varlen(query, key, value, layout.offsets, layout.longest, layout)
    way = way_for(query, layout.longest)
    if way == "kernel":
        return _kernel(query, key, value, layout.offsets, layout)
    return _by_runs(query, key, value, way, [(r.row, r.count * r.length, r) for r in layout.runs])


def attend_first(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attention of each pair's first row alone, for the last layer.

    Args:
        query: [pairs, heads, size].
        key: [tokens, heads, size].
        value: [tokens, heads, size].
        layout: the pairs.

    Returns:
        [pairs, heads × size].
    """
    one_each = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    if _has_varlen(query):
        return _varlen(query, key, value, one_each, 1, layout)
    way = way_for(query, layout.longest)
    if way == "kernel":
        return _kernel(query, key, value, one_each, layout)
    return _by_runs(query, key, value, way, [(r.pair, r.count, r) for r in layout.runs])


def way_for(query: Tensor, longest: int) -> Way:
    """The fastest way for rows like these, [rows, heads, size], and pairs up to ``longest``."""
    probe = next(length for most, length in PROBES.items() if longest <= most)
    return fastest_way(query.dtype, query.shape[1], query.shape[2], probe)


@cache
def fastest_way(dtype: torch.dtype, heads: int, size: int, length: int) -> Way:
    """Measure the ways on pairs of one length; some milliseconds, once for each kind."""
    rows = torch.randn(PROBE_TOKENS // length * length, 3, heads, size).to(dtype)
    layout = Layout.of(np.arange(0, len(rows) + 1, length, dtype=np.int32), rows.device)
    best: Way
    best, *others = ways(dtype, size)
    if not others:
        return best
    least = _probe(best, rows, layout)
    for way in others:
        seconds = _probe(way, rows, layout)
        if seconds * CLEARLY < least:
            best, least = way, seconds
    return best


def ways(dtype: torch.dtype, size: int) -> list[Way]:
    """Ways there are on CPU for heads of this size, the likely best first."""
    with_kernel = dtype == torch.bfloat16 and size in HEAD_SIZES and kernels() is not None
    return ["kernel", "fused", "products"] if with_kernel else ["fused", "products"]


def _probe(way: Way, rows: Tensor, layout: Layout) -> float:
    """Seconds of the fastest of a few runs."""
    query, key, value = rows.unbind(1)
    blocks = [(run.row, run.count * run.length, run) for run in layout.runs]
    seconds = []
    for _ in range(PROBE_RUNS + 1):  # the first one warms up
        started = monotonic()
        if way == "kernel":
            _kernel(query, key, value, layout.offsets, layout)
        else:
            _by_runs(query, key, value, way, blocks)
        seconds.append(monotonic() - started)
    return min(seconds)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, layout: Layout
) -> Tensor:
    """All pairs in one call, whatever their lengths."""
    library = kernels()
    if library is None:
        raise RuntimeError("This is a bug: the kernel was chosen and is not there.")
    _, heads, size = query.shape
    out = torch.empty(len(query), heads * size, dtype=query.dtype)
    status = library.echelon_attention(
        *(query.data_ptr(), query.stride(0), query_offsets.data_ptr()),
        *(key.data_ptr(), value.data_ptr(), key.stride(0), layout.offsets.data_ptr()),
        *(len(layout.lengths), heads, size, out.data_ptr(), torch.get_num_threads()),
    )
    if status:
        raise MemoryError("no memory for the scratch space of attention")
    return out


def _by_runs(
    query: Tensor, key: Tensor, value: Tensor, way: Way, runs: list[tuple[int, int, Run]]
) -> Tensor:
    """One dense block after another; of each run the first query row and the number of them."""
    attend_run = _fused if way == "fused" else _products
    mixed = []
    for first, count, run in runs:
        rows = slice(run.row, run.row + run.count * run.length)
        block = (
            part.view(run.count, -1, *part.shape[1:]).transpose(1, 2)
            for part in (query[first : first + count], key[rows], value[rows])
        )
        mixed.append(attend_run(*block).transpose(1, 2).reshape(count, -1))
    return torch.cat(mixed)


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value)


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[count, heads, rows, size] through two batched products around a softmax."""
    count, heads, _, size = query.shape
    queries, keys, values = (part.flatten(0, 1) for part in (query, key, value))
    weights = torch.bmm(queries, keys.transpose(1, 2)).mul_(size**-0.5).softmax(-1)
    return torch.bmm(weights, values).view(count, heads, -1, size)


def _has_varlen(query: Tensor) -> bool:
    """The variable-length kernel wants CUDA, a half-width type and compute capability 8.0."""
    if query.device.type != "cuda" or query.dtype == torch.float32:
        return False
    major, _ = torch.cuda.get_device_capability(query.device)
    return major >= 8  # noqa: PLR2004 - compute capability 8.0, Ampere


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    query_longest: int,
    layout: Layout,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    mixed = cast(
        "Tensor",
        varlen_attn(
            query, key, value, query_offsets, layout.offsets, query_longest, layout.longest
        ),
    )
    return mixed.reshape(len(query), -1)
