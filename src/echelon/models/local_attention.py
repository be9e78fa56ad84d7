"""Attention over packed pairs in which a token sees only its neighbours, at the cost of these.

The compiled kernel takes the window as it is. Without it, queries of a long pair are cut into
blocks; each block meets the keys of its own tokens and of ``reach`` more on either side. A pair of
up to two blocks is one block, which costs no more. Pairs that are short enough see all of their
tokens anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from echelon.models.attention_cpu import AttentionLayout, attend, attend_by_kernel, method_for

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.attention_cpu import AttentionRun


Way = Literal["kernel", "whole", "blocks"]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a step that are computed together: pairs of one way, or long pairs of one length."""

    rows: slice
    way: Way
    layout: AttentionLayout | None  # of the pairs of the kernel, and of short ones
    run: AttentionRun | None  # of long ones in blocks
    mask: Tensor | None  # [blocks of all pairs, 1, block, keys of a block]: 0, or -inf if unseen


class LocalAttention:
    """Attention of each token over those at most ``reach`` before and behind it.

    It knows how the rows of one step divide, so that its layers share that.
    """

    def __init__(
        self, layout: AttentionLayout, reach: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._reach, self._block = reach, 2 * reach
        self._device, self._dtype = device, dtype
        self._layout = layout
        self._parts: list[_Part] = []  # as soon as they are needed

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads, size] → [tokens, heads × size]."""
        self._parts = self._parts or self._divided(query)
        mixed = [self._part(part, *(rows[part.rows] for rows in (query, key, value)))
                 for part in self._parts]  # fmt: skip
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _part(self, part: _Part, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One part's rows."""
        if part.run is not None and part.mask is not None:
            return self._blocks(query, key, value, part.run, part.mask)
        if part.layout is None:
            raise RuntimeError("This is a bug: a part is of no way.")
        if part.way == "kernel":
            return attend_by_kernel(query, key, value, part.layout, self._reach)
        return attend_pairs(query, key, value, part.layout)

    def _way(self, query: Tensor, run: AttentionRun) -> Way:
        """How pairs are computed: by their own length alone, whatever else is in the step."""
        if query.device.type == "cpu" and method_for(query, run.probe) == "kernel":
            return "kernel"
        return "blocks" if run.length > self._reach + 1 else "whole"

    def _divided(self, query: Tensor) -> list[_Part]:
        layout, parts = self._layout, []
        for way, grouped in groupby(layout.runs, lambda run: self._way(query, run)):
            runs = list(grouped)
            if way == "blocks":
                parts += [_Part(_rows(run, run), way, None, run, self._mask(run)) for run in runs]
                continue
            first, last = runs[0], runs[-1]
            offsets = layout.offsets[first.pair : last.pair + last.count + 1] - first.row
            part = AttentionLayout.of(offsets.cpu().numpy())
            parts.append(_Part(_rows(first, last), way, part, None, None))
        return parts

    def _mask(self, run: AttentionRun) -> Tensor:
        """Which keys each query of a block sees: near ones, inside of the pair."""
        block, margin = self._sizes(run)
        blocks = -(-run.length // block)
        queries = torch.arange(blocks * block).view(blocks, block, 1)
        first = torch.arange(blocks).view(blocks, 1, 1) * block - margin
        keys = first + torch.arange(block + 2 * margin)
        near = (queries - keys).abs() <= self._reach
        # Rows behind the end of the pair are dropped later; they see a key, or they would be NaN.
        seen = near & (keys >= 0) & ((keys < run.length) | (queries >= run.length))
        # In the form that attention adds, so that no layer converts it again.
        added = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, float("-inf"))
        times = run.count if blocks > 1 else 1  # a single block is broadcast
        return added[:, None].repeat(times, 1, 1, 1).to(self._device)

    def _sizes(self, run: AttentionRun) -> tuple[int, int]:
        """Queries of a block, and keys that it has more on either side."""
        if run.length <= 2 * self._block:
            return run.length, 0
        return self._block, self._reach

    def _blocks(
        self, query: Tensor, key: Tensor, value: Tensor, run: AttentionRun, mask: Tensor
    ) -> Tensor:
        """[count × length, heads, size] → [count × length, heads × size], block by block."""
        _, heads, size = query.shape
        block, margin = self._sizes(run)
        width, behind = block + 2 * margin, -run.length % block

        def padded(rows: Tensor, before: int, after: int) -> Tensor:
            pairs = rows.view(run.count, run.length, heads, size)
            return functional.pad(pairs, (0, 0, 0, 0, before, after)) if after else pairs

        queries = padded(query, 0, behind).view(-1, block, heads, size).transpose(1, 2)
        keys, values = (
            padded(rows, margin, behind + margin)
            .unfold(1, width, block)  # [count, blocks, heads, size, width]
            .permute(0, 1, 2, 4, 3)
            .flatten(0, 1)
            for rows in (key, value)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, mask)
        rows = mixed.transpose(1, 2).reshape(run.count, -1, heads * size)
        return rows[:, : run.length].reshape(-1, heads * size)


def attend_pairs(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """Attention of each token over its whole pair, on any device; shapes as above."""
    if query.device.type == "cpu":
        return attend(query, key, value, layout)
    mixed = []
    for run in layout.runs:
        q, k, v = (
            rows[_rows(run, run)].view(run.count, run.length, *rows.shape[1:]).transpose(1, 2)
            for rows in (query, key, value)
        )
        one = functional.scaled_dot_product_attention(q, k, v)
        mixed.append(one.transpose(1, 2).reshape(run.count * run.length, -1))
    return torch.cat(mixed)


def _rows(first: AttentionRun, last: AttentionRun) -> slice:
    return slice(first.row, last.row + last.count * last.length)
