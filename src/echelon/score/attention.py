"""Attention over packed pairs: every row sees the rows of its own pair and no others.

Runs of pairs of one length are dense blocks of the packed rows, so they go through
``scaled_dot_product_attention`` as views, without padding, masks or gathers. That is for CPU;
:mod:`echelon.score.varlen` is for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.types import IntArray


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
        runs: the pairs as runs of one length.
        offsets: int32 [pairs + 1] on the device.
        firsts: int64 [pairs] on the device, each pair's first row.
        longest: tokens of the longest pair.
    """

    runs: tuple[Run, ...]
    offsets: Tensor
    firsts: Tensor
    longest: int

    @classmethod
    def of(cls, offsets: IntArray, device: torch.device) -> Layout:
        """Describe a batch by its offsets."""
        lengths = np.diff(offsets)
        on_device = torch.from_numpy(offsets).to(device)
        return cls(_runs(lengths), on_device, on_device[:-1].long(), int(lengths.max()))


def _runs(lengths: IntArray) -> tuple[Run, ...]:
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    counts = np.diff(starts, append=len(lengths))
    runs, row = [], 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        length = int(lengths[start])
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
    return torch.cat(
        [
            _attend_run(query[run.row : run.row + run.count * run.length], key, value, run)
            for run in layout.runs
        ]
    )


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
    return torch.cat(
        [
            _attend_run(query[run.pair : run.pair + run.count], key, value, run)
            for run in layout.runs
        ]
    )


def _attend_run(query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
    """One dense block: [count × rows each, heads, size] queries over the run's keys."""
    rows = slice(run.row, run.row + run.count * run.length)
    queries, keys, values = (
        part.view(run.count, -1, *part.shape[1:]).transpose(1, 2)
        for part in (query, key[rows], value[rows])
    )
    mixed = functional.scaled_dot_product_attention(queries, keys, values)
    return mixed.transpose(1, 2).reshape(len(query), -1)
